"""Rows a second of the accuracy pass on 1, 2, ... GPUs of one host, and whether its rows stay the same.

Starts and compilations are not what more GPUs change: the rate is that between two marks of the written rows. The whole
time stands beside it. A further run on the most GPUs has fewer samples, and a worker of it is killed on the way.

    python benchmarks/multi_gpu.py --gpus 1 --gpus 2 --jobs 3 --out multi_gpu.json
    python benchmarks/multi_gpu.py --case gemma-16k --model FOLDER --gpus 1 --gpus 2 --out multi_gpu.json
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import psutil

from kvscope.harness.passes.environment import capture_environment
from kvscope.results.columns import SURROUNDINGS_COLUMNS, TIME_COLUMNS

NINE = ("dense", "lsa", "sliding_window", "recency:budget_fraction=0.135", "random:budget_fraction=0.135",
        "quest", "moba", "msa", "dsa")  # fmt: skip
OF_METHODS = ("niah_multikey_2", "niah_multikey_3", "niah_multivalue", "vt", "long_qa")
CASES: dict[str, dict[str, Any]] = {
    "methods-16k": {"method": NINE, "task": OF_METHODS, "length": ("16k",), "samples": 72},
    "methods-64k": {"method": NINE, "task": OF_METHODS, "length": ("64k",), "samples": 27},
    "gemma-4k": {
        "method": ("dense", "msa", "quest", "moba", "recency:budget_fraction=0.135"),
        "task": ("niah_single_1", "niah_multikey_2", "vt"), "length": ("4k",), "samples": 60,
    },
    "gemma-16k": {
        "method": ("dense", "lsa:indexer=landmark", "quest", "msa", "moba", "recency", "random"),
        "task": ("niah_single_1", "niah_multikey_2", "niah_multivalue", "long_qa"), "length": ("16k",), "samples": 54,
    },
}  # fmt: skip
#: The rate is of the rows between these shares of all.
FROM, TO = 0.15, 0.9
KILLED_AT = 0.4
POLL_S = 0.1
WORKER = "kvscope.harness.passes.shard_worker"


@dataclass
class Watch:
    """What is seen of a run from outside.

    Attributes:
        marks: (seconds, rows written).
        gpu_percent: of each look, busy shares of the GPUs used.
        cores_busy: of each look, of the whole host.
        writer_cores: of each look, of the process that writes.
    """

    marks: list[tuple[float, int]] = field(default_factory=list)
    gpu_percent: list[list[int]] = field(default_factory=list)
    cores_busy: list[float] = field(default_factory=list)
    writer_cores: list[float] = field(default_factory=list)
    killed: bool = False


def command(case: dict[str, Any], *, model: str, n_gpus: int, jobs: int, out: Path) -> list[str]:
    """Return the command of a run."""
    found = ["run", "--model", model, "--no-footprint", "--no-report", "--samples", str(case["samples"])]
    found += ["--gpus", ",".join(map(str, range(n_gpus))), "--jobs", str(jobs), "--out", str(out)]
    for name in ("method", "task", "length"):
        found += [item for value in case[name] for item in (f"--{name}", value)]
    code = f"import sys; sys.argv[1:] = {found!r}; from kvscope.cli import main; main()"
    return [sys.executable, "-c", code]


def count(path: Path) -> int:
    """Return the whole lines of a file; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def measure(case: dict[str, Any], *, model: str, n_gpus: int, jobs: int, out: Path, kill: bool) -> dict[str, Any]:
    """Run a case on so many GPUs; return its rate and what was busy.

    Raises:
        SystemExit: it failed, or rows did.
    """
    n_rows = len(case["method"]) * len(case["task"]) * len(case["length"]) * case["samples"]
    started_s = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = psutil.Popen(command(case, model=model, n_gpus=n_gpus, jobs=jobs, out=out), stdout=said, stderr=said)
        seen = Watch()
        while process.poll() is None:
            time.sleep(POLL_S)
            look(seen, process, out / "samples.jsonl", started_s, n_gpus)
            if kill and not seen.killed and seen.marks[-1][1] >= KILLED_AT * n_rows:
                seen.killed = kill_one(process)
        whole_s = time.perf_counter() - started_s
        said.seek(0)
        text = said.read()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {text[-2000:]}")
    first, last = (next(mark for mark in seen.marks if mark[1] >= share * n_rows) for share in (FROM, TO))
    between = [at for at, mark in enumerate(seen.marks) if first[0] <= mark[0] <= last[0]]
    return {
        "gpus": n_gpus, "jobs": jobs, "rows": n_rows, "whole_s": round(whole_s, 2), "worker_killed": seen.killed,
        "rows_per_s": round((last[1] - first[1]) / (last[0] - first[0]), 2), "measured_s": round(last[0] - first[0], 2),
        "first_row_s": round(next(s for s, rows in seen.marks if rows), 2),
        "gpu_busy_percent": [round(mean(seen.gpu_percent[at][gpu] for at in between), 1) for gpu in range(n_gpus)],
        "cores_busy": round(mean(seen.cores_busy[at] for at in between), 2),
        "writer_cores": round(mean(seen.writer_cores[at] for at in between), 3),
        "mps": "Multi-Process Service" in text, "said": [line for line in text.splitlines() if "rocess" in line],
    }  # fmt: skip


