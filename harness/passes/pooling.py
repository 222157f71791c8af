"""Which question types pooled scores leave out: those the dense model cannot do, named in a file of its folder.

A type that dense answers in fewer than 60 % of prompts measures the model, not the cache method. The rule is fixed, the
prompts that decide it are drawn with training seeds, and the list is committed beside the weights before evaluation,
so nobody chooses types by the results they would improve. Every run copies the list into its ``run.json``; reports name
what they leave out, and the rows of such types are measured and kept all the same.

    python -m kvscope.harness.reference_model.evaluate FOLDER --tasks long_qa --lengths 4096,8192,16384,32768 \
        --samples 450 --seed 1000 --out dense.json
    python -m kvscope.harness.passes.pooling dense.json --model FOLDER
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kvscope.errors import KvscopeError, UsageError
from kvscope.results.schema import ExcludedType

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
            f"{path} is no list of excluded question types: make it again with `python -m "
            "kvscope.harness.passes.pooling`."
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


def main(argv: Sequence[str] | None = None) -> int:
    """Write the list of a model folder from rows that ``evaluate`` wrote."""
    parser = argparse.ArgumentParser(prog="kvscope.harness.passes.pooling", description=str(__doc__).split("\n")[0])
    parser.add_argument("rows", type=Path, help="JSON rows of kvscope.harness.reference_model.evaluate")
    parser.add_argument("--model", type=Path, required=True, help="model folder that gets the list")
    args = parser.parse_args(argv)
    try:
        if not (args.model / "config.json").is_file():
            raise UsageError(f"{args.model} is no model folder: it has no config.json.")
        try:
            rows = json.loads(args.rows.read_text(encoding="utf-8"))
            made = exclusion_list(rows)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"{args.rows} holds no rows of `kvscope.harness.reference_model.evaluate`.") from error
    except KvscopeError as error:
        sys.stderr.write(f"kvscope: {error}\n")
        return error.exit_code
    (args.model / EXCLUDED_FILE).write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
    for each in made.excluded:
        sys.stdout.write(f"{each.sentence}\n")
    sys.stdout.write(f"{len(made.excluded)} question types excluded; {args.model / EXCLUDED_FILE}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
