"""Whether budgets hold what they must, and leave something out, at the prompts of a run: told before the first.

A budget may be a fraction of the prompt, and prompts of files and benchmarks have the lengths they have.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kvscope.errors import UsageError
from kvscope.harness.passes.config import RunConfig
from kvscope.harness.passes.contract import build_sample
from kvscope.harness.passes.facts import ModelFacts
from kvscope.harness.passes.prompt import split_prompt
from kvscope.plugins import asking

if TYPE_CHECKING:
    from kvscope.methods.base import CacheMethod
    from kvscope.tasks.base import Task


def check_budgets(
    config: RunConfig, facts: ModelFacts, methods: "Sequence[CacheMethod[Any]]", tasks: "Sequence[Task]"
) -> None:
    """Predict every method's bytes at the prompts that leave it the fewest tokens.

    Raises:
        UsageError: a budget is too small there, as the method says it.
    """
    supported = [method for method in methods if not method.unsupported(facts.shape, facts.device)]
    for task in tasks:
        for length_tokens in config.lengths_tokens:
            for where, n_tokens in _least_contexts(config, facts, task, length_tokens):
                for method in supported:
                    try:
                        method.predict(facts.shape, n_tokens, task.max_new_tokens)
                    except UsageError as error:
                        raise UsageError(f"{where}: {error}") from error


def _least_contexts(
    config: RunConfig, facts: ModelFacts, task: "Task", length_tokens: int
) -> Iterator[tuple[str, int]]:
    """Yield (which prompt, tokens that a method gets of it)."""
    if not task.own_lengths and config.method_from == "last_token":
        yield f"Task {task.name!r} at length {length_tokens:,}", length_tokens - task.max_new_tokens - 1
        return
    with asking("task", task.name, type(task), "its short_samples"):
        short = task.short_samples(facts.tokenizer, samples=config.samples)
    for index in short:
        sample = build_sample(task, facts.tokenizer, length_tokens=length_tokens, sample=index, seed=config.seed)
        context_ids, _ = split_prompt(sample, config.method_from)
        yield f"Prompt {index + 1} of task {task.name!r} at length {length_tokens:,}", len(context_ids)


def noop_notes(
    config: RunConfig, facts: ModelFacts, methods: "Sequence[CacheMethod[Any]]", tasks: "Sequence[Task]"
) -> tuple[str, ...]:
    """Return a sentence for each method that leaves nothing out of any prompt of a task whose prompts are short.

    At the length asked for it may leave something out: prompts of files and benchmarks are as long as they are.
    """
    said = []
    shape = facts.shape
    for task in tasks:
        if not task.own_lengths or task.fills_length:
            continue
        longest_tokens = task.least_length_tokens(facts.tokenizer, samples=config.samples) - task.max_new_tokens
        for method in methods:
            if method.name == "dense" or method.unsupported(shape, facts.device):
                continue
            if method.is_noop(longest_tokens, shape) and not method.is_noop(max(config.lengths_tokens), shape):
                said.append(
                    f"{method.label} leaves nothing out of the prompts of {task.name}, which have {longest_tokens:,} "
                    "tokens at most: there it is dense by another name."
                )
    return tuple(said)
