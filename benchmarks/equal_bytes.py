"""All methods at equal bytes on one model: accuracy, bytes held and read, time; and what knowing the question gives.

    python benchmarks/equal_bytes.py plan                                    # prompts, rows, cells: runs nothing
    python benchmarks/equal_bytes.py run --work runs/equal --jobs 12 --time-limit 540    # again until it says done
    python benchmarks/equal_bytes.py result --work runs/equal --out benchmarks/results/equal_bytes.json

``equal_bytes.yaml`` has methods, tasks, lengths, samples and the seed. There are three steps, in two run folders:

- ``accuracy``, folder ``known``: all methods on one prefill a prompt. The method begins at the prompt's last token, so
  the question is in what a method chooses by.
- ``question``, folder ``unknown``: the same prompts with ``--method-from question`` for the methods that choose at the
  prompt's end, and what they stand against.
- ``times``, folder ``known``: the footprint pass, a process a cell. Times of the accuracy pass are those of shared
  steps, and are quoted nowhere. It measures what has no share, and one share of each method.

Every step resumes. The report of ``known`` has table and figure (``equal_bytes``).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from measure import ended, rounded, say

from kvscope.errors import UsageError
from kvscope.harness.passes.config import RunConfig, make_config
from kvscope.reports.cells import accuracy_cells
from kvscope.reports.shares import share_cells, without_share
from kvscope.results.frames import Run, load_run, records
from kvscope.results.joining import join
from kvscope.results.statistics import paired_difference
from kvscope.results.store import RUN_FILE

CONFIG = Path(__file__).with_suffix(".yaml")
STEPS = ("accuracy", "question", "times")
FOLDERS = {"accuracy": "known", "question": "unknown", "times": "known"}
#: Methods whose choice depends on what the end of the prompt asks, what chooses blindly, and lsa.
CHOOSE_AT_THE_END = (
    "dense", "recency", "snapkv", "pyramidkv", "adakv", "expected_attention", "knorm", "tova", "h2o", "lsa",
)  # fmt: skip
TIMED_SHARE = 0.135
#: Least seconds that a call is begun with.
LEAST_CALL_S = 30.0
#: Steps of a footprint cell: more than a captured step needs to settle.
DECODE_TOKENS = 65


def read_config(changes: dict[str, Any], path: Path = CONFIG) -> dict[str, Any]:
    """Return the recipe with some keys changed."""
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values | {key: value for key, value in changes.items() if value is not None}


def step_values(step: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of one step."""
    methods = list(values["methods"])
    if step == "question":
        chosen = [each for each in methods if each.partition(":")[0] in CHOOSE_AT_THE_END and "kv=" not in each]
        return values | {"methods": chosen, "method_from": "question"}
    if step == "times":
        # msa has one share, which is its least.
        chosen = [each for each in methods if without_share(each)[2] in (None, TIMED_SHARE) or each.startswith("msa")]
        once = {"samples": 1, "tasks": [values["tasks"][0]], "footprint": True, "jobs": 1}
        return values | once | {"methods": chosen, "footprint_decode_tokens": DECODE_TOKENS}
    # What decides a footprint's rows must be the same in one folder.
    return values | {"footprint_decode_tokens": DECODE_TOKENS}


def checked(values: dict[str, Any]) -> RunConfig:
    """Return the configuration, refused where ``kvscope run`` would refuse it."""
    return make_config(values, source=CONFIG.name)


def plan_lines(values: dict[str, Any]) -> Iterator[str]:
    """What each step has to do."""
    for step in STEPS:
        config = checked(step_values(step, values))
        lengths = ", ".join(f"{n:,}" for n in config.lengths_tokens)
        if step == "times":
            n_cells = len(config.methods) * len(config.lengths_tokens)
            yield f"{step}: {len(config.methods)} methods x {lengths} tokens = {n_cells} cells, a process each"
            continue
        n_prompts = len(config.tasks) * config.samples
        total = n_prompts * len(config.lengths_tokens)
        tokens = n_prompts * sum(config.lengths_tokens)
        yield (
            f"{step}: {n_prompts} prompts at each of {lengths} tokens, {len(config.methods)} methods: {total:,} "
            f"prefills of {tokens:,} tokens, {total * len(config.methods):,} answers"
        )


