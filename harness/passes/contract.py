"""Whether tasks and methods keep their contracts, where a package from outside may not: each fault is one sentence.

Methods are asked before the first row, each prompt and score is looked at as it comes.
"""

from collections.abc import Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, JsonValue, TypeAdapter, ValidationError

from kvscope.errors import UsageError, shown
from kvscope.plugins import asking, is_own_class
from kvscope.tasks.base import Sample, Task

if TYPE_CHECKING:
    import torch

    from kvscope.methods.base import CacheMethod
    from kvscope.methods.shape import ModelShape

_IN_A_ROW = TypeAdapter(dict[str, JsonValue], config=ConfigDict(allow_inf_nan=False))


def build_sample(task: Task, tokenizer: Any, *, length_tokens: int, sample: int, seed: int) -> Sample:
    """Return a prompt of a task, which has the length and the places that it should.

    Raises:
        UsageError: it has not, or the task cannot build it.
    """
    with asking("task", task.name, type(task), "its build"):
        found = task.build(tokenizer, length_tokens=length_tokens, sample=sample, seed=seed)
    if fault := _fault(task, found, length_tokens):
        raise UsageError(
            f"Task {task.name!r} cannot be used: sample {sample} at length {length_tokens:,} {fault} "
            "(see docs/add-a-method.md)."
        )
    return found


def _fault(task: Task, sample: object, length_tokens: int) -> str:
    """Return the first thing that is wrong with a prompt; empty where nothing is."""
    if not isinstance(sample, Sample):
        return f"is {shown(sample)}, expected a Sample"
    n_tokens, room_tokens = len(sample.ids), length_tokens - sample.max_new_tokens
    if n_tokens > room_tokens or (n_tokens < room_tokens and not task.own_lengths) or not n_tokens:
        return f"has {n_tokens:,} tokens, expected {room_tokens:,}, which leave {sample.max_new_tokens} for the answer"
    if not 0 <= sample.question_start < n_tokens:
        return f"has its question at token {sample.question_start:,} of {n_tokens:,}"
    if sample.question_type not in task.question_types:
        return f"has the question type {sample.question_type!r}, which is not in the task's question_types"
    if sample.depth is not None and not 0 <= sample.depth <= 1:
        return f"has the depth {sample.depth}, expected a number from 0 to 1, or None"
    return ""


def score_of(task: Task, sample: Sample, output: str) -> float:
    """Return the score of an answer.

    Raises:
        ValueError: it is none.
    """
    score = task.score(sample, output)
    try:
        is_score = 0 <= score <= 1
    except TypeError:
        is_score = False
    if not is_score:
        raise ValueError(f"the score of task {task.name!r} is {shown(score)}, expected a number from 0 to 1")
    return float(score)


def check_methods(
    methods: "Sequence[CacheMethod[Any]]",
    shape: "ModelShape",
    device: "torch.device | str",
    *,
    lengths_tokens: Sequence[int],
) -> None:
    """Ask methods from outside for all that a run asks of them before they are opened.

    Raises:
        UsageError: one raises, or says what no row can hold.
    """
    for method in methods:
        if is_own_class(method.kind):
            continue
        with asking("method", method.label, method.kind, "its unsupported"):
            if method.unsupported(shape, device):
                continue
        for n_tokens in lengths_tokens:
            _check_method(method, shape, n_tokens)


def _check_method(method: "CacheMethod[Any]", shape: "ModelShape", n_tokens: int) -> None:
    from kvscope.methods.shape import Footprint

    def ask(what: str, *arguments: Any) -> Any:
        with asking("method", method.label, method.kind, f"its {what}"):
            return getattr(method, what)(*arguments)

    def broken(what: str, found: object, expected: str) -> UsageError:
        told = f"its {what} of a prompt of {n_tokens:,} tokens is {shown(found)}, expected {expected}"
        return UsageError(f"Method {method.label!r} cannot be used: {told}.")

    found = ask("predict", shape, n_tokens, 1)
    if not (isinstance(found, Footprint) and all(isinstance(each, int) for each in astuple(found))):
        raise broken("predict", found, "a Footprint of whole numbers")
    if not isinstance(noop := ask("is_noop", n_tokens, shape), bool):
        raise broken("is_noop", noop, "true or false")
    if not _is_json(config := ask("effective_config", n_tokens, method.stored(shape))):
        raise broken("effective_config", config, "a dict of what JSON holds")
    if not _is_json(options := ask("describe")["options"]):
        raise broken("options", options, "what JSON holds")


def _is_json(found: object) -> bool:
    try:
        _IN_A_ROW.validate_python(found, strict=True)
    except ValidationError:
        return False
    return True
