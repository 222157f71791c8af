"""Whether the rows of a folder are those that its run.json asks for."""

from functools import cache
from itertools import chain
from pathlib import Path

from kvscope.errors import UsageError
from kvscope.results.limits import MOST_QUESTION_TYPES
from kvscope.results.packed import Rows
from kvscope.results.plain_text import shortened, visible
from kvscope.results.run_schema import RunInfo


def refuse_strangers(rows: Rows, info: RunInfo, *, folder: Path) -> None:
    """Check that every row is of the run's model and methods, and every sample row of its tasks, lengths and prompts.

    Lengths of memory rows are free: a search for the longest context tries others.

    Raises:
        UsageError: a row is not, or there are too many kinds of questions.
    """
    names = {method.label: method.name for method in info.methods}
    expected = cache(info.expected_samples)
    kinds = set()
    for sample in rows.samples:
        kinds.add((sample.task, sample.question_type))
        if not expected(sample.task, sample.length_tokens):
            _refuse(folder, f"{sample.task} at {sample.length_tokens} tokens")
        if sample.sample >= expected(sample.task, sample.length_tokens):
            where = f"{sample.task} at {sample.length_tokens} tokens"
            _refuse(folder, f"sample {sample.sample} of {where}, of which it asks for samples 0 to "
                            f"{expected(sample.task, sample.length_tokens) - 1}")  # fmt: skip
    for row in chain(rows.samples, rows.footprints, rows.throughputs):
        if names.get(row.method_label) != row.method:
            _refuse(folder, f"method {row.method_label} ({row.method})")
        if row.model != info.model:
            _refuse(folder, f"model {row.model}, where it asks for {info.model}")
    for found in rows.max_contexts:
        if found.method_label not in names or found.model != info.model:
            _refuse(folder, f"method {found.method_label} of model {found.model}")
    if len(kinds) > MOST_QUESTION_TYPES:
        raise UsageError(
            f"{folder} holds {len(kinds):,} kinds of questions; at most {MOST_QUESTION_TYPES:,} can be reported."
        )


def _refuse(folder: Path, what: str) -> None:
    raise UsageError(
        f"{folder} holds rows that its run.json does not ask for: {shortened(visible(what), most=300)}. Restore the "
        "folder from its source."
    )
