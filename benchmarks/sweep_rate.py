"""Rows a second of the accuracy pass, of this build and of another one beside it, on one machine.

A process takes its time to start, to load and to compile, whatever it answers: each build runs twice, with few samples
and with many, and the rate is that of what lies between. The first run of all is not counted: kernels compile.

    python benchmarks/sweep_rate.py --other ../kvscope-before --out rate.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from kvscope.harness.passes.environment import capture_environment

NINE = ("dense", "lsa", "sliding_window", "recency", "random", "quest", "moba", "msa", "dsa")
CASES: dict[str, dict[str, Any]] = {
    "nine methods, 16K": {"methods": NINE, "lengths": ("16k",)},
    "dense and lsa, 16K and 32K": {"methods": ("dense", "lsa"), "lengths": ("16k", "32k")},
}
TASKS = ("niah_single_1", "niah_multikey_2", "vt", "niah_multivalue")
ROOT = Path(__file__).resolve().parent.parent


def command(case: dict[str, Any], samples: int, out: Path) -> list[str]:
    """Return the arguments of ``kvscope run``."""
    found = ["run", "--model", "reference", "--no-footprint", "--no-report", "--samples", str(samples)]
    for name in ("methods", "lengths"):
        found += [item for value in case[name] for item in (f"--{name.removesuffix('s')}", value)]
    return [*found, *(item for task in TASKS for item in ("--task", task)), "--out", str(out)]


def run(tree: Path, case: dict[str, Any], samples: int) -> tuple[float, int]:
    """Run a build; return seconds and rows.

    Raises:
        CalledProcessError: it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        code = f"import sys; sys.argv[1:] = {command(case, samples, out)!r}; from kvscope.cli import main; main()"
        path = os.pathsep.join(filter(None, (str(tree / "src"), os.environ.get("PYTHONPATH"))))
        started_s = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", code], cwd=tree, env={**os.environ, "PYTHONPATH": path}, check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        seconds = time.perf_counter() - started_s
        rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        failed = [row for row in rows if row["status"] != "ok"]
        if failed:
            raise SystemExit(f"{len(failed)} of {len(rows)} rows failed, the first: {failed[0]['reason']}")
        return seconds, len(rows)


def rate(tree: Path, case: dict[str, Any], few: int, many: int) -> dict[str, Any]:
    """Return the rate of a build between two numbers of samples, and what it is made of."""
    (few_s, few_rows), (many_s, many_rows) = run(tree, case, few), run(tree, case, many)
    found = {"samples": [few, many], "seconds": [few_s, many_s], "rows": [few_rows, many_rows]}
    return {**found, "rows_per_s": (many_rows - few_rows) / (many_s - few_s)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="tree of the other build")
    parser.add_argument("--samples", type=int, nargs=2, default=(8, 40), help="few and many, of this build")
    parser.add_argument("--other-samples", type=int, nargs=2, default=(1, 3), help="few and many, of the other")
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for name in options.case or CASES:
        case = CASES[name]
        results[name] = {}
        for build, tree, samples in (("this", ROOT, options.samples), ("other", options.other, options.other_samples)):
            run(tree, case, 1)
            found = results[name][build] = rate(tree, case, *samples)
            print(f"{name}, {build} build: {found['rows_per_s']:.2f} rows/s", flush=True)
            if build == "other":
                results[name]["ratio"] = results[name]["this"]["rows_per_s"] / found["rows_per_s"]
            about = {"command": " ".join(sys.argv), "environment": capture_environment(device=options.device)}
            options.out.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
