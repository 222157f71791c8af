"""Deterministic rows of invented runs, for tests of the store, the statistics and the reports.

Nothing here was measured. Bytes follow from the methods' definitions; scores and times are drawn from a hash of the
cell, shaped like what such runs give (a method that dropped the needle misses it). Rows do not change: the same cell's
is made once.
"""

import hashlib
import math
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

from kvscope.results.memory_rows import FootprintRow
from kvscope.results.run_schema import MethodInfo, PlannedCell, RunInfo
from kvscope.results.schema import SampleRow

K = 1024
CPU_NVML_REASON = "no NVIDIA GPU on this machine (libnvidia-ml.so.1 not found)"
CPU_TORCH_REASON = "the CPU allocator keeps no peak counters"


@dataclass(frozen=True)
class Kind:
    """How an invented method behaves: what it keeps, what it finds, what it costs."""

    name: str
    stays: str
    saves: str
    source: str
    saving_kind: str = "resident"
    kept_fraction: float = 1.0
    metadata_per_token: float = 0.0
    read_fraction: float = 1.0
    finds: float = 1.0
    """Chance to answer when the evidence lies outside the recency window."""
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        return self.name + (":" + ",".join(f"{k}={v}" for k, v in self.options) if self.options else "")


KINDS = {
    kind.label: kind
    for kind in (
        Kind("dense", "every token", "nothing: the baseline", "-", finds=0.99),
        Kind(
            "sliding_window",
            "4 sink tokens and the last W tokens",
            "all other keys and values are freed and cannot come back",
            "Xiao et al. 2024, arXiv 2309.17453",
            "freed",
            0.0,
            finds=0.01,
        ),
        Kind(
            "recency",
            "the last tokens of the prompt and every decoded token",
            "all other keys and values are freed and cannot come back",
            "FlashMemory-DeepSeek-V4, arXiv 2606.09079 (Recency Only)",
            "freed",
            0.0,
            finds=0.02,
        ),
        Kind(
            "random",
            "the recency window and a random 10 % of chunks",
            "the other 90 % of chunks are freed and cannot come back",
            "FlashMemory-DeepSeek-V4, arXiv 2606.09079 (Random 10%)",
            "freed",
            0.1,
            finds=0.11,
        ),
        Kind(
            "quest", "every token", "reads only: nothing is freed", "Tang et al. 2024", "resident", 1, 1 / 8, 0.1, 0.97
        ),
        Kind(
            "moba", "every token", "reads only: nothing is freed", "Lu et al. 2025", "resident", 1, 1 / 64, 0.15, 0.94
        ),
        Kind("msa", "every token", "reads only: nothing is freed", "MiniMax 2026", "resident", 1, 1 / 32, 0.12, 0.96),
        Kind("dsa", "every token", "reads only: nothing is freed", "DeepSeek-V3.2", "resident", 1, 1 / 16, 0.05, 0.98),
        Kind(
            "lsa",
            "predicted chunks, sinks, the recency window and decoded tokens",
            "other chunks move to host memory and are recalled every tau steps",
            "FlashMemory-DeepSeek-V4, arXiv 2606.09079",
            "offloaded",
            0.09,
            1 / 50,
            0.1,
            0.975,
            (("threshold", 0.5), ("tau", 64)),
        ),
    )
}


@dataclass(frozen=True)
class Machine:
    device: str
    dtype: str
    kv_bytes_per_token: int
    weights_bytes: int
    total_bytes: int | None
    """None: no GPU, so that NVML and torch columns are null."""
    prefill_tokens_per_s: float
    read_bytes_per_s: float
    step_floor_s: float


CPU = Machine("cpu", "float32", 6 * 2 * 4 * 64 * 4, 36 << 20, None, 6_000, 4e9, 0.009)
H100 = Machine("cuda:0", "bfloat16", 131_072, 16_060_522_496, 78 << 30, 12_000, 2.2e12, 0.0085)


def unit(*parts: object) -> float:
    """A number in [0, 1) that depends on nothing but `parts`."""
    return random.Random("|".join(map(str, parts))).random()


