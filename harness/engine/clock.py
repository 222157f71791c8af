"""Seconds of pieces of work on a device, added up without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """How long the device was busy with something, in pieces. On a GPU nothing waits until the sum is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pieces_s: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what is done inside."""
        if self._device.type != "cuda":
            started_s = time.perf_counter()
            yield
            self._pieces_s.append(time.perf_counter() - started_s)
            return
        stream = torch.cuda.current_stream(self._device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record(stream)
        yield
        last.record(stream)
        self._events.append((first, last))

    def total_s(self) -> float | None:
        """Return the seconds of all pieces; None where there was none."""
        if self._events:
            torch.cuda.synchronize(self._device)
            self._pieces_s += [first.elapsed_time(last) / 1000 for first, last in self._events]
            self._events.clear()
        return sum(self._pieces_s) if self._pieces_s else None
