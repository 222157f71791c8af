"""Footprint workers without a process: the same measurement, at a tenth of the time."""

import io
from collections.abc import Callable
from typing import Any

import pytest

from kvscope.harness.passes import measurement, process_pass
from kvscope.harness.passes.job import Job, RowT
from kvscope.harness.passes.measurement import Measurement

MIB = 1024 * 1024


def measure(job: Job[RowT]) -> RowT:
    """Measure a job here."""
    return measurement.measure(job, say=io.StringIO())


def run_here(monkeypatch: pytest.MonkeyPatch) -> list[Job[Any]]:
    """Let the passes measure in this process; return the list of jobs, which fills."""
    jobs: list[Job[Any]] = []

    def run_worker(job: Job[RowT], **options: Any) -> RowT:
        jobs.append(job)
        return measure(job)

    monkeypatch.setattr(process_pass, "run_worker", run_worker)
    return jobs


class Nvml:
    """Stands in for ``NvmlProcessMemory``: reads what a function gives."""

    def __init__(
        self,
        read_bytes: Callable[[], int | None],
        *,
        others: tuple[int, int | None] | None = (0, 0),
        reason: str | None = None,
    ) -> None:
        self.read_bytes = read_bytes
        self._others = others
        self.reason = reason

    def others(self, sweep_pid: int | None = None) -> tuple[int, int | None] | None:
        del sweep_pid
        return self._others


def with_nvml(monkeypatch: pytest.MonkeyPatch, nvml: Nvml) -> None:
    """Let measurements on the CPU read from ``nvml``, as they would on a GPU."""
    real = Measurement._create_context

    def create(self: Measurement[Any]) -> None:
        self._nvml = nvml  # type: ignore[assignment]
        self._nvml_reason = nvml.reason or ""
        real(self)

    monkeypatch.setattr(Measurement, "_create_context", create)
