"""What each method keeps and computes on the released engine, item by item: tables of a plan. Analytic; no torch.

The engine packs an entry into 584 bytes and a key into 132 (fp8), and attends to its indexer's top-k alone. Nothing
here runs it: the stock transformers classes, whose bytes the plan's own tables give, do neither.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from kvscope.harness.backends.deepseek_v4.shape import CompressedModelShape, released_cache
from kvscope.methods.compressed_flops import PARTS

if TYPE_CHECKING:
    from kvscope.harness.backends.deepseek_v4.methods import OverEntries

HELD = ("csa_kv", "indexer_keys", "hca_kv")
GIB, GFLOP = 2**30, 10**9


def held_bytes(shape: CompressedModelShape, method: "OverEntries", n_tokens: int) -> dict[str, int]:
    """Return device bytes by kind after a prompt, and what the method keeps to choose by (``choosing``).

    Windows and pending tokens, of a fixed size, are left out as in the paper's figures. Where the method's choice
    depends on the data, it is the most that can be kept.

    Raises:
        ValueError: the engine's packing is not known for these head sizes.
    """
    packed = released_cache(shape)
    if packed is None:
        raise ValueError(f"no packing of entries of {shape.head_dim} and keys of {shape.index_key_dim} is known")
    kinds = packed.by_kind(n_tokens, n_resident_entries=method.n_kept(n_tokens))
    return {**{kind: kinds[kind] for kind in HELD}, "choosing": method.choosing(n_tokens).metadata_bytes}


def step_flops_by_part(shape: CompressedModelShape, method: "OverEntries", n_tokens: int) -> dict[str, int]:
    """Return FLOPs of the decode step after a prompt by part, and a step's share of choosing (``choosing``)."""
    parts = shape.step.by_part(shape.cache, n_tokens, n_resident_entries=method.n_kept(n_tokens))
    return {**parts, "choosing": method.choosing(n_tokens).attention_flops_per_step}


def released_tables(shape: CompressedModelShape, methods: "Sequence[OverEntries]", n_tokens: int) -> list[str]:
    """Return the tables of bytes and of FLOPs, each under its title; none where the packing is not known."""
    packed = released_cache(shape)
    if packed is None or not methods:
        return []
    dense_entries = n_tokens // packed.csa_rate
    dense_bytes = sum(packed.by_kind(n_tokens).values())
    dense_flops = sum(shape.step.by_part(shape.cache, n_tokens, n_resident_entries=dense_entries).values())
    held = [(each.label, list(held_bytes(shape, each, n_tokens).values())) for each in methods]
    computed = [(each.label, list(step_flops_by_part(shape, each, n_tokens).values())) for each in methods]
    return [
        f"Bytes on the released engine after {n_tokens:,} tokens, GiB (analytic: nothing here runs fp8);",
        f"{packed.entry_bytes} B an entry, {packed.key_bytes} B a key, windows left out",
        _table([*HELD, "choosing"], held, unit=GIB, digits=3, whole=dense_bytes),
        "",
        f"FLOPs of a decode step there, GFLOP (analytic); top-{shape.step.top_k} attended, a multiply-add is two",
        _table([*PARTS, "choosing"], computed, unit=GFLOP, digits=2, whole=dense_flops),
        "",
    ]


def _table(items: list[str], rows: list[tuple[str, list[int]]], *, unit: int, digits: int, whole: int) -> str:
    texts = [
        [label, *(f"{value / unit:,.{digits}f}" for value in [*values, sum(values)]), f"{sum(values) / whole:.1%}"]
        for label, values in rows
    ]
    header = ["method", *(item.replace("_", " ") for item in items), "total", "of dense"]
    aligned = ("left", *("right" for _ in header[1:]))
    return tabulate(texts, headers=header, tablefmt="simple", disable_numparse=True, colalign=aligned)
