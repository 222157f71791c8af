"""Where the time of one training step goes: kernels by their time, launches, and how long the device does nothing."""

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from kvscope.harness.reference_model.data import Batch
from kvscope.harness.reference_model.trainer import Trainer, synchronise

STEPS = 5
TOP = 15
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cudaGraphLaunch")
"""Calls of a host that start kernels; a graph's kernels start with one."""


@dataclass(frozen=True)
class Span:
    """One event of the profiler: microseconds of its own start and end."""

    name: str
    start_us: float
    end_us: float


def busy_us(spans: Iterable[Span]) -> float:
    """Return the time in which at least one of some spans runs."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start_us):
        total += max(0.0, span.end_us - max(span.start_us, until))
        until = max(until, span.end_us)
    return total


def table(spans: list[Span], *, steps: int) -> list[dict[str, Any]]:
    """Return the names with the most time, each with its time and number in a step."""
    time_us: Counter[str] = Counter()
    for span in spans:
        time_us[span.name] += span.end_us - span.start_us
    count = Counter(span.name for span in spans)
    return [
        {"ms": round(total / steps / 1e3, 4), "calls": round(count[name] / steps, 1), "kernel": name[:90]}
        for name, total in time_us.most_common(TOP)
    ]


def step_profile(trainer: Trainer, batch: Batch) -> dict[str, Any]:
    """Profile whole steps: forward, backward, update. Parameters move by a learning rate of 0.

    Returns:
        Milliseconds of a step by the host's clock without the profiler; of the device's kernels, and how long none runs
        between first and last; kernels and launches a step; the kernels with the most time. Without a GPU the
        operations of the CPU stand for kernels.
    """
    cuda = trainer.device.type == "cuda"

    def steps() -> float:
        synchronise(trainer.device)
        start = time.perf_counter()
        for _ in range(STEPS):
            trainer.gradients(batch)
            trainer.update(0.0)
        synchronise(trainer.device)
        return (time.perf_counter() - start) / STEPS

    steps()  # compilation and capture
    step_s = steps()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        steps()
    events = [(event, Span(event.name, event.time_range.start, event.time_range.end)) for event in found.events()]
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    spans = [span for event, span in events if event.device_type == wanted and (cuda or not event.cpu_children)]
    busy = busy_us(spans)
    whole = max(span.end_us for span in spans) - min(span.start_us for span in spans)
    launches = sum(event.device_type == DeviceType.CPU and event.name in LAUNCHES for event, _ in events)
    return {
        "part": "profile", "tokens": batch.ids_BT.shape[1], "rows": len(batch.ids_BT), "ok": True,
        "captured": trainer.captured, "step_ms": round(step_s * 1e3, 3), "kernel_ms": round(busy / STEPS / 1e3, 3),
        "idle_ms": round((whole - busy) / STEPS / 1e3, 3), "kernels": round(len(spans) / STEPS, 1),
        "launches": round(launches / STEPS, 1), "top": table(spans, steps=STEPS),
    }  # fmt: skip


def lines(row: dict[str, Any]) -> list[str]:
    """Return a profile's kernels as a table to read."""
    return [f"{each['ms']:9.4f} ms {each['calls']:7.1f} x  {each['kernel']}" for each in row["top"]]
