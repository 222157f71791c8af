"""Which launch constants suit packed decode on a GPU: every variant checked, then timed beside bf16 and a copy.

    python benchmarks/packed_variants.py --out FILE [--limit-s 120] [--only int4] [--processes 12]

One layer's decode attention at 1 x 128K of Llama-3.1-8B's shape. Variants are tokens of a tile, warps, stages,
registers, pieces and programs a multiprocessor (``PackedTuning``; ``packed_space.py`` lists them). Compiling takes most
of the time, so processes of their own compile first, and each of them holds what it compiled against the reference in
fp64: what is wrong is not timed, and the exit status is 1. They say what each takes, so that as many programs are timed
as find room. Then one process times all of them by CUDA graphs in which three sets of inputs take turns, the most
promising first, until the limit; and the fastest of each format once more, beside bf16.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from kernel_cases import median_s
from measure import save_result
from packed_space import HEAD_DIM, PAGE_TOKENS, programs_that_fit, tunings, with_programs, worth_timing
from triton.runtime.errors import OutOfResources

from kvscope.harness.passes.environment import capture_environment
from kvscope.methods.kernels.paged_decode.inputs import PagedKV
from kvscope.methods.kernels.paged_decode.kernel import PackedTuning, paged_decode
from kvscope.methods.kernels.paged_decode.packed import packed_split_kernel
from kvscope.methods.kernels.paged_decode.reference import paged_decode_reference
from kvscope.methods.kv_format import FORMATS, KvFormat, PagePacking
from kvscope.methods.packing import pack_pages

N_QUERY_HEADS, N_KV_HEADS = 32, 8
LENGTH_TOKENS = 131072
SCALE = HEAD_DIM**-0.5
TARGETS = {"fp8": 1.7, "int4": 2.5}
#: Largest error of an output over the greatest value: operands have 11 bits.
MOST_ERROR = 5e-3
_N_CLOSELY = 4
_N_SETS, _GRAPH_S, _PAGES_AT_ONCE = 3, 3e-3, 512
_CHECKED_TOKENS = 1000


def pages_of(form: KvFormat | None, n_pages: int, device: torch.device) -> torch.Tensor:
    """Random pages around channels of unlike means: raw in bf16, or packed."""
    means = 2 * torch.randn(HEAD_DIM, device=device)
    parts = []
    for at in range(0, n_pages, _PAGES_AT_ONCE):
        size = (min(_PAGES_AT_ONCE, n_pages - at), N_KV_HEADS, 2, PAGE_TOKENS, HEAD_DIM)
        raw = (torch.randn(size, device=device) + means).bfloat16()
        parts.append(raw if form is None else pack_pages(raw, PagePacking(form, PAGE_TOKENS, HEAD_DIM)))
    return torch.cat(parts)


def inputs_of(form: KvFormat | None, n_tokens: int, device: torch.device) -> tuple[torch.Tensor, PagedKV]:
    """A query and a store whose table is permuted; the last page is not full where ``n_tokens`` are no whole pages."""
    n_pages = -(-n_tokens // PAGE_TOKENS)
    pages = pages_of(form, n_pages, device)
    table = torch.randperm(n_pages, device=device).int().view(1, 1, -1)
    count = torch.full((1, 1), n_tokens, dtype=torch.int32, device=device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16  # bf16 products are wrong in the interpreter
    q = torch.randn(1, N_QUERY_HEADS, 1, HEAD_DIM, device=device).to(dtype)
    packing = None if form is None else PagePacking(form, PAGE_TOKENS, HEAD_DIM)
    if form is None:
        pages = pages.to(dtype)
    return q, PagedKV(pages=pages, n_tokens=count, page_table=table, packing=packing)


def error_of(q: torch.Tensor, store: PagedKV, tuning: PackedTuning) -> float:
    """Return the largest error of the output, over the greatest value; not finite is infinity."""
    out, _ = paged_decode(q, [store], scale=SCALE, packed_tuning=tuning)
    exact, _ = paged_decode_reference(q, [store], scale=SCALE)
    error = float((out.double() - exact).abs().max() / exact.abs().max())
    return error if math.isfinite(error) else math.inf


def check(kv: str, device: torch.device, only: Sequence[PackedTuning]) -> Iterator[dict[str, Any]]:
    """Compile variants, hold each against the reference and say what each takes; what finds no room says so."""
    q, store = inputs_of(FORMATS[kv], _CHECKED_TOKENS, device)
    for tuning in only:
        row: dict[str, Any] = {"kv": kv, **dataclasses.asdict(tuning)}
        try:
            row |= {"error": error_of(q, store, tuning), **taken(device, tuning)}
        except OutOfResources as error:
            row["no_room"] = str(error)
        yield row


def taken(device: torch.device, tuning: PackedTuning) -> dict[str, int]:
    """Return what the kernel compiled last takes, and how many of its programs fit; on a CPU nothing is compiled."""
    if device.type != "cuda":
        return {}
    kernels = packed_split_kernel.device_caches[torch.cuda.current_device()][0]
    last = list(kernels.values())[-1]
    registers, shared_bytes = last.n_regs, last.metadata.shared
    fit = programs_that_fit(registers=registers, shared_bytes=shared_bytes, num_warps=tuning.num_warps)
    return {"registers": registers, "spilled": last.n_spills, "shared_bytes": shared_bytes, "programs_that_fit": fit}


def time_s(calls: Sequence[Any], *, rep_ms: int) -> float:
    """Return the median seconds of one call; short, for there are many variants."""
    return median_s(calls, graph_s=_GRAPH_S, warmup_ms=5, rep_ms=rep_ms)


def copy_bytes_per_s(device: torch.device) -> float:
    """Return the bandwidth of the fastest of two copies, bytes read and written."""
    found = []
    for n in (2**28, 2**30):
        pairs = [tuple(torch.empty(n // 4, device=device) for _ in range(2)) for _ in range(2)]
        found.append(2 * n / time_s([lambda s=s, d=d: d.copy_(s) for s, d in pairs], rep_ms=50))
    return max(found)


def calls_of(inputs: Sequence[tuple[torch.Tensor, PagedKV]], tuning: PackedTuning | None) -> list[Any]:
    """Return a call a set of inputs."""
    return [lambda q=q, store=store: paged_decode(q, [store], scale=SCALE, packed_tuning=tuning) for q, store in inputs]


def timed(
    kvs: Sequence[str], found: dict[str, list[PackedTuning]], device: torch.device, *, until_s: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Time bf16 and every variant, formats in turn and the first variants first; then the best of each more closely."""
    n_raw_bytes = LENGTH_TOKENS * N_KV_HEADS * 2 * HEAD_DIM * 2
    raw = [inputs_of(None, LENGTH_TOKENS, device) for _ in range(_N_SETS)]
    base = {"copy_bytes_per_s": copy_bytes_per_s(device), "bf16_s": time_s(calls_of(raw, None), rep_ms=100)}
    base["bf16_of_copy"] = n_raw_bytes / base["bf16_s"] / base["copy_bytes_per_s"]
    packed = {kv: [inputs_of(FORMATS[kv], LENGTH_TOKENS, device) for _ in range(_N_SETS)] for kv in kvs}
    rows: list[dict[str, Any]] = []
    order = itertools.chain.from_iterable(itertools.zip_longest(*([(kv, each) for each in found[kv]] for kv in kvs)))
    n_left = 0
    for kv, tuning in filter(None, order):
        if time.monotonic() > until_s:
            n_left += 1
            continue
        with contextlib.suppress(OutOfResources):
            took_s = time_s(calls_of(packed[kv], tuning), rep_ms=20)
            rows.append({"kv": kv, **dataclasses.asdict(tuning), "time_s": took_s})
    best = {}
    for kv in kvs:
        mine = [row for row in rows if row["kv"] == kv]
        if not mine:
            continue
        first = map(_tuning_of, sorted(mine, key=lambda row: row["time_s"])[:_N_CLOSELY])
        closely = [(time_s(calls_of(packed[kv], each), rep_ms=100), each) for each in first]
        again_s, tuning = min(closely, key=lambda pair: pair[0])
        raw_s = time_s(calls_of(raw, None), rep_ms=100)
        record = PagePacking(FORMATS[kv], PAGE_TOKENS, HEAD_DIM).record_bytes
        n_bytes = LENGTH_TOKENS // PAGE_TOKENS * N_KV_HEADS * record
        best[kv] = {
            **dataclasses.asdict(tuning), "time_s": again_s, "bf16_s": raw_s, "speed_over_bf16": raw_s / again_s,
            "target_over_bf16": TARGETS.get(kv), "of_copy": n_bytes / again_s / base["copy_bytes_per_s"],
        }  # fmt: skip
    return sorted(rows, key=lambda row: (row["kv"], row["time_s"])), {
        **base,
        "best": best,
        "variants_not_timed": n_left,
    }