def recency_tokens(length: int) -> int:
    return min(8192, max(128, length // 64))


def ledger(kind: Kind, machine: Machine, length: int) -> dict[str, int]:
    window = recency_tokens(length)
    kept = min(length, math.ceil(kind.kept_fraction * (length - window)) + window)
    dense = length * machine.kv_bytes_per_token
    metadata = int(kind.metadata_per_token * dense)
    return {
        "resident_kv_bytes": kept * machine.kv_bytes_per_token,
        "metadata_bytes": metadata,
        "host_kv_bytes": dense if kind.saving_kind == "offloaded" else 0,
        "dense_kv_bytes": dense,
        "bytes_read_per_step": int(min(kind.read_fraction * dense + window, kept * machine.kv_bytes_per_token))
        + metadata,
        "attention_flops_per_step": 4 * kept * 4096,
        "bytes_recalled": int(0.03 * dense) if kind.saving_kind == "offloaded" else 0,
    }


def cell_fields(kind: Kind, machine: Machine, length: int, model: str) -> dict[str, Any]:
    return {
        "model": model,
        "method": kind.name,
        "method_label": kind.label,
        "config": {**dict(kind.options), "recency_tokens": recency_tokens(length)},
        "length_tokens": length,
        "saving_kind": kind.saving_kind,
        "noop": kind.name == "dense",
        "selection": "synthetic" if kind.name == "lsa" else "free",
        "dtype": machine.dtype,
        "device": machine.device,
    }


@cache
def sample_row(
    kind: Kind,
    *,
    machine: Machine = CPU,
    model: str = "reference",
    task: str,
    length: int,
    sample: int,
    oom: bool = False,
) -> SampleRow:
    depth = (0.05 + 0.618034 * sample + 0.1 * unit("depth", task, length, sample)) % 1.0
    fields = cell_fields(kind, machine, length, model) | {
        "task": task,
        "question_type": task,
        "sample": sample,
        "seed": 0,
        "depth": round(depth, 4),
        "prompt_sha256": hashlib.sha256(f"{task}{length}{sample}".encode()).hexdigest(),
        "prompt_tokens": length - 128,
        "targets": (str(1_000_000 + sample),),
    }
    if oom:
        reason = "CUDA out of memory: tried to allocate 8.00 GiB during prefill"
        return SampleRow(**fields, status="oom", reason=reason)
    near = depth * length > length - recency_tokens(length)
    hard = 0.97 if "multikey" in task else 1.0
    aging = 1 - 0.012 * max(0.0, math.log2(length / 32_768)) if kind.finds > 0.5 else 1.0
    right = unit("luck", task, length, sample, "" if kind.finds > 0.9 else kind.label) < (
        0.99 if near else kind.finds * hard * aging
    )
    return SampleRow(
        **fields,
        **ledger(kind, machine, length),
        status="ok",
        output=f" {1_000_000 + sample if right else 0}",
        score=float(right),
        stop_reason="stop",
        answer_nll_reason="not requested",
        prefill_s=length / machine.prefill_tokens_per_s,
        decode_s=9 * tpot(kind, machine, length),
        decode_tokens=9,
        step_p10_s=0.95 * tpot(kind, machine, length),
        step_p90_s=1.1 * tpot(kind, machine, length),
        load_1min=0.4,
        cpu_cores=8,
    )


def tpot(kind: Kind, machine: Machine, length: int) -> float:
    read = ledger(kind, machine, length)["bytes_read_per_step"]
    return machine.step_floor_s * (1 + 0.05 * unit("tpot", kind.label, length)) + read / machine.read_bytes_per_s


@cache
def footprint_row(kind: Kind, *, machine: Machine = CPU, model: str = "reference", length: int) -> FootprintRow:
    held = ledger(kind, machine, length)
    fields = cell_fields(kind, machine, length, model) | {
        "prompt_tokens": length - 128,
        "backend": "torch",
        "predicted_kv_bytes": held["resident_kv_bytes"],
        "predicted_metadata_bytes": held["metadata_bytes"],
        "predicted_host_bytes": held["host_kv_bytes"],
    }
    device_bytes = held["resident_kv_bytes"] + held["metadata_bytes"]
    if machine.total_bytes is not None and oom(kind, machine, length):
        return FootprintRow(
            **fields,
            status="oom",
            reason="CUDA out of memory: tried to allocate 8.00 GiB during decode",
            verdict="not_measured",
            failure_phase="decode",
            failure_device_bytes=machine.total_bytes - (1 << 29),
        )
    speed = tpot(kind, machine, length)
    fields |= held | {
        "status": "ok",
        "host_rss_peak_bytes": 900_000_000 + held["host_kv_bytes"],
        "ttft_s": length / machine.prefill_tokens_per_s + speed,
        "tpot_s": speed,
        "tpot_steps": 64,
        "decode_tokens": 64,
    }
    if machine.total_bytes is None:
        return FootprintRow(
            **fields, verdict="not_measured", nvml_reason=CPU_NVML_REASON, torch_reason=CPU_TORCH_REASON
        )
    context, base = 520 << 20, machine.weights_bytes + (700 << 20)
    kv = device_bytes + int((unit("nvml", kind.label, length) - 0.3) * (24 << 20))
    saving = held["dense_kv_bytes"] - device_bytes
    small = kind.saving_kind != "resident" and saving < 256 << 20
    return FootprintRow(
        **fields,
        verdict="below_resolution" if small else kind.saving_kind,
        context_nvml_bytes=context,
        weights_nvml_bytes=machine.weights_bytes + context,
        baseline_nvml_bytes=base,
        prefill_peak_nvml_bytes=base + held["dense_kv_bytes"] // 32 + (400 << 20),
        decode_peak_nvml_bytes=base + kv,
        kv_nvml_bytes=kv,
        weights_torch_bytes=machine.weights_bytes,
        prefill_peak_torch_bytes=machine.weights_bytes + held["dense_kv_bytes"] // 32,
        decode_peak_torch_bytes=machine.weights_bytes + device_bytes,
        prefill_peak_torch_reserved_bytes=machine.weights_bytes + held["dense_kv_bytes"] // 32 + (64 << 20),
        decode_peak_torch_reserved_bytes=machine.weights_bytes + device_bytes + (32 << 20),
    )


def oom(kind: Kind, machine: Machine, length: int) -> bool:
    held = ledger(kind, machine, length)
    need = machine.weights_bytes + held["resident_kv_bytes"] + held["metadata_bytes"] + (1 << 30)
    return machine.total_bytes is not None and need > machine.total_bytes


def run_info(
    kinds: list[Kind],
    *,
    machine: Machine = CPU,
    model: str = "reference",
    tasks: tuple[str, ...],
    lengths: tuple[int, ...],
    samples: int,
    footprint_lengths: tuple[int, ...],
) -> RunInfo:
    plan = []
    for kind in kinds:
        for length in lengths:
            held = ledger(kind, machine, length)
            plan.append(
                PlannedCell(
                    method_label=kind.label,
                    length_tokens=length,
                    predicted_kv_bytes=held["resident_kv_bytes"],
                    predicted_metadata_bytes=held["metadata_bytes"],
                    predicted_host_bytes=held["host_kv_bytes"],
                    forecast="oom" if oom(kind, machine, length) else "fits",
                )
            )
    config = {"model": model, "tasks": list(tasks), "lengths_tokens": list(lengths), "samples": samples, "seed": 0}
    return RunInfo(
        kvscope_version="0.1.0",
        started_utc="2026-07-01T12:00:00+00:00",
        commit="0123456789abcdef0123456789abcdef01234567",
        dirty=False,
        model=model,
        tasks=tasks,
        lengths_tokens=lengths,
        samples=samples,
        footprint_lengths_tokens=footprint_lengths,
        methods=tuple(
            MethodInfo(
                label=kind.label,
                name=kind.name,
                options=dict(kind.options),
                stays=kind.stays,
                saves=kind.saves,
                source=kind.source,
                saving_kind=kind.saving_kind,
            )
            for kind in kinds
        ),
        config=config,
        identity=config,
        environment={"python": "3.12.3", "torch": "2.13.0", "gpu": "NVIDIA H100" if machine is H100 else None},
        plan=tuple(plan),
    )


Rows = tuple[list[SampleRow], list[FootprintRow], RunInfo]


def make_rows(
    labels: list[str],
    *,
    machine: Machine = CPU,
    model: str = "reference",
    tasks: tuple[str, ...],
    lengths: tuple[int, ...],
    samples: int,
    footprint_lengths: tuple[int, ...],
) -> Rows:
    known = {**KINDS, **SWEPT, PACKED.label: PACKED}
    kinds = [known[label] for label in labels]
    rows = [
        sample_row(
            kind, machine=machine, model=model, task=task, length=length, sample=sample, oom=oom(kind, machine, length)
        )
        for task in tasks
        for length in lengths
        for sample in range(samples)
        for kind in kinds
    ]
    footprints = [
        footprint_row(kind, machine=machine, model=model, length=length)
        for kind in kinds
        for length in footprint_lengths
    ]
    info = run_info(
        kinds,
        machine=machine,
        model=model,
        tasks=tasks,
        lengths=lengths,
        samples=samples,
        footprint_lengths=footprint_lengths,
    )
    return rows, footprints, info


def demo_rows() -> Rows:
    """4 methods x 4 lengths on a CPU: two tasks, five samples a cell, footprint at 2K and 8K."""
    return make_rows(
        ["dense", "sliding_window", "recency", "random"],
        tasks=("niah_single_1", "niah_multikey_2"),
        lengths=(1 * K, 2 * K, 4 * K, 8 * K),
        samples=5,
        footprint_lengths=(2 * K, 8 * K),
    )


def wide_rows(*, tasks: int = 3, samples: int = 20) -> Rows:
    """9 methods x 8 lengths up to 512K on one GPU; what keeps everything runs out of memory at 512K."""
    return make_rows(
        list(KINDS),
        machine=H100,
        model="meta-llama/Llama-3.1-8B-Instruct",
        tasks=("niah_single_1", "niah_multikey_2", "niah_multikey_3")[:tasks],
        lengths=tuple(4 * K * 2**i for i in range(8)),
        samples=samples,
        footprint_lengths=tuple(4 * K * 2**i for i in range(8)),
    )


def swept_kinds() -> list[Kind]:
    """The block-sparse family at five budgets each."""
    found = []
    for name, metadata, finds in (("quest", 1 / 8, 0.9), ("moba", 1 / 256, 0.6), ("msa", 0, 0.8), ("dsa", 1 / 14, 1)):
        for budget in (256, 512, 1024, 2048, 4096):
            right = min(0.99, finds * (budget / 4096) ** 0.12)
            options = (("budget_tokens", budget),)
            found.append(Kind(name, "-", "-", "-", "resident", 1, metadata, budget / 65_536, right, options))
    return found


SWEPT = {kind.label: kind for kind in swept_kinds()}
PACKED = Kind("dense", "every token", "bits", "-", read_fraction=0.5, finds=0.9, options=(("kv", "int8"),))
"""Dense in fewer bits, which is not what methods are compared with."""


def sweep_rows() -> Rows:
    """Dense, lsa and four methods at five budgets each: 22 settings at three lengths."""
    return make_rows(
        ["dense", *SWEPT, "lsa:threshold=0.5,tau=64"],
        tasks=("niah_single_1", "niah_multikey_2"),
        lengths=(4 * K, 16 * K, 64 * K),
        samples=20,
        footprint_lengths=(64 * K,),
    )


def single_rows() -> Rows:
    """1 method x 1 length."""
    return make_rows(["dense"], tasks=("niah_single_1",), lengths=(4 * K,), samples=5, footprint_lengths=(4 * K,))
