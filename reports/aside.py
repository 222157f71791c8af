"""Work of a report that a forked process does beside the rest: pictures take as long to draw as all else together."""

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1


@contextmanager
def aside(parts: Sequence[Callable[[], object]]) -> Iterator[None]:
    """Do all parts of a work in a process of its own while the block runs; behind the block both do what is left.

    A part must leave nothing but files. Where no process can be forked, or it fails, all parts are done here behind
    the block: what comes of them, or the error, is that of one process. An error here ends the process.

    Raises:
        Exception: as a part raises it.
    """
    # A byte a part: who reads one may do one, the other process from the first on, this one from the last back.
    to_do, filled = os.pipe()
    os.write(filled, bytes(len(parts)))
    os.close(filled)
    process_id = _forked(parts, to_do) if sys.platform == "linux" else None
    exit_code: int | None = None
    try:
        yield
        if process_id is not None:
            _do(list(reversed(parts)), to_do)
            exit_code = os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])
    finally:
        os.close(to_do)
        if process_id is not None and exit_code is None:
            os.kill(process_id, signal.SIGKILL)
            os.waitpid(process_id, 0)
    if exit_code != 0:
        for part in parts:
            part()


def _do(parts: Sequence[Callable[[], object]], to_do: int) -> None:
    """Do parts as long as there are any that no process has begun."""
    for part in parts:
        if not os.read(to_do, 1):
            return
        part()


def _forked(parts: Sequence[Callable[[], object]], to_do: int) -> int | None:
    """Fork a process that does parts and ends; return its id, None where the system has no room for it."""
    parent = os.getpid()
    with warnings.catch_warnings():
        # Of threads that the process lacks. These are torch's, and nothing here calls torch.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            process_id = os.fork()
        except OSError:
            return None
    if process_id:
        return process_id
    exit_code = 1
    try:
        # The report's lock is its, too: nothing may hold that when the report's own process was killed.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            _do(parts, to_do)
            exit_code = 0
    finally:
        os._exit(exit_code)  # neither buffers nor exit handlers of the other process are its to run
