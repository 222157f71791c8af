"""Everything printed to a terminal goes through here: names from files and folders cannot steer it."""

import re
import shutil
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Sequence
from typing import TextIO

#: C0 and C1 but line breaks and tabs, lone surrogates, and what turns the reading order, which makes one name look like
#: another.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Return text with control characters and lone surrogates written as escapes.

    Line breaks and tabs stay: tables are made of them.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def say(text: str) -> None:
    """Print a result and a line break to stdout."""
    _write(sys.stdout, text)


def tell(text: str) -> None:
    """Print progress, a warning or a complaint and a line break to stderr."""
    _write(sys.stderr, text)


def complain(sentence: str) -> None:
    """Print why a command ended, on one line of stderr."""
    tell("kvscope: " + sentence.replace("\n", "\\n"))


def report_fault(error: Exception) -> None:
    """Say that kvscope failed of itself, and where the traceback is; without a place for it, it is printed."""
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    text = printable("".join(traceback.format_exception(error)))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="kvscope-", suffix=".log", encoding="utf-8", delete=False) as file:
            file.write(text)
    except OSError:
        complain(f"an error of kvscope's own ({what}); no file for its traceback can be written, so here it is:")
        tell(text)
        return
    complain(f"an error of kvscope's own ({what}): please report it with its traceback, which is in {file.name}.")


def line_width() -> int | None:
    """Return the columns of the terminal that results go to; None for a file or a pipe, where no line is folded."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def folded(text: str, width: int | None, *, hang: int = 0) -> str:
    """Return text whose lines are at most ``width`` columns, broken between words alone; None: as it is.

    What goes on stands as far in as its line begins, and ``hang`` columns more.
    """
    if width is None:
        return text
    lines = []
    for line in text.split("\n"):
        inset = " " * (len(line) - len(line.lstrip(" ")) + hang)
        lines += [line] if len(line) <= width else _wrapped(line, width, subsequent_indent=inset)
    return "\n".join(lines)


def grid(
    rows: Sequence[Sequence[str]], headers: Sequence[str], *, aligned: Sequence[str], width: int | None = None
) -> str:
    """Return a table as text.

    One that is wider than ``width`` columns goes on below with the columns that did not fit, the first one repeated.
    Sentences are broken between words; a word never is.

    Args:
        aligned: ``left`` or ``right``, one a column.
        width: None for any.
    """
    from tabulate import tabulate

    columns = [[header, *(row[place] for row in rows)] for place, header in enumerate(headers)]
    blocks = [list(range(len(headers)))] if width is None else _blocks(columns, width)
    texts = []
    for block in blocks:
        cells = [columns[place] for place in block]
        lines = list(zip(*cells, strict=True))
        sides = [aligned[place] for place in block]
        texts.append(
            tabulate(
                [list(line) for line in lines[1:]],
                headers=list(lines[0]),
                tablefmt="simple",
                disable_numparse=True,
                colalign=sides if len(lines) > 1 else None,
            )
        )
    return "\n\n".join(texts)


def _blocks(columns: list[list[str]], width: int) -> list[list[int]]:
    """Return which columns stand side by side; cells that are too long for that are wrapped in place."""
    first = _widest(columns[0])
    for place, column in enumerate(columns[1:], 1):
        room = max(width - first - 4, max((len(word) for cell in column for word in cell.split()), default=1))
        columns[place] = ["\n".join(_wrapped(cell, room)) if len(cell) > room else cell for cell in column]
    blocks, used = [[0]], first
    for place, column in enumerate(columns[1:], 1):
        needed = 2 + _widest(column)
        if used + needed > width and len(blocks[-1]) > 1:
            blocks.append([0])
            used = first
        blocks[-1].append(place)
        used += needed
    return blocks


def _widest(column: Sequence[str]) -> int:
    """Columns that tabulate gives a header and its cells: the header gets room around it."""
    lines = [cell.split("\n") for cell in column]
    return max(2 + max(map(len, lines[0])), *(len(line) for cell in lines[1:] for line in cell), 0)


def _wrapped(line: str, width: int, *, subsequent_indent: str = "") -> list[str]:
    wrapped = textwrap.wrap(
        line, width, subsequent_indent=subsequent_indent, break_long_words=False, break_on_hyphens=False
    )
    return wrapped or [""]


def _write(stream: TextIO, text: str) -> None:
    stream.write(printable(text) + "\n")
    stream.flush()
