"""CPU seconds and memory of reading and reporting a run folder of many rows.

    python benchmarks/large_results.py [--rows 20000 --rows 50000 --rows 200000] [--out FILE]

makes a folder of that many invented sample rows (eight methods, five lengths, five tasks; 0/1 and graded scores, own
and shared contexts), then reads it (`load_run`) and reports it (`kvscope report`), each in a process of its own.
Seconds are user and system time of that process, so that another load of the machine counts little.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import RESULTS, machine, say

from kvscope.results.memory_rows import FootprintRow
from kvscope.results.run_schema import MethodInfo, RunInfo
from kvscope.results.schema import SampleRow

MOST_CPU_S, MOST_MIB = 20.0, 1536.0
"""What 200,000 rows may take."""
BIG = 200_000
METHODS = ("dense", "sliding_window", "recency", "random", "quest", "moba", "snapkv", "lsa")
LENGTHS_TOKENS = (4096, 8192, 16384, 32768, 65536)
TASKS = ("niah_single_1", "niah_multikey_2", "vt", "fwe", "long_qa")
_LEVELS = {"vt": 5, "fwe": 3, "long_qa": 40}
"""Graded tasks: their scores are whole parts of this many; the others' are 0 or 1."""
_KV_BYTES_PER_TOKEN = 12_288
_CELLS = len(METHODS) * len(LENGTHS_TOKENS) * len(TASKS)
_DO = {
    "load": "from kvscope.results.frames import load_run; load_run({folder!r})",
    "report": "import sys; from kvscope.cli import main; sys.argv = ['kvscope', 'report', {folder!r}]; main()",
}


