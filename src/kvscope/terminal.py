"""Everything printed to a terminal goes through here: names from files and folders cannot steer it."""

import re
import sys
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


def _write(stream: TextIO, text: str) -> None:
    stream.write(printable(text) + "\n")
    stream.flush()
