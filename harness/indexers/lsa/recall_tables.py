"""What ``kvscope lsa eval`` writes: golden recall against the fraction kept, as tables and as a figure."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from kvscope.files import whole_file
from kvscope.harness.indexers.tables import write_tables
from kvscope.units import format_length

POLICIES = ("indexer", "oracle", "recency", "random")
FIGURE_STEM = "recall"
COLUMNS = ("length_tokens", "task", "policy", "setting", "value", "kept_fraction", "kept_bytes_fraction", "recall",
           "refreshes", "refreshes_needing")  # fmt: skip


def write_recall(folder: Path, rows: Sequence[dict[str, Any]], about: Mapping[str, Any]) -> None:
    """Write the tables and the figure into a folder, which is made."""
    write_tables(
        folder, rows, about, columns=COLUMNS, title="Golden recall against the fraction kept", summary=summary_text
    )
    draw(folder, rows)


def summary_text(rows: Iterable[dict[str, Any]], *, tablefmt: str = "simple") -> str:
    """Return recall per length at common fractions for each policy, and the indexer at each threshold."""
    rows = [row for row in rows if row["task"] == "all"]
    lengths = sorted({row["length_tokens"] for row in rows})
    wanted = [("fraction", 0.05), ("fraction", 0.1), ("fraction", 0.135), ("fraction", 0.2)]
    wanted += [("threshold", value) for value in (0.3, 0.5, 0.7)]
    table = []
    for policy in POLICIES:
        for setting, value in wanted:
            cells = []
            for length in lengths:
                match = [r for r in rows if (r["length_tokens"], r["policy"], r["setting"], r["value"])
                         == (length, policy, setting, value)]  # fmt: skip
                cells.append(_cell(match[0]) if match else "")
            if any(cells):
                table.append([policy, f"{setting} {value:g}", *cells])
    header = ["policy", "setting", *(format_length(n) for n in lengths)]
    text = tabulate(table, headers=header, tablefmt=tablefmt, disable_numparse=True)
    return f"{text}\n\nEach cell: golden recall at the fraction of prompt KV bytes kept, everything counted."


def _cell(row: dict[str, Any]) -> str:
    recall = "-" if row["recall"] is None else f"{row['recall']:.1%}"
    return f"{recall} at {row['kept_bytes_fraction']:.1%}"


def draw(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw recall over kept fraction, one panel a length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row["task"] == "all" and row["setting"] == "fraction" and row["recall"] is not None]
    lengths = sorted({row["length_tokens"] for row in rows})
    if not lengths:
        return
    figure, axes = pyplot.subplots(1, len(lengths), figsize=(3.2 * len(lengths), 3.2), sharey=True, squeeze=False)
    for axis, length in zip(axes[0], lengths, strict=True):
        for policy in POLICIES:
            points = [(r["kept_bytes_fraction"], r["recall"]) for r in rows
                      if (r["length_tokens"], r["policy"]) == (length, policy)]  # fmt: skip
            axis.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=policy)
        axis.axhline(0.95, color="0.7", linewidth=0.8, zorder=0)
        axis.set(xscale="log", title=f"{format_length(length)} tokens", xlabel="fraction of KV bytes kept")
    axes[0][0].set_ylabel("golden recall")
    axes[0][-1].legend(frameon=False)
    figure.tight_layout()
    for suffix in ("svg", "png"):
        with whole_file(folder / f"{FIGURE_STEM}.{suffix}") as temporary:
            figure.savefig(temporary, dpi=150, format=suffix)
    pyplot.close(figure)
