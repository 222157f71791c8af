"""A process that forks what a test kills; see ``kill_server``."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import fresh

from kvscope.harness.passes.process import worker_environment

SERVER = Path(__file__).with_name("kill_server.py")
NEVER = 10**9


class Victims:
    """Children that run one command over one folder, each killed at some step of its progress.

    Attributes:
        finished: what the children said of steps that were done, at once.
    """

    def __init__(self, what: str, values: dict[str, Any]) -> None:
        self.finished: list[str] = []
        self._server = fresh.Talking([str(SERVER), what, json.dumps(values)], env=worker_environment())

    def kill_one(self, *, at_step: int, room: int) -> int:
        """Start a child and kill it between step ``at_step`` and ``room`` steps later; return its wait status."""
        pid = self._start(at_step + room)
        for _ in range(at_step):
            assert not self._line().startswith("ended"), "the child had ended by itself: this kill tested nothing"
        os.kill(pid, signal.SIGKILL)
        return self._end()

    def let_one_end(self) -> int:
        """Start a child and wait for its end; return its wait status."""
        self._start(NEVER)
        return self._end()

    def close(self) -> None:
        """End the server."""
        self._server.close()

    def _start(self, n_steps: int) -> int:
        self._server.stdin.write(f"{n_steps}\n")
        self._server.stdin.flush()
        word, pid = self._line().split()
        assert word == "pid"
        return int(pid)

    def _end(self) -> int:
        while not (line := self._line()).startswith("ended"):
            pass
        return int(line.split()[1])

    def _line(self) -> str:
        line = self._server.stdout.readline()
        assert line, "the server died"
        if line.startswith("done"):
            self.finished.append(line)
        return line
