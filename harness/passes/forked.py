"""The side of the sweep that asks :mod:`kvscope.harness.passes.worker_server` for workers."""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import IO

#: ``-P``: the folder that a user happens to stand in is no place to import from.
WORKER_COMMAND = (sys.executable, "-P", "-m", "kvscope.harness.passes.worker")
SERVER_COMMAND = (sys.executable, "-P", "-m", "kvscope.harness.passes.worker_server")
#: torch's compiler names its folder so, where nobody did; older versions of torch say so how CUDA loads kernels.
SET_BY_LIBRARIES = ("TORCHINDUCTOR_CACHE_DIR", "CUDA_MODULE_LOADING")
#: A process that has loaded torch can be forked there; waitid is missing on macOS.
CAN_FORK = sys.platform == "linux"


class WorkerServer:
    """A process that has imported what workers need and forks them, one at a time.

    Attributes:
        environment: what it was started with, and its workers have.
        process: itself.
        busy: whether a worker of its has not been waited for.
    """

    def __init__(self, environment: Mapping[str, str], *, stderr: IO[str] | None = None) -> None:
        """Start it.

        Args:
            stderr: where it says why it cannot start; None: it is kept for the worker that will miss it (``said``).
        """
        self.environment = dict(environment)
        self.busy = False
        self._own_stderr = None if stderr is not None else tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._socket, its_end = socket.socketpair()
        with its_end:
            # A session of its own: Ctrl-C reaches the sweep alone.
            self.process = subprocess.Popen(
                SERVER_COMMAND,
                stdin=its_end.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=stderr or self._own_stderr,
                env=self.environment,
                start_new_session=True,
            )

    def said(self) -> str:
        """Return what it has said, where that went nowhere else."""
        if self._own_stderr is None:
            return ""
        self._own_stderr.seek(0)
        return self._own_stderr.read()

    def ask(self, *files: int) -> None:
        """Ask for a worker with these three standard files, in the folder one stands in."""
        self.busy = True
        with contextlib.suppress(OSError):  # the answer will be missing
            socket.send_fds(self._socket, [json.dumps({"folder": os.getcwd()}).encode()], files)

    def answer(self, *, timeout_s: float | None = None) -> int | None:
        """Return the next number it says: a worker's process id, then its exit status. None where it has died.

        Raises:
            subprocess.TimeoutExpired: it said nothing.
        """
        if not select.select([self._socket], [], [], timeout_s)[0]:
            raise subprocess.TimeoutExpired(SERVER_COMMAND, timeout_s or 0)
        digits = b""
        with contextlib.suppress(OSError):
            while (digit := self._socket.recv(1)) not in (b"", b"\n"):
                digits += digit
        return int(digits) if digits else None

    def reap(self) -> None:
        """Let the process id of a worker go whose exit status was read."""
        with contextlib.suppress(OSError):
            self._socket.sendall(b".")
        self.busy = False

    def close(self) -> None:
        """End it; a worker that still runs ends when its stdin closes."""
        self._socket.close()
        self.process.kill()
        self.process.wait()
        if self._own_stderr is not None:
            self._own_stderr.close()


class ForkedWorker:
    """A worker of a server, with what of ``subprocess.Popen`` the sweep uses.

    Attributes:
        stdin: the job goes there.
        stdout: rows come from there.
        returncode: None until it was waited for.
    """

    def __init__(self, server: WorkerServer, *, stderr: IO[str]) -> None:
        """Ask for it; it may be a while until the server has started."""
        self._server, self._stderr = server, stderr
        self._process_id: int | None = None
        self.returncode: int | None = None
        its_stdin, own_stdin = os.pipe()
        own_stdout, its_stdout = os.pipe()
        self.stdin = open(own_stdin, "w", encoding="utf-8")  # noqa: SIM115 - the sweep closes them
        self.stdout = open(own_stdout, encoding="utf-8", errors="replace")  # noqa: SIM115
        server.ask(its_stdin, its_stdout, stderr.fileno())
        os.close(its_stdin)
        os.close(its_stdout)

    def kill(self) -> None:
        """Kill it, or its server where it has none to show yet. Its id is its own until it was waited for."""
        if self.returncode is not None:
            return
        if self._process_id is None:
            self._server.process.kill()
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process_id, signal.SIGKILL)

    def started(self) -> None:
        """Wait until it is there, or its server has died."""
        self._process_id = self._server.answer()
        if self._process_id is None:
            self._stderr.write(self._server.said())
            self._stderr.flush()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit code, or less the number of the signal that ended it."""
        if self.returncode is None:
            status = None if self._process_id is None else self._server.answer(timeout_s=timeout)
            self.returncode = self._server.process.wait() if status is None else status
            self._server.reap()
        return self.returncode


_server: WorkerServer | None = None


def worker_server(environment: Mapping[str, str], *, stderr: IO[str] | None = None) -> WorkerServer:
    """Return this process's server; a new one where there is none, or none that is idle in this environment.

    Args:
        stderr: of a new one, as ``WorkerServer``.
    """
    global _server
    if _server is not None and (
        _server.busy or _told(_server.environment) != _told(environment) or _server.process.poll() is not None
    ):
        close_server()
    if _server is None:
        _server = WorkerServer(environment, stderr=stderr)
        atexit.register(close_server)
    return _server


def _told(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what of an environment was not set by libraries: the server and its workers have the same ones."""
    return {name: value for name, value in environment.items() if name not in SET_BY_LIBRARIES}


def close_server() -> None:
    """End this process's server, where there is one."""
    global _server
    if _server is not None:
        _server.close()
        _server = None
        atexit.unregister(close_server)
