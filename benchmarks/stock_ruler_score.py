"""Scores of answers to lm-eval's RULER prompts, by lm-eval's own scorer, and the table of them."""

import json
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stock_ruler_prompts import MANIFEST, TASKS, file_name, read_lines, read_manifest

import kvscope
from kvscope.errors import UsageError
from kvscope.results.frames import records
from kvscope.results.share import prompt_shares
from kvscope.results.statistics import mean_interval
from kvscope.tasks.base import text_sha256
from kvscope.units import format_length

TABLE_CHARACTERS = 100


def label_of(task: str, nominal_tokens: int) -> str:
    """Return what a run's rows call a cell, behind ``jsonl:``."""
    return f"{task}-{nominal_tokens}"


def cell_of(row_task: str) -> tuple[str, int]:
    """Return the (task, nominal length) of a row, by what it calls its task."""
    task, _, length = row_task.removeprefix("jsonl:").rpartition("-")
    return task, int(length)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One row with the stock score.

    Attributes:
        task, nominal_tokens: the cell.
        method: the label.
        prompt: the line of the prompts' file.
        text: what was generated.
        score: the stock scorer's, 0 to 1.
        stop_reason: why it ended.
        held_of_dense: bytes held over dense's, lsa's share as docs/results.md defines it.
    """

    task: str
    nominal_tokens: int
    method: str
    prompt: Mapping[str, Any]
    text: str
    score: float
    stop_reason: str
    held_of_dense: float


def stock_score(line: Mapping[str, Any], text: str) -> float:
    """Score a generation as lm-eval's RULER tasks do."""
    from lm_eval.tasks.ruler.common_utils import process_results

    max_length = line["meta"]["max_length"]
    found = process_results({"max_length": max_length, "outputs": line["answers"]}, [text])
    return float(found[str(max_length)])


def answers(run: "kvscope.Run", prompts: Path) -> Iterator[Answer]:
    """Yield every answer of a run with its stock score, in the order of the prompts.

    Raises:
        SystemExit: a row was not answered, or its prompt is not that of the file.
    """
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    samples = run.samples.assign(held_of_dense=prompt_shares(run.samples))
    for row in sorted(records(samples), key=lambda row: int(row["sample"])):  # rows come as answers end
        cell = cell_of(row["task"])
        where = f"{cell[0]} at {cell[1]}, prompt {row['sample']}, {row['method_label']}"
        if row["status"] != "ok":
            raise SystemExit(f"{where} is {row['status']}: {row['reason']}. Answer again: the same command goes on.")
        if cell not in lines:
            lines[cell] = read_lines(prompts / file_name(*cell))
        line = lines[cell][row["sample"]]
        if row["prompt_tokens"] != line["meta"]["prompt_tokens"]:
            raise SystemExit(
                f"{where} has {row['prompt_tokens']:,} tokens, and lm-eval counted {line['meta']['prompt_tokens']:,}: "
                "the prompts were sized for another tokenizer. Build them with --tokenizer of this model."
            )
        if row["prompt_sha256"] != text_sha256(line["prompt"]):
            raise SystemExit(
                f"{where} is another prompt than that of {prompts}: score by the folder that was answered."
            )
        yield Answer(
            task=cell[0],
            nominal_tokens=cell[1],
            method=row["method_label"],
            prompt=line,
            text=row["output"],
            score=stock_score(line, row["output"]),
            stop_reason=row["stop_reason"],
            held_of_dense=row["held_of_dense"],
        )


def score(run: "kvscope.Run", prompts: Path, *, label: str, command: Sequence[str], failed: int = 0) -> dict[str, Any]:
    """Return the scores of a run as plain values.

    Args:
        prompts: folder of the prompts that it answered.
        label: what tables call the model.
        command: what was called, for the record.
        failed: failed generations kept of each cell, to look at.
    """
    by_cell: dict[tuple[str, int, str], list[Answer]] = defaultdict(list)
    for answer in answers(run, prompts):
        by_cell[answer.task, answer.nominal_tokens, answer.method].append(answer)
    manifest = read_manifest(prompts)
    info = run.info
    return {
        "label": label,
        "model": info.model,
        "lm_eval": manifest["lm_eval"],
        "scored_by_lm_eval": version("lm_eval"),
        "prompts": {key: manifest[key] for key in ("random_seed", "numpy_seed", "tokenizer_sha256", "packages")},
        "prompt_hashes": {
            cell["file"]: cell["sha256"]
            for cell in manifest["cells"]
            if any((cell["task"], cell["nominal_tokens"]) == key[:2] for key in by_cell)
        },
        "command": shlex.join(command),
        "run": {"started_utc": info.started_utc, "identity": info.identity, "environment": info.environment},
        "cells": [_cell(key, found, failed) for key, found in sorted(by_cell.items(), key=_order)],
    }


