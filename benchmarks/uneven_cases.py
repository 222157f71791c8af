"""Decode attention of many sequences of uneven lengths in one launch, as a shared step makes it, and flashinfer's.

Shapes as in ``kernel_cases``. Every sequence of ours keeps its own pages, read through a permuted table of its own;
flashinfer reads one pool, permuted, too.
"""

from collections.abc import Iterator

import torch
from kernel_cases import (
    DEVICE,
    FLASHINFER_WAYS,
    HEAD_DIM,
    N_KV_HEADS,
    N_QUERY_HEADS,
    PAGE_TOKENS,
    SCALE,
    Call,
    Row,
    kv_bytes,
    median_s,
    row,
)

from kvscope.methods.kernels.paged_decode.inputs import PagedKV, TokenPlace
from kvscope.methods.kernels.paged_decode.reference import paged_decode_reference
from kvscope.methods.kernels.paged_decode.rows import RowTable

#: Sequences, and the shortest and longest that they may be.
UNEVEN_CASES = ((31, 1024, 65536), (31, 256, 16384))
N_SETS = 2
DTYPE = torch.bfloat16
ERROR = 1e-2


def case_name(n: int, least: int, most: int) -> str:
    """Return "31 of 1K to 64K"."""
    return f"{n} of {least / 1024:g}K to {most // 1024}K"


def lengths_of(n: int, least: int, most: int) -> list[int]:
    """Return the same uneven lengths every time."""
    return torch.randint(least, most + 1, (n,), generator=torch.Generator().manual_seed(0)).tolist()


def sequence(n_tokens: int) -> PagedKV:
    """Return random K and V of one sequence, its pages in a random order."""
    n_pages = -(-n_tokens // PAGE_TOKENS)
    size = (n_pages, N_KV_HEADS, 2, PAGE_TOKENS, HEAD_DIM)
    pages = torch.empty(size, dtype=DTYPE, device=DEVICE).normal_()
    table = torch.randperm(n_pages, device=DEVICE).int().view(1, 1, -1)
    count = torch.full((1, 1), n_tokens, dtype=torch.int32, device=DEVICE)
    return PagedKV(pages=pages, n_tokens=count, page_table=table)


def queries(n: int) -> torch.Tensor:
    """Return a query a sequence."""
    return torch.randn(n, N_QUERY_HEADS, 1, HEAD_DIM, device=DEVICE).to(DTYPE)


def row_table(stores: list[PagedKV]) -> RowTable:
    """Return the table of a step in which each sequence reads its store."""
    zero = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    places = [TokenPlace(pages=store.pages, slot_1=zero, offset_1=zero) for store in stores]
    return RowTable([[store] for store in stores], places)


def largest_error(out_BQ1D: torch.Tensor, q_BQ1D: torch.Tensor, stores: list[PagedKV]) -> float:
    """Return the largest error of a sequence over its largest value, against the reference in fp64.

    Raises:
        ValueError: it is over ``ERROR``.
    """
    worst = 0.0
    for b, store in enumerate(stores):
        exact, _ = paged_decode_reference(q_BQ1D[b : b + 1], [store], scale=SCALE)
        worst = max(worst, float((out_BQ1D[b].double() - exact[0]).abs().max() / exact.abs().max()))
    if not worst <= ERROR:
        raise ValueError(f"relative error {worst:.2e} is over {ERROR:.0e}")
    return worst


def uneven_rows(*, flashinfer: bool = True) -> Iterator[Row]:
    """Time every case, ours first; each way is held against the reference before it is timed."""
    made = []
    for case in UNEVEN_CASES:
        lengths = lengths_of(*case)
        n_bytes = sum(kv_bytes(1, length) for length in lengths)
        sets = [(queries(len(lengths)), [sequence(length) for length in lengths]) for _ in range(N_SETS)]
        made.append((case_name(*case), sets, lengths, n_bytes))
        tables = [(q, row_table(stores)) for q, stores in sets]
        error = largest_error(tables[0][1].attend(sets[0][0], scale=SCALE), *sets[0])
        time_s = median_s([lambda q=q, table=table: table.attend(q, scale=SCALE) for q, table in tables])
        yield row("uneven_decode", made[-1][0], time_s, n_bytes, largest_error=error, tokens=sum(lengths))
    if flashinfer:
        yield from (flashinfer_row(*each) for each in made)


def flashinfer_row(name: str, sets: list[tuple[torch.Tensor, list[PagedKV]]], lengths: list[int], n_bytes: int) -> Row:
    """Time flashinfer's batch decode on the same lengths, the faster of its ways that split a sequence's KV.

    Raises:
        ImportError: it is not installed.
    """
    found_s: dict[str, float] = {}
    errors = []
    for tensor_cores, backend in FLASHINFER_WAYS:
        if backend == "auto":
            continue  # does not split KV on Hopper: nine times as slow at 1 x 128K, and long to compile
        calls = [flashinfer_call(q, stores, lengths, tensor_cores, backend) for q, stores in sets]
        errors.append(largest_error(calls[0]()[:, :, None], *sets[0]))
        found_s[f"{'tensor' if tensor_cores else 'CUDA'} cores, {backend}"] = median_s(calls)
    best = min(found_s, key=lambda way: found_s[way])
    ways_us = ", ".join(f"{way}: {1e6 * time_s:.0f} us" for way, time_s in found_s.items())
    return row("flashinfer uneven", name, found_s[best], n_bytes, note=ways_us, largest_error=max(errors))


def flashinfer_call(
    q: torch.Tensor, stores: list[PagedKV], lengths: list[int], tensor_cores: bool, backend: str
) -> Call:
    """Return one call of a planned batch decode; the plan is not timed, as the step's tables are not."""
    import flashinfer  # type: ignore[import-not-found]

    n_pages = [len(store.pages) for store in stores]
    starts = torch.tensor([0, *n_pages], dtype=torch.int32, device=DEVICE).cumsum(0).int()
    # Its layout is [page, K or V, head, token, D].
    pool = torch.cat([store.pages.transpose(1, 2) for store in stores])
    indices = torch.cat([store.page_table.flatten() + start for store, start in zip(stores, starts, strict=False)])
    workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=DEVICE)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_tensor_cores=tensor_cores, backend=backend
    )
    wrapper.plan(
        starts,
        indices.int(),
        torch.tensor([(length - 1) % PAGE_TOKENS + 1 for length in lengths], dtype=torch.int32, device=DEVICE),
        N_QUERY_HEADS,
        N_KV_HEADS,
        HEAD_DIM,
        PAGE_TOKENS,
        q_data_type=DTYPE,
        kv_data_type=DTYPE,
    )
    return lambda: wrapper.run(q[:, :, 0], pool)
