"""Checks of FlashMemory's bytes: the full cache, the pruned one in three accountings, and the deployed set."""

from kvscope.harness.engine.presets import preset_config
from kvscope.harness.studies.flashmemory.check import Check, Group
from kvscope.methods.compressed_bytes import FLASH_FP8
from kvscope.methods.lsa import printed as paper
from kvscope.units import format_length

HALF_DIGIT_GB = 0.005
"""Table 1 prints GB to two digits."""
GIB, GB = 2**30, 10**9
ENTRY_AND_KEY_BYTES = FLASH_FP8.entry_bytes + FLASH_FP8.key_bytes


def memory_groups() -> list[Group]:
    """Return the checks of bytes."""
    return [
        Group(title="Full cache by the model's geometry", checks=full_cache()),
        Group(title="Pruned cache over the full one", checks=(*shares(), *means(), *savings())),
        Group(title="Set that stays on the GPU as deployed", checks=deployed()),
        Group(title="Example of Llama-2-7B", checks=example()),
    ]


def full_cache() -> tuple[Check, ...]:
    """Return the nine rows of the dense column."""
    return tuple(
        Check(
            key=f"full_cache_{row.label.replace(' ', '_')}",
            what=f"full cache, {row.label}",
            printed=row.dense_gb,
            recomputed=(gib := FLASH_FP8.bytes_per_token * row.tokens / GIB),
            unit="GB",
            printed_digits=2,
            digits=3,
            meaning=f"{FLASH_FP8.bytes_per_token:,.0f} B a token and 2^30 bytes a GB give the row, "
            f"{abs(gib / row.dense_gb - 1):.1%} off.",
            source=paper.TABLE_1_SOURCE,
        )
        for row in paper.TABLE_1
    )


def shares() -> tuple[Check, ...]:
    """Return the nine ratios as printed, beside those with what the printed figure leaves out."""
    return tuple(
        Check(
            key=f"share_{row.label.replace(' ', '_')}",
            what=f"share kept, {row.label}",
            printed=100 * row.lsa_gb / row.dense_gb,
            recomputed=100 * paper.pruned_fractions(row)["with_hca_and_keys"],
            unit="%",
            meaning=f"{row.lsa_gb:.2f} of {row.dense_gb:.2f} GB, of which rounding allows {low:.1f} to {high:.1f} %; "
            "HCA entries and the indexed layers' keys add the rest.",
            source=paper.TABLE_1_SOURCE,
        )
        for row in paper.TABLE_1
        for low, high in [share_bounds_percent(row)]
    )


def share_bounds_percent(row: paper.PaperRow) -> tuple[float, float]:
    """Return the least and the most that rounding to two digits allows of a row's ratio, in %."""
    return (
        100 * (row.lsa_gb - HALF_DIGIT_GB) / (row.dense_gb + HALF_DIGIT_GB),
        100 * (row.lsa_gb + HALF_DIGIT_GB) / (row.dense_gb - HALF_DIGIT_GB),
    )


def means() -> tuple[Check, ...]:
    """Return the claimed 13.5 % beside both means of the table, and beside the fuller accountings."""
    rows = paper.TABLE_1
    bounds = [share_bounds_percent(row) for row in rows]
    low, high = (sum(ends) / len(rows) for ends in zip(*bounds, strict=True))
    kept_gb, full_gb = sum(row.lsa_gb for row in rows), sum(row.dense_gb for row in rows)
    mean = {
        name: 100 * sum(paper.pruned_fractions(row)[name] for row in rows) / len(rows)
        for name in ("printed", "with_hca", "with_hca_and_keys")
    }

    def claim(key: str, what: str, recomputed: float, meaning: str) -> Check:
        return Check(
            key=key, what=what, printed=paper.CLAIMED_SHARE_PERCENT, recomputed=recomputed, unit="%", digits=2,
            meaning=meaning, source=paper.ABSTRACT,
        )  # fmt: skip

    return (
        claim(
            "mean_of_ratios", "mean of the nine ratios", mean["printed"],
            f"The claim is the mean of the nine ratios, of which rounding allows {low:.1f} to {high:.1f} %.",
        ),
        claim(
            "ratio_of_means", "ratio of the two averages", 100 * kept_gb / full_gb,
            f"All rows together keep {kept_gb:.2f} of {full_gb:.2f} GB: the claim's mean weighs short rows as long "
            "ones.",
        ),
        claim(
            "mean_with_hca", "mean of the ratios, HCA entries counted", mean["with_hca"],
            f"HCA entries stay whatever is chosen, {FLASH_FP8.hca_bytes_per_token:.2f} B a token.",
        ),
        claim(
            "mean_with_hca_and_keys", "mean of the ratios, index keys counted, too", mean["with_hca_and_keys"],
            f"The {paper.N_INDEXED_LAYERS} indexed layers' keys stay to be scored, {indexed_key_bytes_per_token():.0f} "
            "B a token.",
        ),
    )  # fmt: skip