def _order(item: tuple[tuple[str, int, str], Any]) -> tuple[int, int, str]:
    task, nominal_tokens, method = item[0]
    return TASKS.index(task), nominal_tokens, method


def _cell(key: tuple[str, int, str], found: Sequence[Answer], failed: int) -> dict[str, Any]:
    tokens = [answer.prompt["meta"]["prompt_tokens"] for answer in found]
    interval = mean_interval([answer.score for answer in found])
    ends = {reason: sum(answer.stop_reason == reason for answer in found) for reason in ("eos", "length")}
    values: dict[str, Any] = {
        "task": key[0],
        "nominal_tokens": key[1],
        "method": key[2],
        "n": len(found),
        "score_percent": round(100 * interval.mean, 2),
        "interval_95_percent": [None if end is None else round(100 * end, 2) for end in (interval.low, interval.high)],
        "interval_kind": interval.kind,
        "prompt_tokens": {"min": min(tokens), "mean": round(sum(tokens) / len(tokens), 1), "max": max(tokens)},
        "ends": ends,
        "held_percent_of_dense": round(100 * sum(answer.held_of_dense for answer in found) / len(found), 2),
    }
    if failed:
        wrong = [answer for answer in found if answer.score < 1][:failed]
        values["failed"] = [
            {
                "sample": answer.prompt["id"],
                "expected": answer.prompt["answers"],
                "said": answer.text,
                "score": answer.score,
            }
            for answer in wrong
        ]
    return values


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table: a row a (task, length), a column a method of each result.

    Intervals are left out where the table would be wider than ``TABLE_CHARACTERS``.

    Raises:
        SystemExit: it is too wide without them, too, or two results measured different prompts.
    """
    _require_same_prompts(results)
    for with_interval in (True, False):
        lines = _lines(results, with_interval=with_interval)
        if max(map(len, lines)) <= TABLE_CHARACTERS:
            return lines
    raise SystemExit(
        f"The table would be {max(map(len, lines))} characters wide, and {TABLE_CHARACTERS} are allowed: make one of "
        "fewer results, or shorten their --label."
    )


def _require_same_prompts(results: Sequence[Mapping[str, Any]]) -> None:
    seen: dict[str, str] = {}
    for result in results:
        for name, sha256 in result["prompt_hashes"].items():
            if seen.setdefault(name, sha256) != sha256:
                raise SystemExit(
                    f"{result['label']} answered other prompts of {name}: build {MANIFEST} and answer again."
                )


def _lines(results: Sequence[Mapping[str, Any]], *, with_interval: bool) -> list[str]:
    columns: dict[tuple[int, str], str] = {}
    cells: dict[tuple[str, int], dict[tuple[int, str], Mapping[str, Any]]] = defaultdict(dict)
    for place, result in enumerate(results):
        for cell in result["cells"]:
            named = cell["method"] if len(results) == 1 else f"{result['label']} {cell['method']}"
            columns[place, cell["method"]] = named
            cells[cell["task"], cell["nominal_tokens"]][place, cell["method"]] = cell
    order = sorted(columns, key=lambda column: (column[0], column[1] != "dense", column[1]))
    lines = ["| task | length | tokens | n | " + " | ".join(columns[column] for column in order) + " |"]
    lines.append("|---|---|---|---|" + "---|" * len(order))
    for (task, nominal_tokens), found in sorted(cells.items(), key=lambda item: (TASKS.index(item[0][0]), item[0][1])):
        any_cell = next(iter(found.values()))
        tokens = any_cell["prompt_tokens"]
        span = f"{tokens['min']:,}" if tokens["min"] == tokens["max"] else f"{tokens['min']:,}-{tokens['max']:,}"
        n = "/".join(dict.fromkeys(str(cell["n"]) for cell in found.values()))
        texts = [_text(found.get(column), with_interval=with_interval) for column in order]
        lines.append(f"| {task} | {format_length(nominal_tokens)} | {span} | {n} | " + " | ".join(texts) + " |")
    return lines


def _text(cell: Mapping[str, Any] | None, *, with_interval: bool) -> str:
    if cell is None:
        return "-"
    low, high = cell["interval_95_percent"]
    text = f"{cell['score_percent']:.1f}"
    return text if not with_interval or low is None else f"{text} [{low:.1f}, {high:.1f}]"


def read_result(path: Path) -> dict[str, Any]:
    """Return a file that ``score`` wrote.

    Raises:
        UsageError: it is none.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: give a file that `score` wrote.") from error
    return found
