"""Who answers the shards of an accuracy pass: processes that speak the protocol of ``shard_worker``, anywhere."""

import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol

from kvscope.harness.engine.host_threads import threads_a_process
from kvscope.harness.passes.mps import side_by_side
from kvscope.harness.passes.process import STDERR_TAIL_CHARACTERS, worker_environment
from kvscope.plugins import search_path

WORKER_COMMAND = (sys.executable, "-P", "-m", "kvscope.harness.passes.shard_worker")


@dataclass(frozen=True)
class Ended:
    """How a worker ended.

    Attributes:
        code: its exit code; negative where a signal ended it, None where it was lost with its machine.
        last: the last line on its stderr.
        with_machine: whether its machine is gone.
    """

    code: int | None
    last: str
    with_machine: bool = False

    @property
    def blames_shard(self) -> bool:
        """Whether its work may have ended it: not where its machine went."""
        return not self.with_machine

    @property
    def is_lost(self) -> bool:
        """Whether something from outside ended it: a signal, or its machine."""
        return self.code is None or self.code < 0

    def __str__(self) -> str:
        return f"was lost ({self.last})" if self.code is None else f"ended with code {self.code} ({self.last})"


class Worker(Protocol):
    """A process that answers. What it says arrives in the pool's queue, line by line, and None at its end."""

    @property
    def where(self) -> str:
        """Its device, and its machine where that is another."""

    def give(self, text: str | None) -> None:
        """Send it a line; None lets it end."""

    def ended(self) -> Ended:
        """Return how it ended, once its None has arrived."""

    def kill(self) -> None:
        """End it, whatever it does."""


Said = queue.Queue[tuple[Worker, str | None]]


class Pool(Protocol):
    """Where workers can be."""

    @property
    def n_workers(self) -> int:
        """How many it has room for, as far as is known."""

    @property
    def tick_s(self) -> float | None:
        """How often to look for new room; None where there is never any."""

    def fill(self, most: int) -> Sequence[Worker]:
        """Start workers where there is room and none is, at most so many."""

    def left(self, worker: Worker, *, usable: bool) -> None:
        """Note that a worker is gone; its place is taken anew only where it is usable."""

    def close(self) -> None:
        """Let go of what the pool holds."""


def last_line(text: str) -> str:
    """Return the last line that says something."""
    lines = [line.strip() for line in text[-STDERR_TAIL_CHARACTERS:].splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


class WorkerProcess:
    """A worker on this machine."""

    def __init__(
        self,
        where: str,
        task: Mapping[str, Any],
        hear: Callable[["WorkerProcess", str | None], None],
        *,
        threads: int,
        variables: Mapping[str, str],
    ) -> None:
        self.where = where
        environment = {**worker_environment(), **variables}
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        self._hear = hear
        self._stderr: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - see ended
        self._process = subprocess.Popen(
            WORKER_COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which then ends the workers
        )
        threading.Thread(target=self._listen, name=f"shards on {where}", daemon=True).start()
        self.give(json.dumps(task) + "\n")

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # cut short by a kill otherwise
                self._hear(self, line)
        self._hear(self, None)

    def give(self, text: str | None) -> None:
        """Send it a line; None lets it end."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has died: its reader says so
            if text is None:
                self._process.stdin.close()
            else:
                self._process.stdin.write(text)
                self._process.stdin.flush()

    def ended(self) -> Ended:
        """Return how it ended."""
        code = self._process.wait()
        self._stderr.seek(0)
        last = last_line(self._stderr.read())
        self._stderr.close()
        return Ended(code, last)

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()


class ProcessPool:
    """Processes of this machine, one a device as often as it is named.

    Args:
        task: the first line of a worker, but for its device.
        note: takes a line on how they share a GPU.
    """

    tick_s: float | None = None

    def __init__(
        self, devices: Sequence[str], task: Mapping[str, Any], said: Said, *, note: Callable[[str], None]
    ) -> None:
        self._devices, self._said, self._note = devices, said, note
        self._held = contextlib.ExitStack()
        self._variables: Mapping[str, str] | None = None
        self._task = {**task, "import_folders": search_path(), "n_jobs": len(devices)}
        self._free = list(devices)

    @property
    def n_workers(self) -> int:
        """One a device."""
        return len(self._devices)

    def fill(self, most: int) -> Sequence[Worker]:
        """Start workers on free devices."""
        started, self._free = self._free[: max(0, most)], self._free[max(0, most) :]
        if started and self._variables is None:
            self._variables = self._held.enter_context(side_by_side(self._devices, note=self._note))
        return [
            WorkerProcess(
                device,
                {**self._task, "config": {**self._task["config"], "device": device}},
                lambda worker, line: self._said.put((worker, line)),
                threads=threads_a_process(len(self._devices), device=device),
                variables=self._variables or {},
            )
            for device in started
        ]

    def left(self, worker: Worker, *, usable: bool) -> None:
        """Note that a device is free."""
        if usable:
            self._free.append(worker.where)

    def close(self) -> None:
        """End what lets processes share a GPU."""
        self._held.close()
        self._variables = None