def look(seen: Watch, process: psutil.Popen, rows: Path, started_s: float, n_gpus: int) -> None:
    """Note what there is at this moment."""
    try:
        writer = process.cpu_percent() / 100
    except psutil.Error:
        writer = 0.0
    seen.writer_cores.append(writer)
    seen.cores_busy.append(psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1))
    seen.gpu_percent.append([gpu_percent(index) for index in range(n_gpus)])
    seen.marks.append((time.perf_counter() - started_s, count(rows)))


def gpu_percent(index: int) -> int:
    """Return the share of the last moments in which a kernel ran."""
    import pynvml

    pynvml.nvmlInit()
    return int(pynvml.nvmlDeviceGetUtilizationRates(pynvml.nvmlDeviceGetHandleByIndex(index)).gpu)


def kill_one(process: psutil.Popen) -> bool:
    """Kill the worker that began first; return whether there was one."""
    for child in process.children(recursive=True):
        if any(WORKER in part for part in child.cmdline()):
            os.kill(child.pid, signal.SIGKILL)
            return True
    return False


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of a run by prompt and method, without times and surroundings.

    Raises:
        SystemExit: a row was written twice, or failed.
    """
    found: dict[str, dict[str, Any]] = {}
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        key = f"{row['task']} {row['length_tokens']} {row['sample']} {row['method_label']}"
        if key in found or row["status"] != "ok":
            raise SystemExit(f"{key}: written twice, or {row['status']}: {row['reason']}")
        found[key] = {name: value for name, value in row.items() if name not in TIME_COLUMNS | SURROUNDINGS_COLUMNS}
    return found


def compared(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return how far two runs agree: a tie may fall either way where other answers share a step."""
    keys = one.keys() & other.keys()
    differing = [key for key in keys if one[key]["output"] != other[key]["output"]]
    ties = [key for key in differing if one[key].get("tie") or other[key].get("tie")]
    return {
        "rows_lost": len(one.keys() - other.keys()), "rows_too_many": len(other.keys() - one.keys()),
        "prompts_differ": sum(one[key]["prompt_sha256"] != other[key]["prompt_sha256"] for key in keys),
        "answers_differ": len(differing), "of_these_ties": len(ties),
        "not_ties": sorted(set(differing) - set(ties))[:20],
        "scores_differ": sum(one[key]["score"] != other[key]["score"] for key in keys),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="repeatable; all that need no folder")
    parser.add_argument("--model", default="reference", help="of gemma-*: its folder or GGUF file")
    parser.add_argument("--gpus", action="append", type=int, required=True, help="how many, ascending; repeatable")
    parser.add_argument("--jobs", type=int, default=3, help="processes a GPU")
    parser.add_argument("--samples", type=int, help="prompts a task and length, other than a case's own")
    parser.add_argument("--no-kill", action="store_true", help="kill no worker in a further run")
    parser.add_argument("--out", type=Path, required=True, help="JSON; other cases in it stay")
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {"cases": {}}
    for name in options.case or ("methods-16k", "methods-64k"):
        case = {**CASES[name], **({"samples": options.samples} if options.samples else {})}
        runs: list[dict[str, Any]] = []
        rows: dict[int, dict[str, dict[str, Any]]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for n_gpus in options.gpus:
                out = Path(folder, str(n_gpus))
                run = measure(case, model=options.model, n_gpus=n_gpus, jobs=options.jobs, out=out, kill=False)
                rows[n_gpus] = rows_of(out)
                first = runs[0] if runs else run
                run["efficiency"] = round(run["rows_per_s"] / first["rows_per_s"] / n_gpus * first["gpus"], 3)
                run["against_fewest"] = compared(rows[options.gpus[0]], rows[n_gpus])
                runs.append(run)
                print(name, json.dumps(run), flush=True)
                note(options, found, name, case, runs)
            if len(options.gpus) > 1 and not options.no_kill:
                few = {**case, "samples": -(-case["samples"] // 4)}
                out, n_gpus = Path(folder, "killed"), options.gpus[-1]
                run = measure(few, model=options.model, n_gpus=n_gpus, jobs=options.jobs, out=out, kill=True)
                whole = {key: row for key, row in rows[options.gpus[0]].items() if row["sample"] < few["samples"]}
                runs.append({**run, "against_fewest": compared(whole, rows_of(out))})
                print(name, json.dumps(runs[-1]), flush=True)
                note(options, found, name, case, runs)


def note(
    options: argparse.Namespace, found: dict[str, Any], name: str, case: dict[str, Any], runs: list[dict[str, Any]]
) -> None:
    """Write what was measured so far."""
    found["environment"] = capture_environment(device="cuda:0")
    found["cases"][name] = {"model": Path(options.model).name, "case": case, "runs": runs}
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
