"""The figure of attention on the evidence by length, from the CSV of ``kvscope study attention-mass``.

    kvscope study attention-figure mass.csv --out FOLDER

writes ``attention_on_evidence.png``, ``.svg`` and ``.csv``.
"""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from kvscope.errors import UsageError
from kvscope.files import make_folder, writing
from kvscope.reports.canvas import Margins, panels, title_band_in
from kvscope.reports.export import write_figure
from kvscope.reports.figure_parts import ReportFigure, key_entry, length_axis
from kvscope.reports.theme import COLORS, DENSE_COLOR, FAINT, theme
from kvscope.results.statistics import mean_interval

NAME, TITLE = "attention_on_evidence", "Attention on the evidence by length"
KEYS = ["task", "length_tokens"]
NEEDED = {"model", *KEYS, "sample", "seed", "prompt_tokens", "evidence_tokens", "evidence_mass", "answer_mass"}
NEEDED |= {"evidence_peak", "answer_peak"}
_KEY_IN = 8.0
"""Width that the key needs."""
# (column of the summary, words for the key, marker, line, colour)
LINES = (
    ("evidence_peak_max", "best head, over the question", "^", "-", COLORS[1]),
    ("evidence_mass_max", "best head, answer's first step", "o", "-", DENSE_COLOR),
    ("evidence_mass_mean", "mean head, same step", "s", "--", COLORS[0]),
)


def attention_cells(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per task and length: the mass on the evidence, over prompts, with 95 % bootstrap intervals.

    Fractions in [0, 1]. Columns are those of the measured CSV, ``.._max`` of each prompt's head with most, ``.._mean``
    of all its heads. ``uniform_share`` is the evidence's share of the prompt: the mass if every token got the same.
    """
    found = []
    for (task, length), cell in rows.groupby(KEYS, sort=False):
        row: dict[str, object] = {"task": task, "length_tokens": length}
        prompts = cell.groupby(["seed", "sample"], sort=True)
        row["n"] = prompts.ngroups
        for name in ("evidence_mass", "answer_mass", "evidence_peak", "answer_peak"):
            for how in ("max", "mean"):
                values = prompts[name].agg(how).dropna()
                if len(values):
                    interval = mean_interval(list(values))
                    row[f"{name}_{how}"] = interval.mean
                    row[f"{name}_{how}_low"], row[f"{name}_{how}_high"] = interval.low, interval.high
        first = prompts[["evidence_tokens", "prompt_tokens"]].first()
        row["uniform_share"] = float((first["evidence_tokens"] / first["prompt_tokens"]).mean())
        found.append(row)
    order = {task: place for place, task in enumerate(dict.fromkeys(rows["task"]))}
    made = pd.DataFrame(found)
    return made.sort_values(
        KEYS, key=lambda column: column.map(order) if column.name == "task" else column, ignore_index=True
    )


def attention_figure(rows: pd.DataFrame) -> ReportFigure:
    """Draw the mass on the evidence against length, one panel a task, both axes logarithmic."""
    cells = attention_cells(rows)
    tasks = list(dict.fromkeys(cells["task"]))
    lengths = sorted(set(cells["length_tokens"]))
    counts = sorted(set(cells["n"]))
    n_text = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]}-{counts[-1]}"
    models = ", ".join(dict.fromkeys(rows["model"]))
    key = [key_entry(words, marker=marker, line="-", color=color) for _, words, marker, _, color in LINES]
    key.append(key_entry("uniform attention", line=":", color=FAINT))
    columns, margins = min(3, len(tasks)), Margins(left=0.85, right=0.25, top=title_band_in(tasks), bottom=0.6)
    low = min(float(cells["uniform_share"].min()), float(cells["evidence_mass_mean"].min())) / 2
    with theme(NAME):
        figure, all_axes = panels(
            len(tasks),
            columns=columns,
            width_in=max(3.4, _KEY_IN / columns - margins.left - margins.right),
            height_in=2.3,
            margins=margins,
            title=TITLE,
            subtitle=f"{models}; dense, layers with full attention; {n_text} prompts a point; bars: 95 % intervals",
            key=key,
        )
        for task, axes in zip(tasks, all_axes, strict=True):
            _panel(axes, cells[cells["task"] == task], low=low)
            length_axis(axes, lengths)
            axes.set_title(task, fontweight="bold")
    caption = (
        "Share of a head's attention that falls on the evidence, by length, dense, over the heads of the layers with "
        "full attention: the head with most at any token of the question (a model may look the answer up while it "
        "reads the question), the head with most at the first step of the answer, and the mean over heads at that "
        "step; means over prompts with 95 % bootstrap intervals. Dotted: the evidence's share of the prompt, which "
        "attention without any preference would give it."
    )
    return ReportFigure(NAME, TITLE, caption, figure, cells)


def _panel(axes: Axes, cells: pd.DataFrame, *, low: float) -> None:
    x = cells["length_tokens"].to_numpy(float)
    axes.plot(x, cells["uniform_share"].to_numpy(float), color=FAINT, linestyle=":", linewidth=1.2)
    for column, _, marker, line, color in LINES:
        axes.plot(
            x,
            cells[column].to_numpy(float),
            color=color,
            marker=marker,
            linestyle=line,
            linewidth=1.4,
            markersize=5.5,
            markeredgecolor="white",
            clip_on=False,
        )
        ends = cells[[f"{column}_low", f"{column}_high"]].to_numpy(float)
        axes.vlines(x, ends[:, 0], ends[:, 1], color=color, linewidth=1.1, alpha=0.55)
    axes.set_yscale("log")
    axes.set_ylim(low, 1.3)
    axes.yaxis.set_major_locator(FixedLocator([tick for tick in (10.0**-k for k in range(8, -1, -1)) if tick >= low]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    axes.set_ylabel("attention on the evidence")


def read_rows(path: Path) -> pd.DataFrame:
    """Read the measured CSV.

    Raises:
        UsageError: no such file, another kind of file, or no row in it.
    """
    try:
        rows = pd.read_csv(path)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UsageError(f"{path} cannot be read as a CSV file of attention masses: {error}.") from error
    lacking = sorted(NEEDED - set(rows.columns))
    if lacking:
        raise UsageError(f"{path} is no CSV of `kvscope study attention-mass`: it lacks {', '.join(lacking)}.")
    if not len(rows):
        raise UsageError(f"{path} holds no row: nothing was measured.")
    return rows


def write_attention_figure(csv: Path, folder: Path) -> list[Path]:
    """Draw the figure of one CSV into a folder; return the files written.

    Raises:
        UsageError: the CSV cannot be used, or the folder cannot be made.
    """
    figure = attention_figure(read_rows(csv))
    make_folder(folder)
    with writing(folder):
        return write_figure(figure, folder)
