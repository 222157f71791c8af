"""Checks of FlashMemory's compute and throughput: what the printed FLOPs hold, and what makes the speed-up."""

from kvscope.harness.engine.presets import preset_config
from kvscope.harness.studies.flashmemory.check import Check, Group
from kvscope.methods.compressed_bytes import FLASH_FP8
from kvscope.methods.compressed_flops import CompressedFlops, refresh_flops, step_flops
from kvscope.methods.lsa import printed as paper
from kvscope.units import format_length

GFLOP = 10**9
MODEL = "preset:deepseek-v4-flash"


def serving_groups() -> list[Group]:
    """Return the checks of compute and throughput."""
    config = preset_config(MODEL)
    return [
        Group(
            title="FLOPs of a decode token (8 H20)", checks=flops(step_flops(config), hidden_size=config.hidden_size)
        ),
        Group(title="Throughput (8 H20)", checks=throughput()),
    ]


def flops(step: CompressedFlops, *, hidden_size: int) -> tuple[Check, ...]:
    """Return the constant, both columns by their own formula, and the ratio with the attention itself counted."""
    constant = Check(
        key="flops_constant",
        what="work whatever the context",
        printed=paper.CONSTANT_GFLOP,
        recomputed=2 * step.n_weights / GFLOP,
        unit="GFLOP",
        digits=2,
        meaning="The products with one token's weights give it, attention over the past left out.",
        source=paper.FLOPS_SOURCE,
    )
    return (constant, *(each for served in paper.SERVED for each in _flops_at(served, step, hidden_size)))


def _flops_at(served: paper.Served, step: CompressedFlops, hidden_size: int) -> tuple[Check, ...]:
    length = format_length(served.tokens)
    entries, recalled = served.tokens // FLASH_FP8.csa_rate, served.recalled_pages * paper.PAGE_ENTRIES
    dense, lsa = whole_step(served, step, hidden_size=hidden_size)
    attention = sum(value for part, value in dense.items() if part.endswith("_attention"))
    scores = FLASH_FP8.n_csa * step.scored_entry_flops
    columns = (("dense", served.dense_gflop, entries), ("lsa", served.lsa_gflop, recalled))
    return (
        *(
            Check(
                key=f"flops_{name}_{length}",
                what=f"{name} at {length} by the report's formula",
                printed=gflop,
                recomputed=(formula := (2 * step.n_weights + n_entries * scores) / GFLOP),
                unit="GFLOP",
                digits=2,
                meaning=f"Work whatever the context and the scores of {n_entries:,} entries leave "
                f"{gflop - formula:.1f} GFLOP unexplained.",
                source=paper.FLOPS_SOURCE,
            )
            for name, gflop, n_entries in columns
        ),
        Check(
            key=f"flops_ratio_{length}",
            what=f"lsa over dense at {length}, attention counted",
            printed=served.flop_ratio,
            recomputed=sum(lsa.values()) / sum(dense.values()),
            unit="x",
            printed_digits=2,
            digits=2,
            meaning=f"The printed figures leave out the attention itself, {attention / GFLOP:.1f} GFLOP for both, and "
            f"the scores of the last {paper.RECENCY_TOKENS:,} tokens.",
            source=paper.FLOPS_SOURCE,
        ),
    )


def whole_step(
    served: paper.Served, step: CompressedFlops, *, hidden_size: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Return FLOPs by part of a decode token under dense, and under lsa as deployed, a share of a refresh included."""
    entries = served.tokens // FLASH_FP8.csa_rate
    resident = served.recalled_pages * paper.PAGE_ENTRIES + paper.RECENCY_TOKENS // FLASH_FP8.csa_rate
    heads, key_dim, rank = paper.INDEXER_HEADS, paper.INDEXER_KEY_DIM, paper.INDEXER_RANK
    n_weights = hidden_size * rank + rank * heads * key_dim + hidden_size * heads
    refresh = refresh_flops(n_weights=n_weights, heads=heads, key_dim=key_dim, n_entries=entries)
    dense = step.by_part(FLASH_FP8, served.tokens)
    lsa = step.by_part(FLASH_FP8, served.tokens, n_resident_entries=resident)
    return dense, {**lsa, "choosing": paper.N_INDEXED_LAYERS * refresh // paper.TAU}


def throughput() -> tuple[Check, ...]:
    """Return each speed-up beside the ratio of its throughputs and beside that of its streams alone."""
    return tuple(
        Check(
            key=f"{key}_{format_length(served.tokens)}",
            what=f"{what} at {format_length(served.tokens)}",
            printed=served.speedup,
            recomputed=recomputed,
            unit="x",
            digits=2,
            meaning=meaning,
            source=paper.THROUGHPUT_SOURCE,
        )
        for served in paper.SERVED
        for key, what, recomputed, meaning in _speedup(served)
    )


def _speedup(served: paper.Served) -> list[tuple[str, str, float, str]]:
    dense_rate = served.dense_tokens_per_s / served.dense_streams
    lsa_rate = served.lsa_tokens_per_s / served.lsa_streams
    return [
        (
            "speedup",
            "ratio of the throughputs",
            served.lsa_tokens_per_s / served.dense_tokens_per_s,
            f"{served.lsa_tokens_per_s:,} over {served.dense_tokens_per_s:,} tokens a second.",
        ),
        (
            "streams",
            "ratio of the streams alone",
            served.lsa_streams / served.dense_streams,
            f"{served.lsa_streams} over {served.dense_streams} streams; one decodes at {lsa_rate:.1f} against "
            f"{dense_rate:.1f} tokens a second, {lsa_rate / dense_rate:.2f}x.",
        ),
    ]
