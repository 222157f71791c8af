"""Whether the rows of a folder are those that its run.json asks for."""

from collections.abc import Sequence
from functools import cache
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvscope.errors import UsageError
from kvscope.results.limits import MOST_QUESTION_TYPES
from kvscope.results.plain_text import shortened, visible
from kvscope.results.run_schema import RunInfo

if TYPE_CHECKING:
    import pandas as pd

    Rows = pd.DataFrame | list[Any]

_METHOD = ["method_label", "method", "model"]


def refuse_strangers(
    samples: "Rows", measured: "Sequence[Rows]", max_contexts: "Rows", *, info: RunInfo, folder: Path
) -> None:
    """Check that every row is of the run's model and methods, and every sample row of its tasks, lengths and prompts.

    Rows are frames or lists. Lengths of memory rows (`measured`: footprint and throughput) are free: a search for the
    longest context tries others.

    Raises:
        UsageError: a row is not, or there are too many kinds of questions.
    """
    names = {method.label: method.name for method in info.methods}
    expected = cache(info.expected_samples)
    for task, length, sample in _distinct(samples, ["task", "length_tokens", "sample"]):
        if not expected(task, length):
            _refuse(folder, f"{task} at {length} tokens")
        if sample >= expected(task, length):
            where = f"{task} at {length} tokens"
            _refuse(folder, f"sample {sample} of {where}, of which it asks for samples 0 to "
                            f"{expected(task, length) - 1}")  # fmt: skip
    for label, method, model in chain.from_iterable(_distinct(frame, _METHOD) for frame in (samples, *measured)):
        if names.get(label) != method:
            _refuse(folder, f"method {label} ({method})")
        if model != info.model:
            _refuse(folder, f"model {model}, where it asks for {info.model}")
    for label, model in _distinct(max_contexts, ["method_label", "model"]):
        if label not in names or model != info.model:
            _refuse(folder, f"method {label} of model {model}")
    kinds = len(_distinct(samples, ["task", "question_type"]))
    if kinds > MOST_QUESTION_TYPES:
        raise UsageError(
            f"{folder} holds {kinds:,} kinds of questions; at most {MOST_QUESTION_TYPES:,} can be reported."
        )


def _distinct(frame: "Rows", columns: list[str]) -> list[tuple[Any, ...]]:
    """The different values of some columns together, in the order in which they are first there."""
    if isinstance(frame, list):
        return list(dict.fromkeys(map(attrgetter(*columns), frame)))
    return list(dict.fromkeys(zip(*(frame[name].tolist() for name in columns), strict=True)))


def _refuse(folder: Path, what: str) -> None:
    raise UsageError(
        f"{folder} holds rows that its run.json does not ask for: {shortened(visible(what), most=300)}. Restore the "
        "folder from its source."
    )
