"""Which question types pooled scores leave out: those the dense model cannot do, named in a file of its folder.

A type that dense answers in fewer than 60 % of prompts measures the model, not the cache method. The rule is fixed, the
prompts that decide it are drawn with training seeds, and the list is committed beside the weights before evaluation,
so nobody chooses types by the results they would improve. Every run copies the list into its ``run.json``; reports name
what they leave out, and the rows of such types are measured and kept all the same.

    kvscope backbone evaluate FOLDER -t long_qa -l 4k -l 8k -l 16k -l 32k -n 450 --seed 1000 --out dense.json
    kvscope backbone exclude-types dense.json --model FOLDER
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kvscope.errors import UsageError
from kvscope.results.run_schema import ExcludedType

EXCLUDED_FILE = "excluded_types.json"
LEAST_PERCENT = 60.0
#: Seeds from here on never evaluate: indexers are trained and types are excluded on them.
TRAINING_SEEDS_FROM = 1000


class ExclusionList(BaseModel):
    """The file: the types excluded, and everything that decided it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    least_percent: float
    """Accuracy of dense below which a type is excluded."""
    seeds: tuple[int, ...]
    """Training seeds of the prompts."""
    lengths_tokens: tuple[int, ...]
    """Lengths of the prompts."""
    dense_percent: dict[str, dict[str, float]]
    """Task -> question type -> accuracy of dense, mean over lengths."""
    excluded: tuple[ExcludedType, ...]
    """The types under ``least_percent``."""


def excluded_types(spec: str) -> tuple[ExcludedType, ...]:
    """Return what the folder of a model excludes; nothing where it says nothing, as for models of a hub.

    Raises:
        UsageError: the file cannot be read.
    """
    from kvscope.harness.engine.names import resolve_model

    path = Path(resolve_model(spec)[0]) / EXCLUDED_FILE
    if not path.is_file():
        return ()
    try:
        return ExclusionList.model_validate_json(path.read_text(encoding="utf-8")).excluded
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise UsageError(
            f"{path} is no list of excluded question types: make it again with `kvscope backbone exclude-types`."
        ) from error


def exclusion_list(rows: Sequence[Mapping[str, Any]], *, least_percent: float = LEAST_PERCENT) -> ExclusionList:
    """Apply the rule to rows of ``evaluate`` (dense, training seeds); tasks of one question type are left alone.

    Raises:
        UsageError: rows of an evaluation seed or without the haystack, or none of a task with several types.
    """
    found: dict[str, dict[str, list[tuple[float, int]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["seed"] < TRAINING_SEEDS_FROM:
            raise UsageError(
                f"These rows have seed {row['seed']}, which evaluates: types are excluded on training seeds "
                f"({TRAINING_SEEDS_FROM} and up)."
            )
        if row["closed_book"]:
            raise UsageError(
                "These rows are closed-book: types are excluded by what dense answers from the whole prompt."
            )
        types = row["accuracy_percent_by_type"]
        for kind, percent in types.items() if len(types) > 1 else ():
            # Samples go round the types, so each has this many or one more.
            found[row["task"]][kind].append((percent, row["samples"] // len(types)))
    if not found:
        raise UsageError("No row is of a task with several question types: evaluate long_qa.")
    dense: dict[str, dict[str, float]] = {}
    excluded = []
    for task, types in found.items():
        dense[task] = {}
        for kind, cells in types.items():
            n = sum(count for _, count in cells)
            percent = round(sum(each * count for each, count in cells) / n, 2)
            dense[task][kind] = percent
            if percent < least_percent:
                excluded.append(ExcludedType(task=task, question_type=kind, dense_percent=percent, n=n))
    return ExclusionList(
        least_percent=least_percent,
        seeds=tuple(sorted({row["seed"] for row in rows})),
        lengths_tokens=tuple(sorted({row["length_tokens"] for row in rows})),
        dense_percent=dense,
        excluded=tuple(excluded),
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows that ``kvscope backbone evaluate`` wrote.

    Raises:
        UsageError: the file cannot be read, or holds something else.
    """
    needed = {"task", "length_tokens", "samples", "seed", "closed_book", "accuracy_percent_by_type"}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} holds no rows of `kvscope backbone evaluate`.") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise UsageError(f"{path} holds no rows of `kvscope backbone evaluate`.")
    return rows
