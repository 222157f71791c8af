"""Seconds of pieces of work on devices, added up without waiting for them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """How long devices were busy with something, in pieces. On a GPU nothing waits until the sum is asked for."""

    def __init__(self) -> None:
        self._pieces_s: list[float] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Time what a device does inside."""
        if device.type != "cuda":
            started_s = time.perf_counter()
            yield
            self._pieces_s.append(time.perf_counter() - started_s)
            return
        stream = torch.cuda.current_stream(device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record(stream)
        yield
        last.record(stream)
        self._events.append((first, last))

    def total_s(self) -> float | None:
        """Return the seconds of all pieces; None where there was none."""
        for first, last in self._events:
            last.synchronize()
            self._pieces_s.append(first.elapsed_time(last) / 1000)
        self._events.clear()
        return sum(self._pieces_s) if self._pieces_s else None
