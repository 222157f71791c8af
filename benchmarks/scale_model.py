"""What a sweep costs, as a model of its parts: fitted on measured runs, checked on others, and multiplied out.

    python benchmarks/scale_model.py runs     # measures a few runs on a CPU
    python benchmarks/scale_model.py writer   # measures the one writer, with invented rows
    python benchmarks/scale_model.py fit      # the model of these and of the committed rows of a GPU

A prompt of T tokens costs p + a T + b T^2, once for all its methods; each token of an answer c + d T, by method. A run
costs s besides, and each further process w. On a GPU a short prompt costs what its launches take, whatever they
compute: max(p, a T + b T^2). CPU figures are user and system seconds on one thread, so that another
load of the machine counts little. GPU figures are the committed rows' seconds.
"""

import argparse
import json
import os
import resource
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import RESULTS, machine, say
from scale_writer import writer_figures
from scipy.optimize import nnls

FILE = RESULTS / "scale.json"
GPU_ROWS = Path(__file__).resolve().parents[1] / "results" / "reference" / "h100"
METHODS = ("dense", "recency", "lsa")
_MOST_OFF = 0.15
_LAUNCH_BOUND_TOKENS = 16_384
"""Below this length a GPU prefills the reference model in the time of its launches."""
K = 1024
#: (lengths, samples, methods, held out)
RUNS: tuple[tuple[tuple[int, ...], int, tuple[str, ...], bool], ...] = (
    ((K,), 1, ("dense",), False),
    ((K,), 4, METHODS, False),
    ((K,), 12, ("dense",), False),
    ((2 * K,), 4, ("dense", "lsa"), False),
    ((4 * K,), 1, ("dense",), False),
    ((4 * K,), 3, METHODS, False),
    ((8 * K,), 2, ("dense", "recency"), False),
    ((16 * K,), 1, METHODS, False),
    ((3 * K,), 3, ("dense", "recency"), True),
    ((6 * K,), 2, METHODS, True),
    ((12 * K,), 1, ("dense", "lsa"), True),
    ((K, 2 * K, 4 * K), 2, METHODS, True),
)
JOBS_RUN = ((2 * K,), 8, ("dense", "lsa"))


@dataclass(frozen=True)
class Work:
    """What a run does: the sums that its cost is linear in."""

    n_prompts: int
    tokens: int
    tokens2: int
    steps: Mapping[str, int]
    step_tokens: Mapping[str, int]

    def row(self) -> list[float]:
        """Return it in the order of the coefficients: s, p, a, b, then c and d of each method."""
        return [1, self.n_prompts, self.tokens, self.tokens2] + [
            each[name] for name in METHODS for each in (self.steps, self.step_tokens)
        ]


def work_of(samples: Any) -> Work:
    """Return the work of a run's rows."""
    prompts = samples.drop_duplicates(["task", "length_tokens", "sample"])["length_tokens"]
    by_method = {name: samples[samples["method"] == name] for name in METHODS}
    return Work(
        n_prompts=len(prompts),
        tokens=int(prompts.sum()),
        tokens2=int((prompts**2).sum()),
        steps={name: int(rows["decode_tokens"].sum()) for name, rows in by_method.items()},
        step_tokens={
            name: int((rows["decode_tokens"] * rows["length_tokens"]).sum()) for name, rows in by_method.items()
        },
    )