def savings() -> tuple[Check, ...]:
    """Return the claim of over 90 % at 500K for the three longest rows."""
    return tuple(
        Check(
            key=f"saving_{row.label.replace(' ', '_')}",
            what=f"saving, {row.label}",
            printed=paper.CLAIMED_SAVING_PERCENT,
            recomputed=100 * (1 - row.lsa_gb / row.dense_gb),
            unit="%",
            printed_digits=0,
            digits=2,
            meaning=f"Rounding allows {100 - high:.1f} to {100 - low:.1f} %, so that more than 90 % "
            + ("holds." if 100 - high > paper.CLAIMED_SAVING_PERCENT else "cannot be decided from the table."),
            source=paper.ABSTRACT,
        )
        for row in sorted(paper.TABLE_1, key=lambda row: row.tokens)[-3:]
        for low, high in [share_bounds_percent(row)]
    )


def indexed_key_bytes_per_token() -> float:
    """Return the bytes of the indexed layers' own keys a token."""
    return paper.N_INDEXED_LAYERS * FLASH_FP8.key_bytes / FLASH_FP8.csa_rate


def deployed_bytes(served: paper.Served) -> dict[str, float]:
    """Return what a stream keeps under the deployed rule: the recalled pages, HCA entries, and keys of what is not
    recalled in the indexed layers.
    """
    entries, kept = served.tokens // FLASH_FP8.csa_rate, served.recalled_pages * paper.PAGE_ENTRIES
    return {
        "recalled": kept * FLASH_FP8.n_csa * ENTRY_AND_KEY_BYTES,
        "hca": served.tokens * FLASH_FP8.hca_bytes_per_token,
        "keys": (entries - kept) * paper.N_INDEXED_LAYERS * FLASH_FP8.key_bytes,
    }


def deployed() -> tuple[Check, ...]:
    """Return 0.37 GB at 1M tokens, and its share of the full cache with and without what it leaves out."""
    served = paper.SERVED[-1]
    held = deployed_bytes(served)
    full = FLASH_FP8.bytes_per_token * served.tokens
    lengths = ", ".join(format_length(each.tokens) for each in paper.SERVED)
    return (
        Check(
            key="deployed_gb",
            what="KV of a stream at 1M tokens",
            printed=paper.DEPLOYED_GB,
            recomputed=held["recalled"] / GB,
            unit="GB",
            printed_digits=2,
            digits=4,
            meaning=f"It is {served.recalled_pages} pages x {paper.PAGE_ENTRIES} entries x {FLASH_FP8.n_csa} layers x "
            f"{ENTRY_AND_KEY_BYTES} B with 10^9 bytes a GB: no HCA entries, no index keys of the rest.",
            source=paper.DEPLOYED_SOURCE,
        ),
        Check(
            key="deployed_share_recalled",
            what="share of the full cache, recalled pages alone",
            printed=paper.DEPLOYED_SHARE_PERCENT,
            recomputed=100 * held["recalled"] / full,
            unit="%",
            printed_digits=0,
            digits=2,
            meaning=f"K_max grows with the context, so the share is the same at {lengths}.",
            source=paper.DEPLOYED_RATIO_SOURCE,
        ),
        Check(
            key="deployed_share_all",
            what="share of the full cache, HCA entries and index keys counted",
            printed=paper.DEPLOYED_SHARE_PERCENT,
            recomputed=100 * sum(held.values()) / full,
            unit="%",
            printed_digits=0,
            digits=2,
            meaning=f"A stream holds {sum(held.values()) / GB:.2f} of {full / GB:.2f} GB; the share is the same at "
            f"{lengths}.",
            source=paper.DEPLOYED_RATIO_SOURCE,
        ),
    )


def example() -> tuple[Check, ...]:
    """Return the example of Llama-2-7B: 40 GB that become 5.4."""
    config = preset_config(paper.EXAMPLE_PRESET)
    head_dim = config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * 2
    tokens = paper.EXAMPLE_DENSE_GB * GB / bytes_per_token
    return (
        Check(
            key="example_bytes_per_token",
            what="KV of a token",
            printed=paper.EXAMPLE_BYTES_PER_TOKEN,
            recomputed=bytes_per_token,
            unit="B",
            printed_digits=0,
            digits=0,
            meaning=f"Keys and values of {config.num_hidden_layers} layers x {config.num_key_value_heads} heads x "
            f"{head_dim} x 2 bytes.",
            source=paper.EXAMPLE_SOURCE,
        ),
        Check(
            key="example_pruned_gb",
            what=f"{paper.CLAIMED_SHARE_PERCENT} % of {paper.EXAMPLE_DENSE_GB:.0f} GB",
            printed=paper.EXAMPLE_LSA_GB,
            recomputed=paper.EXAMPLE_DENSE_GB * paper.CLAIMED_SHARE_PERCENT / 100,
            unit="GB",
            digits=2,
            meaning="The arithmetic holds; whether the share carries over to another model is what a run measures.",
            source=paper.EXAMPLE_SOURCE,
        ),
        Check(
            key="example_dense_gb",
            what=f"KV of {paper.EXAMPLE_TOKENS:,} tokens",
            printed=paper.EXAMPLE_DENSE_GB,
            recomputed=paper.EXAMPLE_TOKENS * bytes_per_token / GB,
            unit="GB",
            printed_digits=0,
            digits=0,
            meaning=f"{paper.EXAMPLE_DENSE_GB:.0f} GB are {tokens:,.0f} tokens of this model, not 500K.",
            source=paper.EXAMPLE_SOURCE,
        ),
    )
