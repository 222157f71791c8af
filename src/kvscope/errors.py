"""Errors with the exit code a shell sees. Every message says what is wrong, where, and how to mend it."""

import difflib
import reprlib
from collections.abc import Iterable

SHOWN_CHARACTERS = 80
PATH_CHARACTERS = 500


class KvscopeError(Exception):
    """A failure the user can act on; the CLI prints its text alone, without a traceback."""

    exit_code = 1


class UsageError(KvscopeError, ValueError):
    """Bad input: an unknown name, a malformed option, a folder that cannot be used."""

    exit_code = 2


class EnvironmentProblem(KvscopeError, RuntimeError):  # noqa: N818 - EnvironmentError is Python's own name
    """The machine lacks something the request needs (a GPU, a package, memory)."""

    exit_code = 3


class HostMemoryShort(EnvironmentProblem, MemoryError):  # noqa: N818 - it says what is wrong
    """The host has not enough memory for a prompt's pages: the mirror that methods recall from."""


class DeviceBudgetExceeded(KvscopeError, MemoryError):  # noqa: N818 - it says what happened
    """A cell took more device bytes than it was allowed (``--gpu-budget``)."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known name, else a sentence listing all of them."""
    names = sorted(known)
    return nearest(word, names) or f" Known: {', '.join(names)}."


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest known name, capitals aside; empty where none is near."""
    names = {name.casefold(): name for name in sorted(known)}
    near = difflib.get_close_matches(word[:SHOWN_CHARACTERS].casefold(), sorted(names), n=1, cutoff=0.6)
    return f" Did you mean '{names[near[0]]}'?" if near else ""


class _ShortRepr(reprlib.Repr):
    """Cuts nested lists, too: a few anchors of a YAML file can stand for 10^8 values."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 4, 4, 4
        self.maxstring = self.maxother = SHOWN_CHARACTERS

    def repr_int(self, x: int, level: int) -> str:
        del level
        return repr(x) if x.bit_length() < 256 else "a number of over 75 digits"


def shown(value: object) -> str:
    """Return a value as a message quotes it: at most about 80 characters, control characters escaped."""
    return _shortened(_ShortRepr().repr(value), SHOWN_CHARACTERS)


def shown_path(path: object) -> str:
    """Return a path as a message quotes it: whole, so that it can be opened, unless nobody could read it."""
    return _shortened(repr(str(path)), PATH_CHARACTERS)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 23]}...{text[-20:]}"
