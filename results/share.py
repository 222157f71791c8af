"""lsa's share of bytes, as every page and table means it (docs/results.md has the definition in words)."""

import pandas as pd

ACCOUNTINGS = {
    "kv": "KV alone",
    "all": "KV, metadata and indexer keys",
}
"""What counts as held -> in words. ``all`` is the share; ``kv`` leaves out what the paper's printed figures do."""


def prompt_shares(rows: pd.DataFrame, *, accounting: str = "all") -> "pd.Series[float]":
    """Return a method's bytes on the device over dense's for the same prompt, a value for each row.

    Both are the ledger's means over the decode steps. A cell's share is the mean of its prompts'.

    Args:
        rows: measured rows with ``resident_kv_bytes``, ``metadata_bytes`` and ``dense_kv_bytes``.
        accounting: one of ``ACCOUNTINGS``.
    """
    held = rows["resident_kv_bytes"].astype("float64")
    if accounting == "all":
        held = held + rows["metadata_bytes"].astype("float64")
    elif accounting != "kv":
        raise ValueError(f"there is no accounting {accounting!r}")
    return held / rows["dense_kv_bytes"].astype("float64")
