"""Ties: answers whose best token was ahead by less than the noise between steps of different sizes."""

import pandas as pd

from kvscope.results.frames import Run


def tie_notes(run: Run) -> tuple[str, ...]:
    """Return a sentence on how many rows are ties, by method; none where every answer had steps of its own."""
    shared = run.samples[run.samples["batch"].fillna(1).astype("int64") > 1]
    if shared.empty:
        return ()
    by_method = {}
    for label, group in shared.groupby("method_label", sort=False):
        n = _count(group)
        if n:
            by_method[str(label)] = f"{label} {n:,} of {len(group):,}"
    listed = f" ({', '.join(by_method.values())})" if by_method else ""
    known = shared["tie"].notna()
    if not known.any():
        return (f"{len(shared):,} answers shared their steps with others; how many are ties was not measured.",)
    return (
        f"Ties: {_count(shared):,} of {int(known.sum()):,} rows{listed}. Their answers shared steps with up to "
        f"{int(shared['batch'].max()) - 1} others; a tie's best token was ahead by less than rounding, and "
        "steps of its own may answer it otherwise.",
    )


def _count(rows: pd.DataFrame) -> int:
    return int(rows["tie"].fillna(value=False).astype(bool).sum())
