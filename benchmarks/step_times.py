"""Seconds of decode steps, and of single calls, on whatever device there is."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.session import Session

Row = dict[str, Any]


def decode_times(
    loaded: LoadedModel, method: Any, prompt: Any, *, n_steps: int, graph: Any, timed_refresh: bool = False
) -> Row:
    """Decode greedily and return each step's seconds.

    With ``timed_refresh`` what stands before each step (a refresh, at a tau boundary) is timed by itself, the device
    waited for on both sides, its copies included.
    """
    cuda = loaded.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    with Session(loaded, decode_graph=graph) as session:
        member = session.add(method, prompt, reserve_tokens=n_steps)
        sequence, before_s = member.cache, []
        if timed_refresh:
            begin_step = sequence.begin_step

            def begin_timed() -> None:
                wait()
                started_s = time.perf_counter()
                begin_step()
                wait()
                before_s.append(time.perf_counter() - started_s)

            sequence.begin_step = begin_timed  # type: ignore[method-assign]
        session.prepare()  # begins the first step
        capture_s, token, step_s = session.capture_s, 1, []
        for _ in range(n_steps):
            started_s = time.perf_counter()
            token = int(session.step([token])[0].argmax())
            step_s.append(time.perf_counter() - started_s)
        record, held = sequence.residency(), sequence.footprint()
        return {
            "step_s": step_s,
            "before_s": before_s,
            "backend": session.step_backend,
            "captures": session.captures,
            "capture_s": capture_s,
            "open_s": member.open_s,
            "device_bytes": held.device_bytes,
            "bytes_read_per_step": held.bytes_read_per_step,
            "hit_rate": None if record is None else record.hit_rate,
            "recalled_bytes": None if record is None else record.recalled_bytes[1:],
            "backends": list(sequence.backends()),
        }


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the device is full."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def times_or_oom(loaded: LoadedModel, method: Any, prompt: Callable[[], Any], *, n_steps: int, graph: Any) -> Row:
    """Return ``decode_times``, or ``status`` and ``reason`` of a row where the device is full; what is free is given
    back."""
    try:
        return decode_times(loaded, method, prompt(), n_steps=n_steps, graph=graph)
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return {"status": "oom", "reason": str(error).splitlines()[0][:200]}
    finally:
        if loaded.device.type == "cuda":
            torch.cuda.empty_cache()


def median_s(calls: list[Callable[[], Any]], device: str) -> float:
    """Return the median seconds of one call: on the GPU in a CUDA graph, on a CPU by the clock."""
    if device == "cuda":
        from kernel_cases import median_s as gpu_median_s

        return gpu_median_s(calls)
    found = []
    for call in calls * 3:
        started_s = time.perf_counter()
        call()
        found.append(time.perf_counter() - started_s)
    return statistics.median(found)
