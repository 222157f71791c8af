"""Writing a table as CSV, Parquet, Markdown and LaTeX, and a figure as PNG, SVG and CSV.

The same rows give the same bytes: no dates, no random ids.
"""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from kvscope.reports.figure_parts import ReportFigure
from kvscope.reports.hover import with_titles
from kvscope.reports.latex import latex, tex
from kvscope.reports.look import look
from kvscope.reports.table_parts import Table
from kvscope.reports.theme import PNG_DPI, PRINT_DPI, theme
from kvscope.results.plain_text import visible

PNG_LEVEL = 3
"""Of zlib: a tenth larger than at the usual 6, in a third of the time. The picture is the same."""
# What begins code, emphasis, HTML, an entity, a formula, a cell, a link's address, or at the start a heading or a list.
_MARKDOWN = re.compile(r"[\\`*<>|~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|\](?=[(\[:])|^[#+-](?=\s)")


def write_table(table: Table, folder: Path) -> list[Path]:
    """Write `table` in four formats; returns the paths."""
    paths = [folder / f"{table.name}.{ending}" for ending in ("csv", "parquet", "md", "tex")]
    write_csv(table.data, paths[0])
    _flat(table.data).to_parquet(paths[1], index=False)
    paths[2].write_text(markdown(table), encoding="utf-8")
    paths[3].write_text(latex(table), encoding="utf-8")
    return paths


def write_figure(figure: ReportFigure, folder: Path) -> list[Path]:
    """Write `figure` in the formats of the look, with the rows behind it; returns the paths."""
    draw_figure(figure, folder)
    return write_texts(figure, folder)


def draw_figure(figure: ReportFigure, folder: Path) -> None:
    """Write what of ``write_figure`` is no text: pictures for the screen and for print."""
    for ending in look().formats:
        if ending != "svg":
            with theme(figure.name):
                _save(figure, folder / f"{figure.name}.{ending}", ending)


def write_texts(figure: ReportFigure, folder: Path) -> list[Path]:
    """Write what of ``write_figure`` is text, SVG and CSV; returns the paths of all that it writes."""
    paths = [folder / f"{figure.name}.{ending}" for ending in (*look().formats, "csv")]
    for path in paths:
        if path.suffix == ".svg":
            path.write_text(svg_text(figure), encoding="utf-8")
    write_csv(figure.data, paths[-1])
    return paths


def write_includes(figures: Sequence[ReportFigure], folder: Path) -> Path:
    """Write what LaTeX needs to show the PDF figures, captions included; returns the path."""
    lines = [r"% Needs \usepackage{graphicx}; \graphicspath{{FOLDER/}} says where the figures are."]
    for figure in figures:
        lines += [
            r"\begin{figure}",
            r"\centering",
            rf"\includegraphics[width=\linewidth]{{{figure.name}.pdf}}"
            if look().width_in is None
            else rf"\includegraphics{{{figure.name}.pdf}}",
            rf"\caption{{{tex(figure.caption)}}}",
            rf"\label{{fig:{figure.name}}}",
            r"\end{figure}",
        ]
    path = folder / "figures.tex"
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return path


def svg_text(figure: ReportFigure) -> str:
    """Return `figure` as the text of an SVG file."""
    written = io.StringIO()
    with theme(figure.name):
        _save(figure, written, "svg")
    return with_titles(written.getvalue())


def _save(figure: ReportFigure, place: Path | io.StringIO, ending: str) -> None:
    """Write a figure, without a date; an SVG's points have their numbers as titles."""
    about: dict[str, dict[str, Any]] = {
        "png": {
            "dpi": PRINT_DPI if look().is_print else PNG_DPI,
            "metadata": {"Software": "kvscope"},
            "pil_kwargs": {"compress_level": PNG_LEVEL},
        },
        "svg": {"metadata": {"Date": None, "Creator": "kvscope", "Title": figure.title}},
        "pdf": {"metadata": {"CreationDate": None, "Creator": "kvscope", "Title": figure.title}},
    }
    figure.figure.savefig(place, format=ending, **about[ending])


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """Plain CSV: integers whole, other numbers with nine digits, nulls empty."""
    path.write_text(csv_text(frame), encoding="utf-8")


def csv_text(frame: pd.DataFrame) -> str:
    """What `write_csv` writes."""
    text: str = _flat(frame).to_csv(index=False, lineterminator="\n", float_format="%.9g")
    return text


def markdown(table: Table) -> str:
    """The text form as a GitHub-flavoured table with title, caption and notes."""
    body = table.text.map(_md)
    body.columns = [_md(column) for column in table.text.columns]
    grid = body.to_markdown(index=False, disable_numparse=True)
    lines = [f"## {_md(table.title)}", "", grid, "", _md(table.caption)]
    for note in table.notes:
        lines += ["", _md(note)]
    return "\n".join(lines) + "\n"


def _md(text: object) -> str:
    """Text that GitHub-flavoured Markdown shows as it is; within words `_` means nothing and stays."""
    return _MARKDOWN.sub(r"\\\g<0>", _one_line(text))


def _one_line(text: object) -> str:
    return visible(" ".join(str(text).split()))


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    """Settings dicts and target lists as JSON text, so that every column has one plain type."""
    flat = frame.copy()
    for column in flat.columns:
        kinds = {type(value) for value in flat[column].dropna()} if flat[column].dtype == object else set()
        if kinds & {dict, list, tuple}:
            flat[column] = [None if value is None else _json(value) for value in flat[column]]
    return flat


def _json(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