def measured(lengths: Sequence[int], samples: int, methods: Sequence[str], *, jobs: int = 1) -> dict[str, Any]:
    """Run once in a process of its own, forked from here; return its CPU seconds and its work."""
    with tempfile.TemporaryDirectory() as folder:
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                os.write(writer, json.dumps(_run(Path(folder) / "run", lengths, samples, methods, jobs)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as said:
            found = json.loads(said.read())
        os.wait()
    return {"lengths_tokens": list(lengths), "samples": samples, "methods": list(methods), "jobs": jobs, **found}


def _run(folder: Path, lengths: Sequence[int], samples: int, methods: Sequence[str], jobs: int) -> dict[str, Any]:
    import torch

    import kvscope

    torch.set_num_threads(1)
    begin = [_cpu_s(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    config = {
        "model": "reference", "methods": list(methods), "tasks": ["niah_single_1"], "lengths_tokens": list(lengths),
        "samples": samples, "footprint": False, "device": "cpu", "jobs": jobs,
    }  # fmt: skip
    run = kvscope.run(config, out=folder, progress=False)
    own, children = (
        _cpu_s(who) - at for who, at in zip((resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN), begin, strict=True)
    )
    assert set(run.samples["status"]) == {"ok"}
    return {"cpu_s": round(own, 3), "workers_cpu_s": round(children, 3), "work": vars(work_of(run.samples))}


def _cpu_s(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def measure_all(repetitions: int) -> dict[str, Any]:
    """Measure every run, the least of some repetitions each: what else the machine does only adds."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import kvscope.harness.engine.models
    import kvscope.harness.passes.sweep  # noqa: F401 - before the first fork

    measured((K,), 1, METHODS)  # what only a first run does
    runs = []
    for lengths, samples, methods, held_out in RUNS:
        tries = [measured(lengths, samples, methods) for _ in range(repetitions)]
        runs.append({**min(tries, key=lambda each: each["cpu_s"]), "held_out": held_out})
        say(json.dumps(runs[-1]))
    return {"environment": machine(), "runs": runs, "jobs": measured(*JOBS_RUN, jobs=2)}


# -- the model


def fitted(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> np.ndarray:
    """Return the coefficients, none below zero, that are least off in relation to what was measured."""
    matrix, target = np.asarray(rows, dtype=float), np.asarray(seconds, dtype=float)
    matrix /= target[:, None]
    scale = np.maximum(matrix.max(axis=0), 1e-300)
    return np.asarray(nnls(matrix / scale, np.ones(len(target)))[0] / scale)


def off(predicted: float, seconds: float) -> float:
    """Return how far a prediction is off, as a share of what was measured."""
    return predicted / seconds - 1


def cpu_model(found: Mapping[str, Any]) -> dict[str, Any]:
    """Fit the CPU runs; check those that were held out, and the run in two processes."""
    fit = [each for each in found["runs"] if not each["held_out"]]
    factors = fitted([Work(**each["work"]).row() for each in fit], [each["cpu_s"] for each in fit])

    def predict(each: Mapping[str, Any]) -> float:
        return float(np.dot(Work(**each["work"]).row(), factors))

    checked = [
        {
            "lengths_tokens": each["lengths_tokens"], "samples": each["samples"], "methods": each["methods"],
            "held_out": each["held_out"], "measured_cpu_s": each["cpu_s"],
            "predicted_cpu_s": round(predict(each), 2), "off": round(off(predict(each), each["cpu_s"]), 3),
        }
        for each in found["runs"]
    ]  # fmt: skip
    jobs = found["jobs"]
    in_all_s = jobs["cpu_s"] + jobs["workers_cpu_s"]
    return {
        "s": factors[0], "p": factors[1], "a": factors[2], "b": factors[3],
        **{f"c {name}": factors[4 + 2 * at] for at, name in enumerate(METHODS)},
        **{f"d {name}": factors[5 + 2 * at] for at, name in enumerate(METHODS)},
        "runs": checked,
        "worker_start_cpu_s": round((in_all_s - predict(jobs)) / jobs["jobs"], 2),
    }  # fmt: skip


def prefill_model() -> dict[str, Any]:
    """Fit and check the least prefill seconds of the reference model on an H100, by length."""
    from kvscope.results.frames import load_run

    least_s: dict[int, float] = {}
    for name in ("dense", "lsa", "lsa-long", "methods"):
        samples = load_run(GPU_ROWS / name).samples
        for length, seconds in samples[samples["prefill_s"] > 0].groupby("length_tokens")["prefill_s"].min().items():
            least_s[int(length)] = min(seconds, least_s.get(int(length), seconds))
    lengths = sorted(least_s)
    fit = [length for length in lengths if lengths.index(length) % 2 == 0]
    short = [least_s[length] for length in fit if length < _LAUNCH_BOUND_TOKENS]
    long = [length for length in fit if length >= _LAUNCH_BOUND_TOKENS]
    p = sum(short) / len(short)
    a, b = fitted([[length, length**2] for length in long], [least_s[length] for length in long])
    predicted = {length: max(p, a * length + b * length**2) for length in lengths}
    return {"p": p, "a": a, "b": b, "checked": _checked(least_s, fit, predicted)}


def step_model() -> dict[str, Any]:
    """Fit and check the decode steps of Llama-3.1-8B's shape on an H100, dense, by length."""
    from kvscope.results.frames import load_run

    folders = ("footprint-llama-3.1-8b", "footprint-llama-3.1-8b-synthetic", "longest-llama-3.1-8b")
    steps_s: dict[int, float] = {}
    for name in folders:
        rows = load_run(GPU_ROWS / name).footprint
        for row in rows[(rows["method_label"] == "dense") & (rows["status"] == "ok")].itertuples():
            steps_s[int(row.length_tokens)] = row.tpot_s
    fit = [min(steps_s), max(steps_s)]
    factors = fitted([[1, length] for length in fit], [steps_s[length] for length in fit])
    predicted = {length: factors[0] + factors[1] * length for length in steps_s}
    return {"c": factors[0], "d": factors[1], "checked": _checked(steps_s, fit, predicted)}


def _checked(seconds: Mapping[int, float], fit: Sequence[int], predicted: Mapping[int, float]) -> list[dict[str, Any]]:
    return [
        {
            "length_tokens": length,
            "held_out": length not in fit,
            "measured_s": round(seconds[length], 5),
            "off": round(off(predicted[length], seconds[length]), 3),
        }
        for length in sorted(seconds)
    ]


def million(*, gpus: int = 64, prompts: int = 1_000_000, answer_tokens: int = 128) -> dict[str, Any]:
    """Multiply out what a million prompts at 128K cost, from the committed rows of Llama-3.1-8B's shape on an H100."""
    from kvscope.results.frames import load_run

    rows = load_run(GPU_ROWS / "footprint-llama-3.1-8b").footprint
    at = rows[rows["length_tokens"] == 128 * K].set_index("method")
    prefill_s = float(at.loc["dense", "ttft_s"])
    steps_s = {name: answer_tokens * float(at.loc[name, "tpot_s"]) for name in ("dense", "lsa")}
    return {
        "prefill_s": round(prefill_s, 2), **{f"answer {name} s": round(s, 2) for name, s in steps_s.items()},
        "prompt_s": round(prefill_s + sum(steps_s.values()), 2),
        "gpu_hours": round(prompts * (prefill_s + sum(steps_s.values())) / 3600),
        "days": round(prompts * (prefill_s + sum(steps_s.values())) / gpus / 86400, 2),
        "rows_per_s": round(2 * gpus / (prefill_s + sum(steps_s.values())), 2),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 where a prediction of what was held out is off by more than 15 %."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["runs", "writer", "fit"])
    parser.add_argument("--file", type=Path, default=FILE, help="what was measured")
    parser.add_argument("--repetitions", type=int, default=2)
    options = parser.parse_args(arguments)
    found = json.loads(options.file.read_text()) if options.file.exists() else {}
    if options.what != "fit":
        key = {"runs": "cpu", "writer": "writer"}[options.what]
        found[key] = measure_all(options.repetitions) if key == "cpu" else writer_figures()
        options.file.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    model = {
        "cpu": cpu_model(found["cpu"]), "prefill, H100": prefill_model(), "step, H100": step_model(),
        "a million prompts at 128K": million(), "writer": found["writer"],
    }  # fmt: skip
    say(json.dumps(model, indent=1))
    checked = [*model["cpu"]["runs"], *model["prefill, H100"]["checked"], *model["step, H100"]["checked"]]
    return int(any(abs(each["off"]) > _MOST_OFF for each in checked if each["held_out"]))


if __name__ == "__main__":
    raise SystemExit(main())
