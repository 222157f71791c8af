"""The cases that ``kernels.py`` measures: inputs at the sizes of use, several sets of each so that no cache holds them.

Shapes as in the kernels' modules. GB are 10^9 bytes.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton.testing
from triton.runtime.errors import OutOfResources

from kvscope.methods.kernels.block_scores.kernel import moba_scores, msa_scores, quest_scores
from kvscope.methods.kernels.host_gather.gather import HostGather
from kvscope.methods.kernels.paged_decode import kernel as decode
from kvscope.methods.kernels.paged_decode.inputs import PagedKV
from kvscope.methods.kernels.select import kernel as selection

DEVICE = torch.device("cuda")
N_QUERY_HEADS, N_KV_HEADS, HEAD_DIM, PAGE_TOKENS = 32, 8, 128, 64
SCALE = HEAD_DIM**-0.5
DECODE_CASES = [(1, 131072), (1, 32768), (8, 32768), (2, 131072), (16, 16384), (32, 8192)]
_GRAPH_S = 5e-3
_SHARED_BYTES = 220 * 1024
Row = dict[str, Any]
Call = Callable[[], Any]


def median_s(calls: Sequence[Call], *, graph_s: float = _GRAPH_S, warmup_ms: int = 20, rep_ms: int = 100) -> float:
    """Return the median seconds of one call on the GPU, the calls taking turns in one CUDA graph.

    A graph leaves launches out, as decoding does; it is long enough for what surrounds it not to count.

    Args:
        graph_s: seconds of the graph, about.
        warmup_ms, rep_ms: how long it is replayed before and while it is timed.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for call in calls:
        call()
    end.record()
    torch.cuda.synchronize()
    one_s = start.elapsed_time(end) / 1e3 / len(calls)
    n_rounds = max(1, min(256, math.ceil(graph_s / one_s / len(calls))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(n_rounds):
            for call in calls:
                call()
    found_ms = triton.testing.do_bench(graph.replay, warmup=warmup_ms, rep=rep_ms, return_mode="median")
    return float(found_ms) / 1e3 / n_rounds / len(calls)


def eager_median_s(call: Call) -> float:
    """The same for work that needs the host between copies and cannot be captured."""
    return float(triton.testing.do_bench(call, warmup=20, rep=200, return_mode="median")) / 1e3


def row(op: str, case: str, time_s: float, n_bytes: int, **more: Any) -> Row:
    """Return one result."""
    return {"op": op, "case": case, "time_s": time_s, "bytes": n_bytes, "gb_per_s": n_bytes / time_s / 1e9, **more}


def copy_rows() -> Iterator[Row]:
    """Copies on the device, bytes read and written: as torch makes them, of several sizes and element types.

    The fastest is what kernels are held against; which one that is differs between cards.
    """
    for n, dtype in itertools.product((2**28, 2**30, 2**32), (torch.uint8, torch.float32)):
        size = n // dtype.itemsize
        pairs = [tuple(torch.empty(size, dtype=dtype, device=DEVICE) for _ in range(2)) for _ in range(2)]
        time_s = median_s([lambda s=s, d=d: d.copy_(s) for s, d in pairs])
        del pairs
        name = str(dtype).removeprefix("torch.")
        yield row("copy", f"{n / 2**30:g} GiB of {name}, read and write", time_s, 2 * n)


class DecodeInputs:
    """One pool of pages, read through random tables by several sets of sequences."""

    def __init__(self, n_sets: int = 3) -> None:
        self.n_sets = n_sets
        most_tokens = max(batch * length for batch, length in DECODE_CASES)
        n_pages = n_sets * most_tokens // PAGE_TOKENS
        size = (n_pages, N_KV_HEADS, 2, PAGE_TOKENS, HEAD_DIM)
        self.pages = torch.empty(size, dtype=torch.bfloat16, device=DEVICE).normal_()
        self._order = torch.randperm(n_pages, device=DEVICE).int()

    def sets(self, batch: int, length_tokens: int) -> list[tuple[torch.Tensor, PagedKV]]:
        """Return queries and stores; no page is in two sets."""
        n_table = length_tokens // PAGE_TOKENS
        found = []
        for i in range(self.n_sets):
            table = self._order[i * batch * n_table : (i + 1) * batch * n_table].view(batch, 1, n_table)
            n_tokens = torch.full((batch, 1), length_tokens, dtype=torch.int32, device=DEVICE)
            q = torch.randn(batch, N_QUERY_HEADS, 1, HEAD_DIM, device=DEVICE).bfloat16()
            found.append((q, PagedKV(pages=self.pages, n_tokens=n_tokens, page_table=table)))
        return found


def kv_bytes(batch: int, length_tokens: int) -> int:
    """K and V of one layer."""
    return batch * length_tokens * N_KV_HEADS * 2 * HEAD_DIM * 2


def decode_calls(inputs: DecodeInputs, batch: int, length_tokens: int, tuning: decode.Tuning) -> list[Call]:
    """Return one call a set."""
    return [
        lambda q=q, store=store: decode.paged_decode(q, [store], scale=SCALE, tuning=tuning)
        for q, store in inputs.sets(batch, length_tokens)
    ]


def decode_rows(inputs: DecodeInputs) -> Iterator[Row]:
    """Paged decode at the shape of Llama-3.1-8B, all pages resident and permuted."""
    for batch, length in DECODE_CASES:
        time_s = median_s(decode_calls(inputs, batch, length, decode.DEFAULT))
        target = 0.9 if batch * length >= 262144 else None
        yield row("paged_decode", case_name(batch, length), time_s, kv_bytes(batch, length), target_share=target)


def case_name(batch: int, length_tokens: int) -> str:
    """Return "8 x 32K"."""
    return f"{batch} x {length_tokens // 1024}K"


def gather_decode_row(inputs: DecodeInputs, n_chosen: int = 2048) -> Row:
    """DSA's read: scattered tokens of a 128K context, one list for all heads."""
    calls = []
    for q, store in inputs.sets(1, 131072):
        tokens = torch.randperm(131072, device=DEVICE)[:n_chosen].sort().values.int().view(1, 1, n_chosen)
        n = torch.full((1, 1), n_chosen, dtype=torch.int32, device=DEVICE)
        chosen = dataclasses.replace(store, tokens=tokens, n_tokens=n)
        calls.append(lambda q=q, chosen=chosen: decode.paged_decode(q, [chosen], scale=SCALE))
    return row("paged_decode", f"{n_chosen} tokens of 128K", median_s(calls), kv_bytes(1, n_chosen))


def sdpa_rows(inputs: DecodeInputs) -> Iterator[Row]:
    """torch's fused attention over contiguous K and V, batch 1 x 128K: the two ways to give it grouped heads."""
    n, half = 131072, inputs.pages.numel() // 2
    flat = inputs.pages.view(-1)
    size = (1, N_KV_HEADS, n, HEAD_DIM)
    n_each = math.prod(size)
    sets = []
    for i in range(inputs.n_sets):
        k, v = (flat[start + i * n_each : start + (i + 1) * n_each].view(size) for start in (0, half))
        sets.append((torch.randn(1, N_QUERY_HEADS, 1, HEAD_DIM, device=DEVICE).bfloat16(), k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    ways = {
        "enable_gqa": lambda q, k, v: attend(q, k, v, scale=SCALE, enable_gqa=True),
        "group as queries": lambda q, k, v: attend(q.view(1, N_KV_HEADS, -1, HEAD_DIM), k, v, scale=SCALE),
    }
    for name, way in ways.items():
        calls = [lambda way=way, s=s: way(*s) for s in sets]
        yield row("torch sdpa", f"1 x 128K, {name}", median_s(calls), kv_bytes(1, n))


#: flashinfer's ways to decode: tensor cores or not, and which kernels (``auto`` takes one without split KV on Hopper).
FLASHINFER_WAYS = ((True, "fa2"), (False, "fa2"), (True, "auto"))


def flashinfer_rows(inputs: DecodeInputs) -> Iterator[Row]:
    """flashinfer's paged decode on the same pages, the fastest of its ways for each case.

    Raises:
        ImportError: it is not installed.
    """
    import flashinfer  # type: ignore[import-not-found]

    # Its layout is [page, K or V, head, token, D]; ours has K and V inside the head, which strides cannot say to it.
    pages = inputs.pages.transpose(1, 2).contiguous()
    for batch, length in DECODE_CASES:
        found_s: dict[str, float] = {}
        for tensor_cores, backend in FLASHINFER_WAYS:
            calls = []
            for q, store in inputs.sets(batch, length):
                assert store.page_table is not None
                workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=DEVICE)
                wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                    workspace, "HND", use_tensor_cores=tensor_cores, backend=backend
                )
                n_table = length // PAGE_TOKENS
                wrapper.plan(
                    torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * n_table,
                    store.page_table.flatten(),
                    torch.full((batch,), PAGE_TOKENS, dtype=torch.int32, device=DEVICE),
                    N_QUERY_HEADS,
                    N_KV_HEADS,
                    HEAD_DIM,
                    PAGE_TOKENS,
                    q_data_type=torch.bfloat16,
                    kv_data_type=torch.bfloat16,
                )
                calls.append(lambda q=q, wrapper=wrapper: wrapper.run(q[:, :, 0], pages))
            found_s[f"{'tensor' if tensor_cores else 'CUDA'} cores, {backend}"] = median_s(calls)
        best = min(found_s, key=lambda way: found_s[way])
        ways_us = ", ".join(f"{way}: {1e6 * time_s:.0f} us" for way, time_s in found_s.items())
        yield row("flashinfer", case_name(batch, length), found_s[best], kv_bytes(batch, length), note=ways_us)


def select_rows() -> Iterator[Row]:
    """Choose about a tenth of 250K chunks; the difference to a resident set of which a tenth changed."""
    n, capacity = 2**18, 32768
    logits = [torch.randn(3, n, device=DEVICE) for _ in range(4)]
    threshold = logits[0].amax(0).quantile(0.9).view(1)
    found = selection.empty_selection(n, capacity, DEVICE)
    slots = selection.empty_slots(n, capacity, DEVICE)
    delta = selection.empty_delta(capacity, capacity, DEVICE)
    calls = [lambda x=x: selection.select(x, threshold, found, n_sink=1, n_recent=32) for x in logits]
    yield row("select", "250K chunks, 3 rows, 10 % chosen", median_s(calls), logits[0].numel() * 4 * 2)
    calls[0]()
    selection.diff(found, slots, delta)
    selection.apply(found, slots, delta)
    changed = torch.where(torch.rand(n, device=DEVICE) < 0.1, logits[1], logits[0])
    selection.select(changed, threshold, found, n_sink=1, n_recent=32)
    time_s = median_s([lambda: selection.diff(found, slots, delta)])
    n_bytes = 2 * (2 * capacity * 4 + capacity * 5)
    yield row("select", "difference to 32K slots", time_s, n_bytes, missing=int(delta.n_missing))
    table = torch.empty(capacity, dtype=torch.int32, device=DEVICE)
    n_tokens = torch.empty(1, dtype=torch.int32, device=DEVICE)

    def swap() -> None:
        selection.apply(found, slots, delta)
        selection.write_table(found, slots, table, n_tokens, chunk_tokens=4)

    yield row("select", "apply and write the table", median_s([swap]), capacity * 4 * 5)


GATHER_UNITS = {"4 KiB": (1, 8), "32 KiB": (1, 64), "128 KiB": (4, 64)}
_GATHER_BYTES = 64 * 2**20


def gather_rows() -> Iterator[Row]:
    """Recall 64 MiB of scattered units from a pinned mirror of 512 MiB by each backend, and one plain copy."""
    mirror_bytes = torch.empty(512 * 2**20, dtype=torch.uint8, pin_memory=True)
    mirror_bytes.view(torch.int64).random_()
    target = torch.empty(_GATHER_BYTES, dtype=torch.uint8, device=DEVICE)
    time_s = eager_median_s(lambda: target.copy_(mirror_bytes[:_GATHER_BYTES], non_blocking=True))
    yield row("host_gather", "one copy of 64 MiB (the bus)", time_s, _GATHER_BYTES)
    for name, (n_heads, page_tokens) in GATHER_UNITS.items():
        unit_bytes = n_heads * 2 * page_tokens * HEAD_DIM * 2
        size = (-1, n_heads, 2, page_tokens, HEAD_DIM)
        mirror, slots = (x.view(torch.bfloat16).view(size) for x in (mirror_bytes, target))
        n = _GATHER_BYTES // unit_bytes
        source = torch.randperm(len(mirror))[: 4 * n].int().view(4, n)
        destination = torch.randperm(n).int()
        count = torch.tensor([n], dtype=torch.int32)
        for n_programs in (12, 24, 48):
            move = HostGather(mirror, slots, backend="uva", n_programs=n_programs)
            given = [(ids.to(DEVICE), destination.to(DEVICE), count.to(DEVICE)) for ids in source]
            time_s = median_s([lambda move=move, g=g: move(*g) for g in given])
            wanted = 48.0 if unit_bytes == 32768 and n_programs == 48 else None
            case = f"{name} units, uva, {n_programs} programs"
            yield row("host_gather", case, time_s, _GATHER_BYTES, target_gb_per_s=wanted)
        for backend in ("copies", "contiguous"):
            move = HostGather(mirror, slots, backend=backend)
            turn = itertools.cycle(source)
            given_host = (destination, count)
            time_s = eager_median_s(lambda m=move, turn=turn, g=given_host: m(next(turn), *g))
            yield row("host_gather", f"{name} units, {backend}", time_s, _GATHER_BYTES)


def block_score_rows() -> Iterator[Row]:
    """Block scores for a query behind 128K tokens, one layer."""
    H, G, D, n = N_KV_HEADS, N_QUERY_HEADS // N_KV_HEADS, HEAD_DIM, 131072
    q = torch.randn(H, G, D, device=DEVICE).bfloat16()

    def many(*size: int, n_sets: int) -> list[torch.Tensor]:
        return [torch.randn(*size, device=DEVICE).bfloat16() for _ in range(n_sets)]

    bounds = many(n // 16, H, 2, D, n_sets=6)
    yield row(
        "block_scores",
        "quest, page 16",
        median_s([lambda x=x: quest_scores(q, x) for x in bounds]),
        2 * bounds[0].numel(),
    )
    means = many(n // 512, H, 1, D, n_sets=64)
    yield row(
        "block_scores",
        "moba, block 512",
        median_s([lambda x=x: moba_scores(q, x) for x in means]),
        2 * means[0].numel(),
    )
    pages = many(n // PAGE_TOKENS, H, 2, PAGE_TOKENS, D, n_sets=3)
    calls = [lambda x=x: msa_scores(q, x, n_blocks=n // 128, block_tokens=128) for x in pages]
    yield row("block_scores", "msa, block 128", median_s(calls), pages[0].numel())


def sweep_rows(inputs: DecodeInputs) -> Iterator[Row]:
    """Constants of paged decode, the best last. What does not fit a multiprocessor is left out."""
    decode_cases = ((1, 131072), (8, 32768))
    found: list[Row] = []
    for tile_bytes, num_warps, num_stages in itertools.product((8192, 16384, 32768), (4, 8), (3, 5, 7)):
        for per_sm in (1, 2, 3, 4):
            if 2 * tile_bytes * (num_stages - 1) * per_sm > _SHARED_BYTES:
                continue
            tuning = decode.Tuning(
                tile_bytes=tile_bytes, num_warps=num_warps, num_stages=num_stages, programs_per_sm=per_sm
            )
            case = f"tile {tile_bytes // 1024} KiB, {num_warps} warps, {num_stages} stages, {per_sm} programs an SM"
            calls = [decode_calls(inputs, *case, tuning) for case in decode_cases]
            with contextlib.suppress(OutOfResources):
                time_s = sum(median_s(c) for c in calls)
                n_bytes = sum(kv_bytes(*c) for c in decode_cases)
                found.append(row("paged_decode sweep", case, time_s, n_bytes))
    yield from sorted(found, key=lambda r: -float(r["time_s"]))
