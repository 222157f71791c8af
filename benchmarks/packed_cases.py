"""Decode attention over packed pages at the shape of Llama-3.1-8B, beside the kernel over bf16 pages.

Shapes as in the kernels' modules. GB are 10^9 bytes.
"""

from collections.abc import Iterator

import torch
from kernel_cases import (
    DEVICE,
    HEAD_DIM,
    N_KV_HEADS,
    N_QUERY_HEADS,
    PAGE_TOKENS,
    SCALE,
    Call,
    Row,
    case_name,
    eager_median_s,
    kv_bytes,
    median_s,
    row,
)

from kvscope.methods.kernels.paged_decode.inputs import PagedKV
from kvscope.methods.kernels.paged_decode.kernel import paged_decode
from kvscope.methods.kv_format import FORMATS, KvFormat, PagePacking
from kvscope.methods.packing import pack_pages

CASES = ((1, 131072), (8, 32768), (1, 32768))
#: Least speed at 128K over the kernel's in bf16.
TARGETS = {"fp8": 1.7, "int4": 2.5}
_N_SETS = 3
_PAGES_AT_ONCE = 512
_N_LAYERS = 32


def raw_pages(n_pages: int) -> torch.Tensor:
    """Random pages [S, H, 2, P, D] in bf16."""
    return torch.randn((n_pages, N_KV_HEADS, 2, PAGE_TOKENS, HEAD_DIM), device=DEVICE, dtype=torch.bfloat16)


def packed_pages(n_pages: int, packing: PagePacking) -> torch.Tensor:
    """Such pages, packed [S, H, R]."""
    parts = range(0, n_pages, _PAGES_AT_ONCE)
    return torch.cat([pack_pages(raw_pages(min(_PAGES_AT_ONCE, n_pages - at)), packing) for at in parts])


def sets(form: KvFormat | None, batch: int, length_tokens: int) -> list[tuple[torch.Tensor, PagedKV]]:
    """Return queries and stores; no page is in two sets, and tables are permuted."""
    packing = None if form is None else PagePacking(form, PAGE_TOKENS, HEAD_DIM)
    n_pages = batch * length_tokens // PAGE_TOKENS
    found = []
    for _ in range(_N_SETS):
        pages = raw_pages(n_pages) if packing is None else packed_pages(n_pages, packing)
        table = torch.randperm(n_pages, device=DEVICE).int().view(batch, 1, -1)
        n_tokens = torch.full((batch, 1), length_tokens, dtype=torch.int32, device=DEVICE)
        q = torch.randn(batch, N_QUERY_HEADS, 1, HEAD_DIM, device=DEVICE).bfloat16()
        found.append((q, PagedKV(pages=pages, n_tokens=n_tokens, page_table=table, packing=packing)))
    return found


def calls(inputs: list[tuple[torch.Tensor, PagedKV]]) -> list[Call]:
    """Return a call a set."""
    return [lambda q=q, store=store: paged_decode(q, [store], scale=SCALE) for q, store in inputs]


def read_bytes(form: KvFormat | None, batch: int, length_tokens: int) -> int:
    """Bytes of the pages of one layer, scales and bases included."""
    if form is None:
        return kv_bytes(batch, length_tokens)
    packing = PagePacking(form, PAGE_TOKENS, HEAD_DIM)
    return batch * length_tokens // PAGE_TOKENS * N_KV_HEADS * packing.record_bytes


def packed_rows() -> Iterator[Row]:
    """Every format after bf16; and what it takes to pack a page of every layer, once in ``PAGE_TOKENS`` steps."""
    for batch, length in CASES:
        raw_s = median_s(calls(sets(None, batch, length)))
        yield row("packed_decode", f"bf16, {case_name(batch, length)}", raw_s, read_bytes(None, batch, length))
        for name, form in FORMATS.items():
            time_s = median_s(calls(sets(form, batch, length)))
            target = TARGETS.get(name) if (batch, length) == CASES[0] else None
            more = {"speed_over_bf16": raw_s / time_s, "target_over_bf16": target}
            n_bytes = read_bytes(form, batch, length)
            yield row("packed_decode", f"{name}, {case_name(batch, length)}", time_s, n_bytes, **more)
        torch.cuda.empty_cache()
    raw = raw_pages(_N_LAYERS)
    for name, form in FORMATS.items():
        packing = PagePacking(form, PAGE_TOKENS, HEAD_DIM)
        time_s = eager_median_s(lambda packing=packing: pack_pages(raw, packing))
        yield row("pack", f"{name}, a page of {_N_LAYERS} layers", time_s, raw.numel() * raw.element_size())
