"""Draw the two pictures of docs/architecture.md: the rooms, and a prompt's way.

python docs/figures/architecture.py
"""

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HERE = Path(__file__).parent
INK, SOFT, PAPER, ACCENT = "#1f2a37", "#5b6776", "#eef2f7", "#d8e6f5"


def canvas(width_in: float, height_in: float) -> tuple[Figure, Axes]:
    """A figure whose data units are inches."""
    figure = Figure(figsize=(width_in, height_in))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width_in), ylim=(0, height_in))
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, *, name: str, text: str, fill: str) -> None:
    """A box with its lower left corner at (x, y); the name on top, what it does below."""
    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=SOFT, linewidth=0.8))
    middle = x + width / 2
    name_y = y + height - 0.2 if text else y + height / 2
    axes.text(middle, name_y, name, ha="center", va="center", fontsize=10, fontweight="bold", color=INK)
    axes.text(middle, y + (height - 0.28) / 2, text, ha="center", va="center", fontsize=8, color=SOFT, linespacing=1.25)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """An arrow between two points, with its text beside its middle."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": SOFT, "linewidth": 1})
    if text:
        middle = ((start[0] + end[0]) / 2 + 0.08, (start[1] + end[1]) / 2)
        axes.text(*middle, text, ha="left", va="center", fontsize=8, color=SOFT)


def rooms() -> Figure:
    """The rooms as layers: a file imports from its own room and from rooms below."""
    figure, axes = canvas(8, 6.5)
    box(axes, 0.2, 5.85, 7.6, 0.5, name="cli.py", text="", fill=PAPER)
    axes.add_patch(FancyBboxPatch((0.2, 2.0), 5.7, 3.7, boxstyle="round,pad=0,rounding_size=0.06", facecolor="none",
                                  edgecolor=SOFT, linewidth=0.8, linestyle="--"))  # fmt: skip
    axes.text(0.35, 5.52, "harness/", fontsize=10, fontweight="bold", color=INK, va="center")
    half = 2.6
    box(axes, 0.35, 4.7, half, 0.65, name="info", text="list, show, doctor", fill=ACCENT)
    box(axes, 3.15, 4.7, half, 0.65, name="studies", text="attention, ranks, same answers", fill=ACCENT)
    box(axes, 0.35, 4.0, half, 0.65, name="reference_model", text="weights, training, controls", fill=ACCENT)
    box(axes, 3.15, 4.0, half, 0.65, name="indexers", text="collection, lsa, dsa", fill=ACCENT)
    box(axes, 0.35, 3.4, 5.4, 0.55, name="passes", text="plan, accuracy, footprint, limits, worker", fill=ACCENT)
    box(axes, 0.35, 2.75, 5.4, 0.55, name="backends", text="a folder for each kind of cache", fill=ACCENT)
    box(axes, 0.35, 2.1, 3.4, 0.55, name="engine", text="models, prefill, decode, graphs", fill=ACCENT)
    box(axes, 3.95, 2.1, 1.8, 0.55, name="served", text="requests, probe", fill=ACCENT)
    box(axes, 6.1, 2.0, 1.7, 3.7, name="reports", text="tables\nfigures\nreport.html", fill=PAPER)
    box(axes, 0.2, 1.25, 4.0, 0.6, name="methods", text="a folder a method; store and kernels", fill=PAPER)
    box(axes, 4.4, 1.25, 3.4, 0.6, name="tasks", text="prompts of exact lengths", fill=PAPER)
    box(axes, 0.2, 0.55, 7.6, 0.6, name="results", text="rows, store, statistics, reference runs", fill=PAPER)
    axes.text(4, 0.25, "specs, units and errors lie below all. Imports point down, never up.", ha="center", fontsize=9,
              color=INK)  # fmt: skip
    return figure


def way() -> Figure:
    """A prompt's way: one prefill, then every method; beside it the fresh process that measures memory."""
    figure, axes = canvas(8, 6.3)
    box(axes, 2.6, 5.55, 2.8, 0.6, name="plan", text="cells, bytes, what cannot run", fill=PAPER)
    axes.text(2.0, 5.15, "accuracy pass", ha="center", fontsize=9, color=INK, style="italic")
    axes.text(6.2, 5.15, "footprint pass", ha="center", fontsize=9, color=INK, style="italic")
    arrow(axes, (3.1, 5.55), (2.3, 4.95))
    arrow(axes, (4.9, 5.55), (5.9, 4.95))
    box(axes, 0.3, 4.3, 3.6, 0.65, name="task", text="a prompt of exact length, answers, evidence", fill=PAPER)
    arrow(axes, (2.1, 4.3), (2.1, 4.0), "all tokens but the last")
    box(axes, 0.3, 3.3, 3.6, 0.7, name="prefill, once", text="layer by layer: one layer's KV on the GPU", fill=ACCENT)
    arrow(axes, (2.1, 3.3), (2.1, 3.0))
    box(axes, 0.3, 2.3, 3.6, 0.7, name="PromptKV", text="read-only pages in host memory", fill=ACCENT)
    for x in (0.85, 2.1, 3.35):
        arrow(axes, (2.1, 2.3), (x, 2.0))
    for x, name in ((0.3, "dense"), (1.55, "lsa"), (2.8, "...")):
        box(axes, x, 1.25, 1.1, 0.75, name=name, text="open, decode,\nscore" if name != "..." else "each method",
            fill=PAPER)  # fmt: skip
        arrow(axes, (x + 0.55, 1.25), (x + 0.55, 0.85))
    box(axes, 4.6, 4.3, 3.2, 0.65, name="a fresh process", text="one method, one length", fill=PAPER)
    arrow(axes, (6.2, 4.3), (6.2, 4.0))
    box(axes, 4.6, 3.3, 3.2, 0.7, name="load, capture", text="NVML baseline without a cache", fill=ACCENT)
    arrow(axes, (6.2, 3.3), (6.2, 3.0))
    box(axes, 4.6, 2.3, 3.2, 0.7, name="prefill, decode", text="NVML, torch and ledger; times", fill=ACCENT)
    arrow(axes, (6.2, 2.3), (6.2, 2.0))
    box(axes, 4.6, 1.25, 3.2, 0.75, name="verdict", text="freed, offloaded, resident\nor mismatch", fill=PAPER)
    arrow(axes, (6.2, 1.25), (6.2, 0.85))
    box(
        axes, 0.3, 0.2, 7.5, 0.65, name="rows on disk, at once", text="then tables, figures and report.html", fill=PAPER
    )
    return figure


def main() -> None:
    """Write both pictures beside this file."""
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "kvscope", "font.family": "sans-serif"})
    for name, figure in (("rooms", rooms()), ("prompt_way", way())):
        figure.savefig(HERE / f"{name}.svg", metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
