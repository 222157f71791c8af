"""Which documents ``kvscope lsa fit`` makes: what they cost, how long they may be, which tasks have room."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

from kvscope.errors import UsageError
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.indexers.collection.collect import make_tasks
from kvscope.harness.indexers.lsa.fit_config import ENOUGH_DOCUMENTS, LADDER_TOKENS, TASKS, FitConfig

if TYPE_CHECKING:
    from kvscope.tasks.base import Task


@dataclass(frozen=True)
class DocumentCost:
    """What a document takes: so much whatever its length, and so much a token.

    On a GPU a short document is nearly all of the first, and its seconds a token tell nothing of a long one's.
    """

    fixed_s: float
    token_s: float
    measured: tuple[int, float]

    @classmethod
    def of(cls, measured: dict[int, float]) -> "DocumentCost":
        """Take all of one length's seconds for its tokens': never too little for a longer one."""
        ((length_tokens, seconds),) = measured.items()
        return cls(0.0, seconds / length_tokens, (length_tokens, seconds))

    def and_of(self, length_tokens: int, seconds: float) -> "DocumentCost":
        """Return the line through this length, too; a longer one that took no longer costs nothing a token."""
        shorter_tokens, shorter_s = self.measured
        token_s = max(0.0, seconds - shorter_s) / (length_tokens - shorter_tokens)
        return DocumentCost(max(0.0, shorter_s - token_s * shorter_tokens), token_s, self.measured)

    def of_length(self, length_tokens: int) -> float:
        """Return the seconds of a document."""
        return self.fixed_s + self.token_s * length_tokens


def fitting_lengths(lengths: Sequence[int], cost: DocumentCost, left_s: float) -> tuple[int, ...]:
    """Return the two longest neighbours of which the time gives enough documents; else the shortest length alone.

    Args:
        lengths: ascending.
    """
    pairs = [tuple(lengths[at : at + 2]) for at in range(max(1, len(lengths) - 1))]
    for pair in reversed(pairs):
        if left_s >= ENOUGH_DOCUMENTS * mean(map(cost.of_length, pair)):
            return pair
    return tuple(lengths[:1])


def lengths_to_try(config: FitConfig, loaded: LoadedModel) -> tuple[int, ...]:
    """Return the lengths asked for, or all that the model takes, ascending.

    Raises:
        UsageError: the model takes none.
    """
    most = loaded.max_length_tokens
    if config.lengths_tokens is not None:
        return tuple(sorted(config.lengths_tokens))
    found = tuple(length for length in LADDER_TOKENS if length <= most)
    if not found:
        raise UsageError(
            f"Model '{loaded.name}' takes {most:,} tokens, and an indexer needs prompts of {LADDER_TOKENS[0]:,}: there "
            "is little to save on shorter ones."
        )
    return found


def tasks_to_ask(config: FitConfig, tokenizer: Any, length_tokens: int) -> tuple[str, ...]:
    """Return the tasks asked for, or those of four that the shortest length has room for.

    Raises:
        UsageError: one has the same prompts whatever the seed, so that documents of two ends would be the same; or
            the length has room for none.
    """
    if config.tasks is not None:
        for task in make_tasks(config.tasks):
            if task.n_samples is not None:
                raise UsageError(
                    f"Task {task.name!r} has the same prompts whatever the seed, and training, threshold and "
                    "evaluation need different ones: give a task that makes its prompts, or collect parts of the "
                    "data (kvscope lsa collect, then train, calibrate and eval)."
                )
        return config.tasks

    def has_room(task: "Task") -> bool:
        return task.min_length_tokens(tokenizer) <= length_tokens

    found = tuple(task.name for task in make_tasks(TASKS) if has_room(task))
    if not found:
        raise UsageError(
            f"Length {length_tokens:,} has no room for any of {', '.join(TASKS)}: give longer prompts (--length) or "
            "another task (--task)."
        )
    return found
