"""Where the prefill of a small model goes: seconds and TFLOP/s by chunk size, what the device does and what the host.

    python benchmarks/prefill_profile.py --out FILE
    python benchmarks/prefill_profile.py --length 64k --chunk 2048 --chunk 65536
    python benchmarks/prefill_profile.py --device cpu --length 1k --chunk 256

A time is the median of several prefills of one prompt, with the collectors of ``--method`` (as a sweep's) and without.
FLOPs are those of the layers' weights and of causal attention. The profile is of one prefill more: its kernels' time
over its wall time says whether the device waits for the host.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, save_result, say

from kvscope.harness.engine.glue import decoder_of, layers_of
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.passes.environment import capture_environment
from kvscope.methods.base import union_collectors
from kvscope.methods.registry import create_method
from kvscope.units import parse_length

METHODS = ("dense", "lsa", "sliding_window", "recency", "random", "quest", "moba", "msa", "dsa")
MOST_LINES = 12


def prefill_flops(loaded: LoadedModel, n_tokens: int) -> int:
    """Return the FLOPs of a prefill: two a weight and token, and causal attention, windows as far as they reach."""
    shape = loaded.shape
    weights = sum(p.numel() for layer in layers_of(decoder_of(loaded.model)) for p in layer.parameters())
    attention = shape.attention_flops(n_tokens) * n_tokens // 2 + shape.stock_attention_flops(n_tokens) * n_tokens
    return 2 * weights * n_tokens + attention


def once_s(loaded: LoadedModel, ids: list[int], chunk_tokens: int, methods: list[Any]) -> float:
    """Return the wall seconds of a prefill."""
    collectors = union_collectors(methods, loaded.shape.layers)
    started_s = time.perf_counter()
    prefill(loaded, ids, collectors=collectors, chunk_tokens=chunk_tokens)
    return time.perf_counter() - started_s


def profile(loaded: LoadedModel, ids: list[int], chunk_tokens: int, methods: list[Any]) -> dict[str, Any]:
    """Return what one prefill spends its time on, on the device and on the host."""
    activity = torch.profiler.ProfilerActivity
    cuda = loaded.device.type == "cuda"
    activities = [activity.CPU, *([activity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities) as seen:
        wall_s = once_s(loaded, ids, chunk_tokens, methods)
    events = seen.key_averages()
    kernels = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU]
    host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    return {
        "wall_s": wall_s,
        "device_s": sum(e.self_device_time_total for e in kernels) / 1e6,
        "device_events": sum(e.count for e in kernels),
        "device": _lines(kernels, "self_device_time_total"),
        "host": _lines(host, "self_cpu_time_total"),
    }


def _lines(events: list[Any], field: str) -> list[dict[str, Any]]:
    ordered = sorted(events, key=lambda e: -getattr(e, field))[:MOST_LINES]
    return [{"name": e.key[:120], "count": e.count, "s": getattr(e, field) / 1e6} for e in ordered]


def main() -> int:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reference")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--length", type=parse_length, default=16 * 1024)
    parser.add_argument("--chunk", type=int, action="append", help="repeatable; default 2048 and the whole prompt")
    parser.add_argument("--method", action="append", help="whose collectors listen; default nine methods")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "prefill_profile_h200.json")
    options = parser.parse_args()
    loaded = load_model(options.model, device=options.device)
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(0, loaded.model.config.vocab_size, (options.length,), generator=draws).tolist()
    made: list[Any] = [create_method(name) for name in options.method or METHODS]
    # Asked as a sweep asks, which shows a method with an indexer its model.
    sweep = [method for method in made if not method.unsupported(loaded.shape, loaded.device)]
    flops = prefill_flops(loaded, options.length)
    rows = []
    for chunk_tokens in options.chunk or [2048, options.length]:
        for name, methods in (("alone", []), ("with collectors", sweep)):
            times_s = [once_s(loaded, ids, chunk_tokens, methods) for _ in range(options.repetitions + 2)][2:]
            found_s = statistics.median(times_s)
            rows.append(
                {
                    "case": name,
                    "length_tokens": options.length,
                    "chunk_tokens": chunk_tokens,
                    "prefill_s": found_s,
                    "each_s": times_s,
                    "flops": flops,
                    "tflop_per_s": flops / found_s / 1e12,
                    "profile": profile(loaded, ids, chunk_tokens, methods),
                }
            )
            busy = rows[-1]["profile"]
            say(
                f"chunks of {chunk_tokens}, {name}: {1e3 * found_s:.1f} ms, {flops / found_s / 1e12:.1f} TFLOP/s; "
                f"profiled {1e3 * busy['wall_s']:.1f} ms, device {1e3 * busy['device_s']:.1f} ms in "
                f"{busy['device_events']} kernels and copies"
            )
    result = {
        "benchmark": "prefill_profile",
        "model": loaded.name,
        "methods": [method.label for method in sweep],
        "environment": capture_environment(device=options.device),
        "rows": rows,
    }
    save_result(options.out, result, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
