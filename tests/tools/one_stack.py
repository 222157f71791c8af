"""A stack of Python frames in one piece, for what runs deep and long.

CPython (3.11 on) keeps frames in pieces of 16 KiB, asks the kernel for one as a call reaches past the last, and gives
it back as that call returns. Where a loop's calls happen to cross from one piece into the next, each of them waits for
the kernel: up to two fifths of a test's time. A frame that takes more than a piece gets one that it fits into, twice as
large or more, and what it calls has the rest.
"""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

#: Of 8 bytes. The frame takes a little more than half of 1 MiB, and touches nothing of it.
_SLOTS = (1 << 16) + 1


def in_one_piece(function: Callable[P, R], /, *arguments: P.args, **options: P.kwargs) -> R:
    """Call a function: all that it calls, a thousand frames deep, finds room in one piece."""
    return function(*arguments, **options)


in_one_piece.__code__ = in_one_piece.__code__.replace(co_stacksize=_SLOTS)
