"""One process of this build against many of another one, side by side on one GPU: whole times, starts included.

python benchmarks/one_against_many.py --other ../kvscope-before --processes 15 --samples 3 --out many.json
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
from kvscope.harness.passes.mps import multi_process_service

TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt")
METHODS = ("dense", "lsa")
LENGTHS = ("16k", "32k")
ROOT = Path(__file__).resolve().parent.parent


def start(tree: Path, out: Path, *, samples: int, seed: int, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Start a run of a build."""
    found = ["run", "--model", "reference", "--no-footprint", "--no-report", "--out", str(out)]
    found += ["--samples", str(samples), "--seed", str(seed)]
    for name, values in (("--method", METHODS), ("--task", TASKS), ("--length", LENGTHS)):
        found += [item for value in values for item in (name, value)]
    code = f"import sys; sys.argv[1:] = {found!r}; from kvscope.cli import main; main()"
    path = os.pathsep.join(filter(None, (str(tree / "src"), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=tree, env={**os.environ, **environment, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip


def timed(tree: Path, *, processes: int, samples: int, environment: dict[str, str]) -> dict[str, float]:
    """Run a build in so many processes, each with its own seed; return rows and seconds.

    Raises:
        SystemExit: one failed, or a row did.
    """
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder, str(seed)) for seed in range(processes)]
        since_s = time.perf_counter()
        running = [
            start(tree, out, samples=samples, seed=seed, environment=environment) for seed, out in enumerate(outs)
        ]
        codes = [process.wait() for process in running]
        took_s = time.perf_counter() - since_s
        rows = [json.loads(line) for out in outs for line in (out / "samples.jsonl").read_text().splitlines()]
    if any(codes) or any(row["status"] != "ok" for row in rows):
        raise SystemExit(f"exit codes {codes}, {sum(row['status'] != 'ok' for row in rows)} rows failed")
    return {"processes": processes, "rows": len(rows), "seconds": round(took_s, 2), "rows_per_s": len(rows) / took_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, required=True, help="tree of the other build")
    parser.add_argument("--processes", type=int, default=15)
    parser.add_argument("--samples", type=int, default=3, help="prompts a task and length of each of these")
    parser.add_argument("--compiled", action="store_true", help="kernels of both builds are in the cache: no run ahead")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found: dict[str, Any] = {
        "about": {"command": " ".join(sys.argv), "environment": capture_environment(device="cuda")}
    }

    def note(build: str, seen: dict[str, float]) -> None:
        found[build] = seen
        print(f"{build} build", seen, flush=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    if not options.compiled:
        timed(ROOT, processes=1, samples=1, environment={})
    note("this", timed(ROOT, processes=1, samples=options.samples * options.processes, environment={}))
    with multi_process_service() as environment:
        if not options.compiled:
            timed(options.other, processes=1, samples=1, environment=environment)
        many = timed(options.other, processes=options.processes, samples=options.samples, environment=environment)
    found["ratio"] = found["this"]["rows_per_s"] / many["rows_per_s"]
    note("other", many)


if __name__ == "__main__":
    main()