def compiled_apart(kvs: Sequence[str], n_processes: int) -> list[dict[str, Any]]:
    """Have processes of their own check all variants at once: what they compile, this one finds."""
    work = [f"{kv}:{i}" for kv in kvs for i in range(len(tunings(kv)))]
    with ThreadPoolExecutor(n_processes) as pool:
        return list(itertools.chain(*pool.map(checked_apart, (work[i::n_processes] for i in range(n_processes)))))


def checked_apart(share: Sequence[str]) -> list[dict[str, Any]]:
    """Check variants in a process of its own; where one ends it, the next ones have another."""
    rows: list[dict[str, Any]] = []
    while share:
        done = subprocess.run(
            [sys.executable, __file__, "--check", *share], capture_output=True, text=True, check=False
        )
        found = [json.loads(line) for line in done.stdout.splitlines()]
        rows, share = rows + found, share[len(found) :]
        if share:
            rows.append({"kv": share[0], "error": math.inf, "failed": done.stderr.strip().splitlines()[-1:]})
            share = share[1:]
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, write; return 0 when every variant agreed with the reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--limit-s", type=float, default=120.0)
    parser.add_argument("--only", action="append", choices=list(FORMATS))
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count() or 1))
    parser.add_argument("--check", nargs="+", help="FORMAT:NUMBER of variants, for the processes that compile")
    parser.add_argument("--smoke", action="store_true", help="check the first variant of each format and time nothing")
    given = parser.parse_args(arguments)
    started_s = time.monotonic()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kvs = given.only or list(FORMATS)
    if given.check:
        for each in given.check:
            kv, _, number = each.partition(":")
            for row in check(kv, device, [tunings(kv)[int(number)]]):
                print(json.dumps(row), flush=True)
        return 0
    if given.smoke:
        checks = [row for kv in kvs for row in check(kv, device, tunings(kv)[:1])]
    else:
        checks = compiled_apart(kvs, given.processes)
    print(f"compiled and checked in {time.monotonic() - started_s:.0f} s", flush=True)
    wrong = [row for row in checks if row.get("error", 0) > MOST_ERROR]
    result: dict[str, Any] = {
        "benchmark": "packed_variants",
        "environment": capture_environment(device="cuda:0" if device.type == "cuda" else "cpu"),
        "wrong": wrong,
        "checks": checks,
    }
    if device.type == "cuda" and not given.smoke:
        to_time = {kv: variants(kv, checks) for kv in kvs}
        rows, found = timed(kvs, to_time, device, until_s=started_s + given.limit_s - 8)
        result |= {**found, "rows": rows}
        for kv, each in found["best"].items():
            print(
                f"{kv}: {1e6 * each['time_s']:.1f} us, {each['speed_over_bf16']:.2f} x bf16 (target "
                f"{each['target_over_bf16']}), {100 * each['of_copy']:.0f} % of the copy: {each['tile_tokens']} "
                f"tokens, {each['num_warps']} warps, {each['num_stages']} stages, {each['programs_per_sm']} programs, "
                f"limit of registers {each['max_registers']}, pieces of {each['piece_words']} words"
            )
    result["took_s"] = round(time.monotonic() - started_s, 1)
    if given.out is not None:
        save_result(given.out, result, indent=1)
    for row in wrong:
        print(f"wrong: {row}")
    return 1 if wrong else 0


def variants(kv: str, checks: Sequence[dict[str, Any]]) -> list[PackedTuning]:
    """Return what agreed with the reference, with every number of programs: first as many of each as find room."""
    right = {_tuning_of(row): row["programs_that_fit"] for row in checks if row["kv"] == kv and _is_right(row)}
    fits = {each: right[each] for each in tunings(kv) if each in right}
    counted = [with_programs(each, fits[each]) for each in worth_timing(fits)]
    return [each for turn in itertools.zip_longest(*counted) for each in turn if each is not None]


def _is_right(row: dict[str, Any]) -> bool:
    return float(row.get("error", math.inf)) <= MOST_ERROR


def _tuning_of(row: dict[str, Any]) -> PackedTuning:
    return PackedTuning(**{field.name: row[field.name] for field in dataclasses.fields(PackedTuning)})


if __name__ == "__main__":
    sys.exit(main())
