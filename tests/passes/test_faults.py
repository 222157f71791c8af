"""What goes wrong on a GPU, simulated on the CPU: each fault is one row that says so, and the sweep goes on."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process import MIB, Nvml, measure, run_here, with_nvml

from kvscope.errors import DeviceBudgetExceeded, HostMemoryShort
from kvscope.harness.engine import layer_major, prefill
from kvscope.harness.engine.oom import is_oom
from kvscope.harness.passes import allocator, measurement, process
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.footprint import FootprintPass
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.process import run_worker, worker_environment
from kvscope.harness.passes.row_columns import oom_of
from kvscope.harness.passes.sweep import failures, run
from kvscope.methods.dense.method import Dense
from kvscope.results.memory_rows import FootprintRow

VALUES = {
    "model": "preset:tiny",
    "methods": ["dense", "recency:recency_tokens=128"],
    "lengths_tokens": ["1k"],
    "device": "cpu",
    "footprint_decode_tokens": 4,
}
CUDA_OOM = "CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 79.19 GiB"


def out_of_memory(*arguments: Any, **options: Any) -> Any:
    raise torch.OutOfMemoryError(CUDA_OOM)


def dense_row(**changes: Any) -> FootprintRow:
    """Measure dense at 1K here."""
    plan = make_plan(make_config({**VALUES, **changes}))
    return measure(FootprintPass().job(plan, plan.methods[0], 1024))


def test_oom_in_decode_is_a_row_with_bytes_and_the_sweep_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    """As dense at 512K of an 8B shape on 80 GB: the cache is made when the method opens."""
    run_here(monkeypatch)
    with_nvml(monkeypatch, Nvml(lambda: 78_000 * MIB))
    warmed: list[bool] = []
    real = Dense.open

    def second_time(self: Dense, *arguments: Any, **options: Any) -> Any:
        if warmed:
            out_of_memory()
        warmed.append(True)
        return real(self, *arguments, **options)

    monkeypatch.setattr(Dense, "open", second_time)
    result = run(VALUES, out=tmp_path / "run", progress=False)
    dense, recency = result.footprint.to_dict("records")
    assert (dense["status"], dense["failure_phase"], dense["oom_of"]) == ("oom", "decode", "device")
    assert dense["failure_device_bytes"] == 78_000 * MIB
    assert dense["baseline_nvml_bytes"] == 78_000 * MIB
    assert dense["prefill_peak_nvml_bytes"] == 78_000 * MIB
    assert "Tried to allocate 3.00 GiB" in dense["reason"]
    assert recency["status"] == "ok"
    assert failures(result)[0].startswith("footprint: dense: 1 oom: decode: OutOfMemoryError")


def test_oom_in_prefill_is_a_row(monkeypatch: Any) -> None:
    calls: list[int] = []
    real = prefill.prefill

    def second_time(loaded: Any, ids: Any, **options: Any) -> Any:
        calls.append(len(ids))
        return out_of_memory() if len(calls) == 2 else real(loaded, ids, **options)

    monkeypatch.setattr(prefill, "prefill", second_time)
    row = dense_row()
    assert calls == [256, 1019]
    assert (row.status, row.failure_phase, row.oom_of) == ("oom", "prefill", "device")


def test_oom_while_the_model_loads_is_a_row(monkeypatch: Any) -> None:
    monkeypatch.setattr("kvscope.harness.engine.models.load_model", out_of_memory)
    row = dense_row()
    assert (row.status, row.failure_phase, row.oom_of) == ("oom", "load", "device")


@pytest.mark.parametrize("kv", ["prefill", "synthetic"])
def test_a_host_mirror_that_does_not_fit_is_a_row(kv: str, monkeypatch: Any) -> None:
    """The warm-up's 256 tokens fit, the prompt's do not."""
    monkeypatch.setattr(prefill, "free_host_bytes", lambda: 70_000)
    row = dense_row(kv=kv, methods=["lsa:budget_tokens=512,selection=synthetic"])
    assert (row.status, row.failure_phase, row.oom_of) == ("oom", "prefill", "host")
    assert "host pages of a prompt of 1,019 tokens" in str(row.reason)


def test_a_host_that_cannot_lock_its_pages_is_a_row(monkeypatch: Any) -> None:
    real = layer_major.empty_host_pages

    def short_prompts_only(shape: Any, n_tokens: int, **options: Any) -> Any:
        if n_tokens > 500:
            raise MemoryError("the host cannot lock 69,206,016 bytes for the GPU (cudaHostRegister: 2)")
        return real(shape, n_tokens, **options)

    monkeypatch.setattr(layer_major, "empty_host_pages", short_prompts_only)
    row = dense_row()
    assert (row.status, row.failure_phase, row.oom_of) == ("oom", "prefill", "host")


@pytest.mark.parametrize(
    ("error", "budgeted", "what"),
    [
        (torch.OutOfMemoryError(CUDA_OOM), False, "device"),
        (torch.OutOfMemoryError(CUDA_OOM), True, "device_budget"),
        (RuntimeError("CUDA error: out of memory"), False, "device"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False, "device"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True, "device_budget"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True, "host"),
        (MemoryError("the host cannot lock 1,024 bytes for the GPU"), True, "host"),
        (RuntimeError("can't start new thread"), False, "host"),
        (OSError(12, "Cannot allocate memory"), True, "host"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), False, "host"),
        (HostMemoryShort("it would run out of memory"), True, "host"),
        (DeviceBudgetExceeded("over"), True, "device_budget"),
    ],
)
def test_what_ran_out_is_told_apart(error: Exception, budgeted: bool, what: str) -> None:
    assert is_oom(error)
    assert oom_of(error, budgeted=budgeted) == what
    assert not is_oom(RuntimeError("CUDA error: an illegal memory access was encountered"))


def test_a_budget_that_the_driver_sees_broken_is_an_oom_row(monkeypatch: Any) -> None:
    """On a GPU the budget is held against NVML, kernels and context included."""
    readings = iter([900, 900, 1500, 1500] + [2600] * 10_000)
    with_nvml(monkeypatch, Nvml(lambda: next(readings) * MIB))
    monkeypatch.setattr(
        measurement.Measurement,
        "check_budget",
        lambda self, what, nvml_bytes, *, ledger_bytes: self.budget.check(nvml_bytes, what),
    )
    row = dense_row(gpu_budget_bytes="2GiB")
    assert (row.status, row.oom_of, row.gpu_budget_bytes) == ("oom", "device_budget", 2048 * MIB)
    assert "the device budget is 2,147,483,648" in str(row.reason)


def test_the_budget_limits_torchs_allocator(monkeypatch: Any) -> None:
    from kvscope.errors import DeviceBudgetExceeded
    from kvscope.harness.passes.device_budget import CONTEXT_BYTES, DeviceBudget

    fractions: list[float] = []
    properties = type("Properties", (), {"total_memory": 80 * 1024 * MIB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda fraction, device: fractions.append(fraction)
    )
    DeviceBudget(24 * 1024 * MIB).apply("cuda:0", outside_bytes=1024 * MIB)
    DeviceBudget(24 * 1024 * MIB).apply("cuda:0", outside_bytes=None)
    DeviceBudget(200 * 1024 * MIB).apply("cuda:0", outside_bytes=0)
    DeviceBudget(None).apply("cuda:0", outside_bytes=0)
    assert fractions == [23 / 80, (24 * 1024 * MIB - CONTEXT_BYTES) / (80 * 1024 * MIB), 1.0]
    with pytest.raises(DeviceBudgetExceeded, match="context alone"):
        DeviceBudget(100).apply("cuda:0", outside_bytes=1024)


def test_kernels_that_load_with_the_first_steps_are_taken_off_the_budget(monkeypatch: Any) -> None:
    """Torch is limited anew by what the warm-up left outside its own allocator."""
    from kvscope.harness.passes.device_budget import DeviceBudget

    taken: list[int | None] = []
    with_nvml(monkeypatch, Nvml(lambda: 1900 * MIB))
    monkeypatch.setattr(allocator.TorchMemory, "reserved_bytes", lambda self: 1200 * MIB)
    monkeypatch.setattr(DeviceBudget, "apply", lambda self, device, *, outside_bytes: taken.append(outside_bytes))
    row = dense_row(gpu_budget_bytes="2GiB")
    assert row.status == "ok"
    assert taken == [1900 * MIB, 700 * MIB], "the context's reading, then what is not torch's"


def test_allocator_settings_that_are_not_in_force_say_so(monkeypatch: Any) -> None:
    settings: dict[str, Any] = {"expandable_segments": True}
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"allocator_settings": settings})
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    assert allocator.allocator_settings() == "expandable_segments:True"
    settings["expandable_segments"] = False
    assert allocator.allocator_settings() == "expandable_segments:True (not in force)"
    settings.clear()
    assert allocator.allocator_settings() == "expandable_segments:True (not confirmed)"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync")
    assert allocator.allocator_settings() == "backend:cudaMallocAsync"


def test_a_gpu_busy_with_another_process_is_in_the_row_and_in_an_ooms_reason(monkeypatch: Any) -> None:
    with_nvml(monkeypatch, Nvml(lambda: 1000 * MIB, others=(1, 60_000 * MIB)))
    row = dense_row()
    assert (row.status, row.other_processes, row.other_processes_nvml_bytes) == ("ok", 1, 60_000 * MIB)
    monkeypatch.setattr("kvscope.harness.engine.models.load_model", out_of_memory)
    row = dense_row()
    assert row.status == "oom"
    assert str(row.reason).endswith("(other processes on this GPU: 1, holding 58.6 GiB)")


def test_a_gpu_that_lets_nobody_else_in_is_a_row(monkeypatch: Any) -> None:
    def busy(self: measurement.Measurement[Any]) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(measurement.Measurement, "_create_context", busy)
    row = dense_row()
    assert (row.status, row.failure_phase) == ("failed", "start")
    assert "busy or unavailable" in str(row.reason)


@pytest.mark.parametrize(
    "reason", ["NVML is not available: Driver Not Loaded", "this driver does not report memory per process"]
)
def test_without_readings_rows_are_measured_and_say_why_not_by_nvml(reason: str, monkeypatch: Any) -> None:
    with_nvml(monkeypatch, Nvml(lambda: None, others=None, reason=reason))
    row = dense_row()
    assert (row.status, row.verdict, row.kv_nvml_bytes, row.nvml_reason) == ("ok", "not_measured", None, reason)
    assert row.resident_kv_bytes == row.predicted_kv_bytes
    assert (row.other_processes, row.other_processes_nvml_bytes) == (None, None)


def test_a_mismatch_is_a_failed_run(tmp_path: Path, monkeypatch: Any) -> None:
    """The driver sees 200 MiB more while decoding than the ledger counts."""
    run_here(monkeypatch)
    phase: list[str] = [""]
    with_nvml(monkeypatch, Nvml(lambda: (1200 if phase[0] == "decode" else 1000) * MIB))
    real = measurement.Measurement.enter
    watched = lambda self, name: (phase.__setitem__(0, name), real(self, name))  # noqa: E731
    monkeypatch.setattr(measurement.Measurement, "enter", watched)
    result = run({**VALUES, "methods": ["dense"]}, out=tmp_path / "run", progress=False)
    row = result.footprint.iloc[0]
    assert row["verdict"] == "mismatch"
    assert "NVML reads 209,715,200 bytes where the ledger counts 262,144" in row["verdict_reason"]
    assert failures(result) == [f"footprint: dense at 1024: mismatch: {row['verdict_reason']}"]


@pytest.mark.usefixtures("server_set_aside")
def test_without_triton_the_worker_measures(tmp_path: Path, monkeypatch: Any) -> None:
    """A real worker whose triton does not import: the row names what computed instead."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('no triton here')\n")
    real = worker_environment()
    paths = os.pathsep.join([str(tmp_path), real["PYTHONPATH"]])
    monkeypatch.setattr(process, "worker_environment", lambda: {**real, "PYTHONPATH": paths})
    plan = make_plan(make_config(VALUES))
    row = run_worker(FootprintPass().job(plan, plan.methods[0], 1024), timeout_s=24 * 3600)
    assert row.status == "ok", row.reason
    assert "torch" in row.backend


def test_a_time_limit_ends_between_rows_and_the_same_run_continues(tmp_path: Path, monkeypatch: Any) -> None:
    from kvscope.harness.passes.deadline import Deadline, TimeLimitReached
    from kvscope.results.frames import load_run

    jobs = run_here(monkeypatch)
    checks: list[int] = []

    def check(self: Deadline) -> None:
        checks.append(1)
        if len(checks) == 2:
            raise TimeLimitReached("The time limit of 1 s is reached: the same command continues.")

    monkeypatch.setattr(Deadline, "check", check)
    with pytest.raises(TimeLimitReached):
        run({**VALUES, "time_limit_s": 1.0}, out=tmp_path / "run", progress=False)
    assert len(load_run(tmp_path / "run").footprint) == 1
    result = run({**VALUES, "time_limit_s": 9.0}, out=tmp_path / "run", progress=False)
    assert len(jobs) == len(result.footprint) == 2


def test_a_deadline_that_is_over_says_how_to_go_on() -> None:
    from kvscope.harness.passes.deadline import Deadline, TimeLimitReached

    Deadline(None).check()
    Deadline(60).check()
    with pytest.raises(TimeLimitReached, match=r"limit of 0 s is reached: every finished row is kept"):
        Deadline(0).check()
