"""What three more methods cost: the accuracy pass with four methods against the same pass with dense alone.

Both sides are ``kvscope.run`` on the same prompts, footprint off, in one process and in alternating order. The model is
loaded anew by every run; imports are done before.

    python benchmarks/shared_prefill.py
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import RESULTS, load_1min, machine, machine_lines, ratio_summary, say, wait_for_calm, write_result

import kvscope
from kvscope.harness.passes.sweep import failures
from kvscope.units import format_length, parse_length

ONE = ("dense",)
FOUR = ("dense", "sliding_window", "recency", "random")
TASKS = ("niah_single_1", "niah_multikey_2")
TARGET_RATIO = 1.6


def timed_run(methods: Sequence[str], *, length_tokens: int, samples: int, seed: int) -> dict[str, Any]:
    """Run one accuracy pass into a throw-away folder.

    Returns:
        Wall seconds, the seconds in prefills and in decodes as the rows say, decoded tokens, mean score of each method.

    Raises:
        RuntimeError: a cell failed, so the time means nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "methods": list(methods),
            "tasks": list(TASKS),
            "lengths_tokens": [length_tokens],
            "samples": samples,
            "seed": seed,
            "footprint": False,
            "device": "cpu",
            "batch": 1,  # seconds of shared steps would count for each of their answers
        }
        load = load_1min()
        started_s = time.perf_counter()
        run = kvscope.run(config, out=Path(folder) / "run", progress=False)
        wall_s = time.perf_counter() - started_s
    failed = failures(run)
    if failed:
        raise RuntimeError("; ".join(failed))
    rows = run.samples
    per_prompt = rows.groupby(["task", "sample"])["prefill_s"].first()
    return {
        "wall_s": round(wall_s, 3),
        "prefill_s": round(float(per_prompt.sum()), 3),
        "decode_s": round(float(rows["decode_s"].sum()), 3),
        "decode_tokens": int(rows["decode_tokens"].sum()),
        "score": {label: float(group["score"].mean()) for label, group in rows.groupby("method_label", sort=False)},
        "load_1min_before": load,
    }


def prompt_work_s(times: dict[str, Any]) -> float:
    """Return the seconds of one run spent in prefills and decodes."""
    return float(times["prefill_s"] + times["decode_s"])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Warm up, then alternate the two sides; the second repetition runs them in the other order, and so on."""
    settings = {"length_tokens": arguments.length, "samples": arguments.samples, "seed": arguments.seed}
    say("warm-up at 1K")
    timed_run(FOUR, length_tokens=1024, samples=1, seed=arguments.seed)
    waited_s = wait_for_calm(max_wait_s=arguments.max_wait_s)
    repetitions = []
    for index in range(arguments.repetitions):
        order = (("one", ONE), ("four", FOUR)) if index % 2 == 0 else (("four", FOUR), ("one", ONE))
        times: dict[str, Any] = {}
        for side, methods in order:
            times[side] = timed_run(methods, **settings)
            say(f"repetition {index + 1}: {side} {times[side]['wall_s']:.2f} s (load {load_1min():.2f})")
        times["ratio"] = times["four"]["wall_s"] / times["one"]["wall_s"]
        repetitions.append(times)
    ratio = ratio_summary([times["ratio"] for times in repetitions])
    # The same without what a run costs once (plan, model load, rows): that part dilutes the ratio of whole runs.
    bare = ratio_summary([prompt_work_s(times["four"]) / prompt_work_s(times["one"]) for times in repetitions])
    return {
        "benchmark": "shared_prefill",
        "command": f"python benchmarks/shared_prefill.py --length {format_length(arguments.length).lower()} "
        f"--samples {arguments.samples} --repetitions {arguments.repetitions} --seed {arguments.seed}",
        "model": "reference",
        "tasks": list(TASKS),
        "methods": list(FOUR),
        **settings,
        "target": f"at most {TARGET_RATIO}",
        "target_met": ratio["median"] <= TARGET_RATIO,
        "ratio": ratio,
        "ratio_prefill_and_decode": bare,
        "repetitions": repetitions,
        "waited_for_calm_s": waited_s,
        "environment": machine(),
    }


def markdown(result: dict[str, Any]) -> list[str]:
    """Return the result as Markdown lines."""
    ratio, bare = result["ratio"], result["ratio_prefill_and_decode"]
    lines = [
        "# Four methods against one, shared prefill",
        "",
        f"Accuracy pass with {', '.join(result['methods'])} over the pass with dense alone at "
        f"{format_length(result['length_tokens'])}: **{ratio['median']:.2f}x** (median of "
        f"{len(ratio['repetitions'])} repetitions, {ratio['min']:.2f} to {ratio['max']:.2f}); "
        f"target {result['target']}x: "
        f"{'met' if result['target_met'] else 'NOT met'}. Prefills and decodes alone: {bare['median']:.2f}x "
        f"({bare['min']:.2f} to {bare['max']:.2f}).",
        "",
        "| repetition | dense alone, s | four methods, s | ratio | prefill, s | decode, s | decoded tokens | "
        "load before |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for index, times in enumerate(result["repetitions"], start=1):
        one, four = times["one"], times["four"]
        lines.append(
            f"| {index} | {one['wall_s']:.2f} | {four['wall_s']:.2f} | {times['ratio']:.2f} | "
            f"{one['prefill_s']:.2f} / {four['prefill_s']:.2f} | {one['decode_s']:.2f} / {four['decode_s']:.2f} | "
            f"{one['decode_tokens']} / {four['decode_tokens']} | "
            f"{one['load_1min_before']:.2f} / {four['load_1min_before']:.2f} |"
        )
    lines += [
        "",
        "Pairs are dense alone / four methods. Wall time of `kvscope.run` in a warm process: plan, model load,",
        "prompts, prefills, decodes, rows on disk. Answers stop at newline or end of sequence, 128 tokens at most.",
        "",
        f"- {result['samples']} prompts each of {', '.join(result['tasks'])}; seed {result['seed']}; model reference, "
        "float32",
        *machine_lines(result["environment"]),
        f"- `{result['command']}`",
    ]
    return lines


def main() -> int:
    """Measure, write, and return 0 when the target is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=parse_length, default=8192, help="prompt + answer, as 8192 or 8k")
    parser.add_argument("--samples", type=int, default=2, help="prompts per task")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-wait-s", type=float, default=0.0, help="longest wait for a calm machine")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    arguments = parser.parse_args()
    result = measure(arguments)
    write_result("shared_prefill", result, markdown(result), folder=arguments.out)
    say(f"ratio {result['ratio']['median']:.2f} ({result['ratio']['min']:.2f} to {result['ratio']['max']:.2f})")
    return 0 if result["target_met"] else 1


if __name__ == "__main__":
    sys.exit(main())