def run_step(step: str, values: dict[str, Any], work: Path, *, left_s: float) -> float:
    """Run one step as ``kvscope run`` until it is done or the time is over; return the seconds it took.

    Raises:
        SystemExit: the run failed.
    """
    folder = work / FOLDERS[step]
    work.mkdir(parents=True, exist_ok=True)
    path = work / f"{step}.yaml"
    path.write_text(yaml.safe_dump(step_values(step, values), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-c", "import sys; from kvscope.cli import main; sys.exit(main())"]
    command += ["run", str(path), "--out", str(folder), "--time-limit", str(round(left_s)), "--quiet"]
    started_s = time.monotonic()
    done = subprocess.run(command, check=False, env=os.environ)
    if done.returncode:
        raise SystemExit(f"step {step} ended with {done.returncode}")
    return time.monotonic() - started_s


def is_done(step: str, values: dict[str, Any], work: Path) -> bool:
    """Whether a step has every row it asks for."""
    folder = work / FOLDERS[step]
    if not (folder / RUN_FILE).exists():
        return False
    config, run = checked(step_values(step, values)), load_run(folder)
    labels = {str(spec.label) for spec in config.methods}
    if step == "times":
        rows = run.footprint
        return len(rows) >= len(labels) * len(config.lengths_tokens)
    asked = len(labels) * len(config.tasks) * len(config.lengths_tokens) * config.samples
    return len(run.samples) >= asked


def question_rows(known: Run, unknown: Run) -> list[dict[str, Any]]:
    """Accuracy with the question unknown and known to the choice, by method and length, on the same prompts."""
    joined = join(unknown, known)
    found = []
    for (label, _), table in zip(joined.pairs, joined.tables, strict=True):
        setting, _, share = without_share(label)
        for length, rows in table.groupby("length_tokens"):
            clusters = None if rows["context_id"].isna().all() else rows["context_id"].tolist()
            paired = paired_difference(
                rows["score_method"].to_numpy(float), rows["score_baseline"].to_numpy(float), clusters=clusters
            )
            found.append(
                {
                    "length_tokens": int(length),
                    "method": setting,
                    "asked_share": share,
                    "n": len(rows),
                    "accuracy_question_unknown": float(rows["score_baseline"].mean()),
                    "accuracy_question_known": float(rows["score_method"].mean()),
                    "known_minus_unknown": paired.difference.mean,
                    "difference_low": paired.difference.low,
                    "difference_high": paired.difference.high,
                }
            )
    return sorted(found, key=lambda row: (row["length_tokens"], row["asked_share"] or 0, row["method"]))


def result_of(work: Path) -> dict[str, Any]:
    """Return tables of what there is, and the machine."""
    known = load_run(work / FOLDERS["accuracy"])
    cells = records(share_cells(known, accuracy_cells(known)))
    far = [
        f"{row['method_label']} at {row['length_tokens']:,}: {100 * row['held_of_dense']:.1f} %"
        for row in cells
        if row["asked_of"] == "held" and abs(row["held_of_dense"] - row["asked_share"]) > 0.1 * row["asked_share"]
    ]
    result = {
        "benchmark": "equal_bytes",
        "environment": known.info.environment,
        "config": known.info.config,
        "cells": cells,
        "held_more_than_a_tenth_off": far,
    }
    unknown = work / FOLDERS["question"]
    if (unknown / RUN_FILE).exists():
        result["question"] = question_rows(known, load_run(unknown))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; return 0 when everything asked for is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("plan", "run", "result"))
    parser.add_argument("--work", type=Path, default=Path("runs/equal"))
    parser.add_argument("--out", type=Path, help="JSON that `result` writes")
    parser.add_argument("--step", choices=STEPS, action="append", help="default: all, in turn")
    parser.add_argument("--time-limit", type=float, default=3600.0, help="seconds")
    parser.add_argument("--model")
    parser.add_argument("--device")
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--samples", type=int, help="prompts a task and length")
    parser.add_argument("--length", action="append", help="instead of the recipe's; repeatable")
    parser.add_argument("--task", action="append", help="instead of the recipe's; repeatable")
    given = parser.parse_args(arguments)
    if not given.time_limit > 0 or math.isinf(given.time_limit):
        raise UsageError(f"--time-limit {given.time_limit}: give seconds above 0.")
    values = read_config(
        {
            "model": given.model,
            "device": given.device,
            "jobs": given.jobs,
            "samples": given.samples,
            "lengths_tokens": given.length,
            "tasks": given.task,
        }
    )
    if given.do == "plan":
        for line in plan_lines(values):
            say(line)
        return 0
    if given.do == "run":
        return run_all(given.step or list(STEPS), values, given.work, limit_s=given.time_limit)
    text = json.dumps(rounded(result_of(given.work)), indent=1) + "\n"
    if given.out is None:
        sys.stdout.write(text)
    else:
        given.out.write_text(text, encoding="utf-8")
    return 0


def run_all(steps: Sequence[str], values: dict[str, Any], work: Path, *, limit_s: float) -> int:
    """Run steps in turn; return 0 when all are done."""
    started_s = time.monotonic()
    for step in steps:
        left_s = limit_s - (time.monotonic() - started_s)
        if is_done(step, values, work):
            say(f"{step}: done before")
            continue
        if left_s < LEAST_CALL_S:
            say(f"{step}: no time left; the same command continues")
            return 1
        took_s = run_step(step, values, work, left_s=left_s)
        if not is_done(step, values, work):
            say(f"{step}: {took_s:.0f} s, not done; the same command continues")
            return 1
        say(f"{step}: done, {took_s:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
