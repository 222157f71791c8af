"""Writing a table as CSV, Parquet, Markdown and LaTeX, and a figure as PNG, SVG and CSV.

The same rows give the same bytes: no dates, no random ids.
"""

import json
import re
from pathlib import Path

import pandas as pd

from kvscope.reports.figure_parts import ReportFigure
from kvscope.reports.table_parts import Table
from kvscope.reports.theme import PNG_DPI, theme
from kvscope.results.plain_text import visible

PNG_LEVEL = 3
"""Of zlib: a tenth larger than at the usual 6, in a third of the time. The picture is the same."""
_WIDE_TEXT = 26
# What begins code, emphasis, HTML, an entity, a formula, a cell, a link's address, or at the start a heading or a list.
_MARKDOWN = re.compile(r"[\\`*<>|~$]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|\](?=[(\[:])|^[#+-](?=\s)")
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "`": r"\textasciigrave{}",
    }
)


def write_table(table: Table, folder: Path) -> list[Path]:
    """Write `table` in four formats; returns the paths."""
    paths = [folder / f"{table.name}.{ending}" for ending in ("csv", "parquet", "md", "tex")]
    write_csv(table.data, paths[0])
    _flat(table.data).to_parquet(paths[1], index=False)
    paths[2].write_text(markdown(table), encoding="utf-8")
    paths[3].write_text(latex(table), encoding="utf-8")
    return paths


def write_figure(figure: ReportFigure, folder: Path) -> list[Path]:
    """Write `figure` as PNG and SVG with the rows behind it; returns the paths."""
    paths = [folder / f"{figure.name}.{ending}" for ending in ("png", "svg", "csv")]
    with theme(figure.name):
        packed = {"compress_level": PNG_LEVEL}
        figure.figure.savefig(paths[0], dpi=PNG_DPI, metadata={"Software": "kvscope"}, pil_kwargs=packed)
        figure.figure.savefig(paths[1], metadata={"Date": None, "Creator": "kvscope", "Title": figure.title})
    write_csv(figure.data, paths[2])
    return paths


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


def latex(table: Table) -> str:
    """The text form as a booktabs table; needs `\\usepackage{booktabs}` and nothing else."""
    text = table.text
    spec = "".join(
        "p{4cm}" if max((len(cell) for cell in text[column]), default=0) > _WIDE_TEXT else "l"
        for column in text.columns
    )
    rows = [" & ".join(_tex(cell) for cell in row) + r" \\" for row in text.itertuples(index=False)]
    return "\n".join(
        [
            "% Needs \\usepackage{booktabs}. Wide tables: put it into \\begin{landscape} or scale it.",
            r"\begin{table}",
            r"\centering\footnotesize",
            rf"\caption{{{_tex(table.caption)}}}",
            rf"\label{{tab:{table.name}}}",
            rf"\begin{{tabular}}{{{spec}}}",
            r"\toprule",
            " & ".join(_tex(column) for column in text.columns) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
            *(rf"\par {_tex(note)}" for note in table.notes),
            r"\end{table}",
            "",
        ]
    )


def _tex(text: object) -> str:
    escaped = _one_line(text).translate(_LATEX)
    # Behind the end of a row a bracket would be its option.
    return f"{{[}}{escaped[1:]}" if escaped.startswith("[") else escaped


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
