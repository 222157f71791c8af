"""Work of a report that a forked process does beside the rest: pictures take as long to draw as all else together."""

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1


@contextmanager
def aside(work: Callable[[], object]) -> Iterator[None]:
    """Do ``work`` in a process of its own while the block runs, and wait for it at the end.

    It must leave nothing but files. Where no process can be forked, or it fails, the work is done here behind the
    block: what comes of it, or the error, is that of one process. An error of the block ends the process.

    Raises:
        Exception: as ``work`` raises it.
    """
    process_id = _forked(work) if sys.platform == "linux" else None
    exit_code: int | None = None
    try:
        yield
        if process_id is not None:
            exit_code = os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])
    finally:
        if process_id is not None and exit_code is None:
            os.kill(process_id, signal.SIGKILL)
            os.waitpid(process_id, 0)
    if exit_code != 0:
        work()


def _forked(work: Callable[[], object]) -> int | None:
    """Fork a process that does the work and ends; return its id, None where the system has no room for it."""
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
            work()
            exit_code = 0
    finally:
        os._exit(exit_code)  # neither buffers nor exit handlers of the other process are its to run
