"""A table as LaTeX that fits the width of the text: booktabs, and a longtable where it has many rows.

Widths are estimates: lengths of words in Computer Modern's average character. Columns get shares of `\\linewidth`;
where not even single words fit at the smallest size, the table goes on below with the columns that did not, the first
one repeated.
"""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from kvscope.reports.table_parts import Table
from kvscope.results.plain_text import visible

TEXT_WIDTH_PT = 345.0
"""Of article in 10 pt: the narrowest of the usual classes with one column. Wider ones leave columns more room."""
MOST_FLOAT_ROWS = 30
"""Longer tables break over pages."""
_SIZES = ((r"\footnotesize", 8.0), (r"\scriptsize", 7.0))
_CHARACTER = 0.58
"""Width of a word of Computer Modern over its characters and its size, generous: digits have 0.5, capitals 0.7."""
_GAP_PT = 6.0
_NEEDS = r"% Needs \usepackage{booktabs,array,longtable}."
_SPECIAL = str.maketrans(
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
#: Where a name may go on in the next line.
_BREAK = re.compile(r"(?<=\S\S)([:=/_]|,(?=\D))(?=\S)")


def latex(table: Table) -> str:
    """The text form as LaTeX; needs `booktabs`, `array` and `longtable`."""
    text = table.text.astype(str)
    size, points, blocks = _layout(text)
    label = table.name
    parts = [_NEEDS]
    for place, block in enumerate(blocks):
        columns = [str(text.columns[i]) for i in block]
        rows = [[row[i] for i in block] for row in text.itertuples(index=False, name=None)]
        spec = _spec(text.iloc[:, block], points)
        caption = table.caption if place == 0 else f"{table.title}, continued."
        name = label if place == 0 else f"{label}:{place + 1}"
        notes = table.notes if place == len(blocks) - 1 else ()
        make = _long if len(rows) > MOST_FLOAT_ROWS else _float
        parts += make(columns, rows, spec=spec, size=size, caption=caption, label=name, notes=notes)
    return "\n".join([*parts, ""])


def _layout(text: pd.DataFrame) -> tuple[str, float, list[list[int]]]:
    """Return (command of the size, its points, columns of each block): the largest size at which one block will do."""
    whole = [found for found in _SIZES if len(_blocks(text, found[1])) == 1]
    size, points = whole[0] if whole else _SIZES[-1]
    return size, points, _blocks(text, points)


def _blocks(text: pd.DataFrame, points: float) -> list[list[int]]:
    least = [_least_pt(text, i, points) + _GAP_PT for i in range(len(text.columns))]
    blocks: list[list[int]] = [[]]
    used = 0.0
    for i, width in enumerate(least):
        if blocks[-1] and used + width > TEXT_WIDTH_PT:
            blocks.append([0])
            used = least[0]
        blocks[-1].append(i)
        used += width
    return blocks


def _spec(text: pd.DataFrame, points: float) -> str:
    """Columns as wide as they need, or shares of the line that give longer ones more room."""
    n = len(text.columns)
    whole = np.array([_whole_pt(text, i, points) for i in range(n)])
    if whole.sum() + n * _GAP_PT <= TEXT_WIDTH_PT:
        return "@{}" + "l" * n + "@{}"
    least = np.array([_least_pt(text, i, points) for i in range(n)])
    room = TEXT_WIDTH_PT - _GAP_PT * (n - 1)
    # Square roots: a sentence of a thousand characters needs more room than a name, but not fifty times as much.
    wish = np.sqrt(np.maximum(whole - least, 0.0))
    left = max(0.0, room - least.sum())
    widths = least + (left * wish / wish.sum() if wish.sum() else 0.0)
    widths = np.minimum(widths, np.maximum(whole, least))
    columns = [rf">{{\raggedright\arraybackslash}}p{{{width / TEXT_WIDTH_PT:.4f}\linewidth}}" for width in widths]
    return "@{}" + "".join(columns) + "@{}"


def _cells(text: pd.DataFrame, place: int) -> list[str]:
    return [str(text.columns[place]), *(str(cell) for cell in text.iloc[:, place])]


def _whole_pt(text: pd.DataFrame, place: int, points: float) -> float:
    return max(len(cell) for cell in _cells(text, place)) * points * _CHARACTER


def _least_pt(text: pd.DataFrame, place: int, points: float) -> float:
    """Width of the longest word; names break behind `:`, `,`, `=`, `/` and `_`, which stay with what stands before."""
    words = [len(word) for cell in _cells(text, place) for word in _BREAK.sub(r"\1 ", cell).split()]
    return min((max(words, default=1) + 0.8) * points * _CHARACTER, TEXT_WIDTH_PT / 3)


def _float(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    spec: str,
    size: str,
    caption: str,
    label: str,
    notes: Sequence[str],
) -> list[str]:
    return [
        r"\begin{table}",
        rf"\centering{size}\setlength{{\tabcolsep}}{{{_GAP_PT / 2:g}pt}}",
        rf"\caption{{{tex(caption)}}}",
        rf"\label{{tab:{label}}}",
        rf"\begin{{tabular}}{{{spec}}}",
        r"\toprule",
        _row(columns),
        r"\midrule",
        *map(_row, rows),
        r"\bottomrule",
        r"\end{tabular}",
        *(rf"\par {tex(note)}" for note in notes),
        r"\end{table}",
    ]


def _long(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    spec: str,
    size: str,
    caption: str,
    label: str,
    notes: Sequence[str],
) -> list[str]:
    n = len(columns)
    return [
        rf"{{{size}\setlength{{\tabcolsep}}{{{_GAP_PT / 2:g}pt}}\setlength{{\LTcapwidth}}{{\linewidth}}",
        rf"\begin{{longtable}}{{{spec}}}",
        rf"\caption{{{tex(caption)}}}\label{{tab:{label}}}\\",
        r"\toprule",
        _row(columns),
        r"\midrule",
        r"\endfirsthead",
        r"\toprule",
        _row(columns),
        r"\midrule",
        r"\endhead",
        rf"\midrule\multicolumn{{{n}}}{{@{{}}r@{{}}}}{{continued}}\\",
        r"\endfoot",
        r"\bottomrule",
        r"\endlastfoot",
        *map(_row, rows),
        r"\end{longtable}",
        *(rf"\par\noindent {tex(note)}" for note in notes),
        r"\par}",
    ]


def _row(cells: Sequence[str]) -> str:
    return " & ".join(tex(cell) for cell in cells) + r" \\"


def tex(text: object) -> str:
    """Text that LaTeX sets as it is; names may break within."""
    words = _BREAK.sub("\\1\0", visible(" ".join(str(text).split())))
    escaped = words.translate(_SPECIAL).replace("\0", r"\allowbreak{}")
    # Behind the end of a row a bracket would be its option.
    return f"{{[}}{escaped[1:]}" if escaped.startswith("[") else escaped