def make_folder(folder: Path, *, rows: int) -> int:
    """Write a run folder of about so many invented sample rows, the same for the same number; return how many."""
    samples = max(1, rows // _CELLS)
    info = RunInfo(
        kvscope_version="0.0.0",
        started_utc="2026-01-01T00:00:00+00:00",
        model="invented",
        tasks=TASKS,
        lengths_tokens=LENGTHS_TOKENS,
        samples=samples,
        footprint_lengths_tokens=LENGTHS_TOKENS,
        methods=tuple(
            MethodInfo(label=name, name=name, stays="-", saves="-", source="-", saving_kind=_kind(name))
            for name in METHODS
        ),
        config={},
        identity={},
        environment={},
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(info.model_dump_json(indent=1) + "\n", encoding="utf-8")
    draw = random.Random(0)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for task in TASKS:
            for length in LENGTHS_TOKENS:
                cells = [SampleRow(**_sample(method, task, length)).model_dump(mode="json") for method in METHODS]
                for sample in range(samples):
                    prompt = _prompt(task, length, sample, draw)
                    for place, cell in enumerate(cells):
                        file.write(json.dumps({**cell, **prompt, **_answer(task, place, draw)}) + "\n")
    with (folder / "footprint.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(
            FootprintRow(**_footprint(method, length)).model_dump_json() + "\n"
            for length in LENGTHS_TOKENS
            for method in METHODS
        )
    return samples * _CELLS


def _kind(method: str) -> str:
    return {"lsa": "offloaded", "dense": "resident", "quest": "resident", "moba": "resident"}.get(method, "freed")


def _cell(method: str, length_tokens: int) -> dict[str, Any]:
    dense = length_tokens * _KV_BYTES_PER_TOKEN
    kept = dense if _kind(method) == "resident" else dense // 4
    return {
        "model": "invented",
        "method": method,
        "method_label": method,
        "config": {"recency_tokens": 128, "budget_tokens": length_tokens // 4},
        "length_tokens": length_tokens,
        "status": "ok",
        "saving_kind": _kind(method),
        "noop": False,
        "selection": "trained" if method == "lsa" else "free",
        "dtype": "float32",
        "device": "cpu",
        "self_check": "passed",
        "resident_kv_bytes": kept,
        "metadata_bytes": 0,
        "host_kv_bytes": dense if method == "lsa" else 0,
        "dense_kv_bytes": dense,
        "bytes_read_per_step": kept,
        "attention_flops_per_step": kept // 8,
        "bytes_recalled": dense // 16 if method == "lsa" else 0,
        "transformers_version": "5.24.0",
        "torch_version": "2.13.0",
    }


def _sample(method: str, task: str, length_tokens: int) -> dict[str, Any]:
    tokens = length_tokens - 128
    residency = {
        "tau": 4,
        "prompt_tokens": tokens,
        "resident_tokens": [tokens // 8] * 8,
        "recalled_bytes": [0, *[tokens * 1024] * 7],
        "hit_rate": 0.88,
        "fallbacks": 0,
        "indexer": "invented@0123456789abcdef",
        "indexer_tau": 4,
        "indexer_bytes": 98_304,
    }
    return _cell(method, length_tokens) | {
        "task": task,
        "question_type": task,
        "sample": 0,
        "seed": 0,
        "prompt_sha256": "0" * 64,
        "prompt_tokens": tokens,
        "targets": ["1234567"],
        "output": "",
        "score": 0.0,
        "stop_reason": "stop",
        "answer_nll_reason": "not requested",
        "prefill_s": length_tokens / 6000,
        "decode_s": 0.25,
        "decode_tokens": 9,
        "step_backend": "eager",
        "batch": 8,
        "least_logit_gap": 0.5,
        "logit_noise": 2e-5,
        "tie": False,
        "residency": residency if method == "lsa" else None,
    }


def _prompt(task: str, length_tokens: int, sample: int, draw: random.Random) -> dict[str, Any]:
    prompt = {
        "sample": sample,
        "depth": round(draw.random(), 4),
        "prompt_sha256": hashlib.sha256(f"{task} {length_tokens} {sample}".encode()).hexdigest(),
        "targets": [str(1_000_000 + sample)],
    }
    return prompt | ({"context_id": f"text {length_tokens} {sample // 4}"} if task == "long_qa" else {})


def _answer(task: str, place: int, draw: random.Random) -> dict[str, Any]:
    levels = _LEVELS.get(task, 1)
    score = sum(draw.random() < 0.97 - 0.08 * place for _ in range(min(levels, 5))) / min(levels, 5)
    return {
        "score": round(score * levels) / levels,
        "output": f" {draw.randrange(10**7)}",
        "decode_s": 0.2 + 0.1 * draw.random(),
        "least_logit_gap": draw.random(),
    }


def _footprint(method: str, length_tokens: int) -> dict[str, Any]:
    cell = _cell(method, length_tokens)
    return cell | {
        "prompt_tokens": length_tokens - 128,
        "backend": "torch",
        "predicted_kv_bytes": cell["resident_kv_bytes"],
        "predicted_metadata_bytes": 0,
        "predicted_host_bytes": cell["host_kv_bytes"],
        "verdict": "not_measured",
        "nvml_reason": "no NVIDIA GPU on this machine",
        "torch_reason": "the CPU allocator keeps no peak counters",
        "host_rss_peak_bytes": 900_000_000,
        "ttft_s": length_tokens / 6000,
        "tpot_s": 0.025,
        "tpot_steps": 64,
        "decode_tokens": 64,
    }


def measured(what: str, folder: Path) -> dict[str, float]:
    """Run one of `_DO` in a process of its own; return its CPU seconds and the largest resident memory in MiB."""
    process = subprocess.Popen([sys.executable, "-c", _DO[what].format(folder=str(folder))], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{what} of {folder} ended with exit code {process.returncode}")
    return {"cpu_s": round(used.ru_utime + used.ru_stime, 2), "peak_mib": round(used.ru_maxrss / 1024, 1)}


def main() -> int:
    """Measure every size, write the result, and return 0 where 200,000 rows stay within their limits."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rows", type=int, action="append", help="rows of a folder; may be given again")
    parser.add_argument("--out", type=Path, default=RESULTS / "large_results.json")
    given = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as place:
        for asked in given.rows or [20_000, 50_000, BIG]:
            folder = Path(place) / str(asked)
            rows = make_folder(folder, rows=asked)
            one = {"rows": rows, "file_mib": round((folder / "samples.jsonl").stat().st_size / 2**20, 1)}
            one |= {what: measured(what, folder) for what in _DO}
            say(json.dumps(one))
            found.append(one)
    met = all(
        one[what]["cpu_s"] <= MOST_CPU_S and one[what]["peak_mib"] <= MOST_MIB
        for one in found
        if one["rows"] <= BIG
        for what in _DO
    )
    command = "python benchmarks/large_results.py " + " ".join(f"--rows {one['rows']}" for one in found)
    result = {
        "question": "CPU seconds and peak memory of load_run and of kvscope report, by rows of the run folder",
        "target": {"rows": BIG, "most_cpu_s": MOST_CPU_S, "most_mib": MOST_MIB},
        "met": met,
        "command": command,
        "sizes": found,
        "environment": machine(),
    }
    given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if met else 1


if __name__ == "__main__":
    raise SystemExit(main())
