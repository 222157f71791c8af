"""Servers of workers that need not import torch and transformers anew: forked from the process that ``fresh`` keeps.

Their start is the same but for the imports. Where a test names another command or other folders to import from, limits
files or memory, or starts a sweep in a process of its own, servers start as they do for users.
"""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import current_process
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

import fresh
import pytest

from kvscope.harness.passes import forked


@contextmanager
def servers_forked() -> Iterator[None]:
    """Let :mod:`kvscope.harness.passes.forked` start its servers so."""
    command, limits = forked.SERVER_COMMAND, _limits()

    def start(asked: Sequence[str], **options: Any) -> "subprocess.Popen[str] | ForkedServer":
        folders = options["env"].get("PYTHONPATH", "").split(os.pathsep)
        if tuple(asked) != command or not set(folders) <= {"", *sys.path} or _limits() != limits:
            return subprocess.Popen(asked, text=True, **options)
        return ForkedServer(stdin=options["stdin"], stderr=options["stderr"], env=options["env"])

    with pytest.MonkeyPatch.context() as monkeypatch:
        names = {**vars(subprocess), "Popen": start}
        monkeypatch.setattr(forked, "subprocess", SimpleNamespace(**names))
        yield
        forked.close_server()


def _limits() -> list[tuple[int, int]]:
    """What a process that is started inherits, and one that is forked elsewhere does not."""
    return [resource.getrlimit(each) for each in (resource.RLIMIT_FSIZE, resource.RLIMIT_AS)]


class ForkedServer:
    """A server, with what of ``subprocess.Popen`` the sweep uses.

    Attributes:
        pid: its process id.
    """

    def __init__(self, *, stdin: int, stderr: IO[str], env: Mapping[str, str]) -> None:
        with Connection(os.dup(stdin)) as its_stdin, Connection(os.dup(stderr.fileno())) as its_stderr:
            self._process = fresh.context.Process(
                target=_serve, args=(dict(env), os.getcwd(), its_stdin, its_stderr), daemon=True
            )
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def kill(self) -> None:
        """Kill it, unless it was waited for."""
        self._process.kill()

    def poll(self) -> int | None:
        """Return how it ended; None as long as it runs."""
        return self._process.exitcode

    def wait(self) -> int:
        """Wait for its end and return the exit code, or less the number of the signal that ended it."""
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        return code


def _serve(environment: Mapping[str, str], folder: str, its_stdin: Connection, its_stderr: Connection) -> NoReturn:
    """In the forked process: be the server."""
    from kvscope.harness.passes import worker_server

    for standard, connection in ((0, its_stdin), (2, its_stderr)):
        os.dup2(connection.fileno(), standard)
        connection.close()
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - multiprocessing had closed it; a worker reads it
    current_process()._config["daemon"] = False  # type: ignore[attr-defined] - a worker may have processes
    os.setsid()
    fresh.be_in(environment, Path(folder))
    os._exit(worker_server.main())
