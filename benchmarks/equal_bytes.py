"""All methods at equal bytes on one model: accuracy, bytes held and read, time; and what knowing the question gives.

    python benchmarks/equal_bytes.py plan                                    # prompts, rows, cells: runs nothing
    python benchmarks/equal_bytes.py run --work runs/equal --jobs 12 --time-limit 540    # again until it says done
    python benchmarks/equal_bytes.py pack --work runs/equal --out results/reference/CARD/equal-bytes
    python benchmarks/equal_bytes.py result --run results/reference/CARD/equal-bytes --out equal_bytes.json

``equal_bytes.yaml`` has methods, tasks, lengths, samples and the seed. There are three steps, in two run folders:

- ``accuracy``, folder ``known``: all methods on one prefill a prompt. The method begins at the prompt's last token, so
  the question is in what a method chooses by.
- ``question``, folder ``unknown``: the same prompts with ``--method-from question`` for the methods that choose at the
  prompt's end, and what they stand against.
- ``times``, folder ``known``: the footprint pass, a process a cell. Times of the accuracy pass are those of shared
  steps, and are quoted nowhere. It measures what has no share, and one share of each method.

Every step resumes. ``pack`` keeps the lengths that are whole, and ``run --start PACKED`` goes on from them elsewhere
where model, device and recipe are the same. ``result`` has tables of whole lengths and lists what is not measured. The
report of ``known``, packed or not, has table and figure (``equal_bytes``).
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
from equal_bytes_results import (
    KNOWN,
    UNKNOWN,
    UNKNOWN_ENDING,
    amounts,
    begun,
    found_runs,
    pack,
    start_from,
    tables,
    whole_lengths,
)
from measure import ended, is_over, rounded, say

from kvscope.errors import UsageError
from kvscope.files import whole_file
from kvscope.harness.passes.config import RunConfig, make_config
from kvscope.reports.shares import without_share
from kvscope.results.frames import Run, load_run

CONFIG = Path(__file__).with_suffix(".yaml")
STEPS = ("accuracy", "question", "times")
FOLDERS = {"accuracy": KNOWN, "question": UNKNOWN, "times": KNOWN}
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
    limit_s = math.floor(left_s)
    command += ["run", str(path), "--out", str(folder), "--time-limit", str(limit_s), "--quiet", "--no-report"]
    started_s = time.monotonic()
    done = subprocess.run(command, check=False, env=os.environ)
    took_s = time.monotonic() - started_s
    if done.returncode and not is_over(done.returncode, took_s=took_s, limit_s=limit_s):
        raise SystemExit(f"step {step} ended with {done.returncode}")
    return took_s


def counts_of(step: str, values: dict[str, Any], run: Run | None) -> list[dict[str, Any]]:
    """Return for every length how many rows a step asks for, and how many there are."""
    return amounts(checked(step_values(step, values)), run, footprints=step == "times")


def is_done(step: str, values: dict[str, Any], work: Path) -> bool:
    """Whether a step has every row it asks for."""
    folder = work / FOLDERS[step]
    counts = counts_of(step, values, load_run(folder) if begun(folder) else None)
    return len(whole_lengths(counts)) == len(counts)


def result_of(runs: dict[str, Run], values: dict[str, Any]) -> dict[str, Any]:
    """Return tables of the lengths that are whole, the machine, and what is not measured."""
    counts = {step: counts_of(step, values, runs.get(FOLDERS[step])) for step in STEPS}
    lengths = {step: whole_lengths(found) for step, found in counts.items()}
    both = [n for n in lengths["question"] if n in lengths["accuracy"]]
    known = runs[KNOWN]
    return {
        "benchmark": "equal_bytes",
        "environment": known.info.environment,
        "config": known.info.config,
        "not_measured": [
            {"step": step, **count}
            for step, found in counts.items()
            for count in found
            if count["length_tokens"] not in lengths[step]
        ],
        **tables(known, runs.get(UNKNOWN), lengths=lengths["accuracy"], question_lengths=both),
    }


def pack_all(work: Path, out: Path, values: dict[str, Any]) -> None:
    """Pack what is whole of both run folders; say what it takes."""
    for step, place in (("accuracy", out), ("question", out.with_name(out.name + UNKNOWN_ENDING))):
        folder = work / FOLDERS[step]
        if step == "question" and not begun(folder):
            continue
        run = load_run(folder)
        lengths = whole_lengths(counts_of(step, values, run))
        asked = " ".join(f"--{key} {run.info.config[key]}" for key in ("device", "jobs"))
        command = f"python benchmarks/{Path(__file__).name} run --work DIR --step {step} {asked}"
        size_bytes = pack(folder, place, lengths=lengths, command=command)
        say(f"{place}: {', '.join(f'{n:,}' for n in lengths)} tokens, {size_bytes:,} bytes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; return 0 when everything asked for is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("plan", "run", "pack", "result"))
    parser.add_argument("--work", type=Path, default=Path("runs/equal"))
    parser.add_argument("--start", type=Path, metavar="PACKED", help="what `run` begins with, where it has not begun")
    parser.add_argument(
        "--run", type=Path, action="append", metavar="FOLDER", help="run of `result`, packed or not; default: --work's"
    )
    parser.add_argument("--out", type=Path, help="JSON that `result` writes, folder that `pack` writes")
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
        if given.start is not None:
            start_from(given.start, given.work, tell=say)
        return run_all(given.step or list(STEPS), values, given.work, limit_s=given.time_limit)
    if given.do == "pack":
        if given.out is None:
            raise UsageError("Say where the packed run goes: --out DIR.")
        pack_all(given.work, given.out, values)
        return 0
    result = result_of(found_runs(given.run or [], given.work), values)
    text = json.dumps(rounded(result), indent=1) + "\n"
    if given.out is None:
        sys.stdout.write(text)
        return 0
    with whole_file(given.out) as path:
        path.write_text(text, encoding="utf-8")
    for lacking in result["not_measured"]:
        say("not measured: {step} at {length_tokens:,} tokens, {rows_there:,} of {rows_asked:,} rows".format(**lacking))
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
