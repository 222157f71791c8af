"""A worker process as the sweep sees it: told its job, followed by its phases, and a row whatever becomes of it."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import kvscope
from kvscope.harness.engine.oom import says_oom
from kvscope.harness.passes.forked import CAN_FORK, WORKER_COMMAND, ForkedWorker, worker_server
from kvscope.harness.passes.job import Job, RowT
from kvscope.harness.passes.row_columns import FailureStatus
from kvscope.results.schema import OomOf

PHASES = ("start", "load", "warm-up", "prefill", "decode", "timing")
SAID = "kvscope: "
"""Begins a worker's last line on stderr where the user can act on what it met."""
STDERR_TAIL_CHARACTERS = 2000
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ALLOCATOR_SETTINGS = "expandable_segments:True"


def start_ahead() -> None:
    """Let the process that forks workers import its libraries while this one imports the same, each on a core.

    It is a head start and nothing more.
    """
    if CAN_FORK and len(os.sched_getaffinity(0)) > 1:
        worker_server(worker_environment())


def run_worker(
    job: Job[RowT],
    *,
    timeout_s: float,
    on_phase: Callable[[str], None] = lambda phase: None,
    command: tuple[str, ...] | None = None,
) -> RowT:
    """Run one job in a process of its own and return its row.

    A worker that raises, runs out of memory, is killed or takes longer than ``timeout_s`` gives a row with the status,
    the reason and the phase it was in.

    Args:
        command: starts a worker; left out, a process that has imported the libraries is forked where that is possible.
    """
    kills_before = kernel_oom_kills()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        process = _start(command, stderr)
        timed_out = threading.Event()

        def stop() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(timeout_s, stop)
        timer.daemon = True
        timer.start()
        try:
            row, phase = _converse(process, job, on_phase)
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
            return_code = _end(process)
        if row is not None:
            return row
        status, reason = _death(return_code, phase, stderr, oom_kills=kernel_oom_kills() - kills_before)
        if timed_out.is_set():
            status, reason = "failed", f"{phase}: stopped after {timeout_s:g} s (footprint_timeout_s)"
        memory: OomOf | None = "host" if status == "oom" else None
        return job.failed(status=status, reason=reason, phase=phase, oom_of=memory)


def _start(command: tuple[str, ...] | None, stderr: IO[str]) -> "subprocess.Popen[str] | ForkedWorker":
    environment = worker_environment()
    if command is None and CAN_FORK:
        return ForkedWorker(worker_server(environment, stderr=stderr), stderr=stderr)
    # A session of its own: Ctrl-C reaches the sweep alone, which then ends the worker.
    return subprocess.Popen(
        command or WORKER_COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=environment,
        start_new_session=True,
    )


def _converse(
    process: "subprocess.Popen[str] | ForkedWorker", job: Job[RowT], on_phase: Callable[[str], None]
) -> tuple[RowT | None, str]:
    """Send the job, follow the phases, return (row or None, last phase). stdin stays open: it tells that we live."""
    assert process.stdin is not None
    assert process.stdout is not None
    phase = "start"
    on_phase(phase)
    if isinstance(process, ForkedWorker):
        process.started()
    try:
        process.stdin.write(job.model_dump_json() + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None, phase
    for line in process.stdout:
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError:
            break  # cut short by a kill: the exit status tells the rest
        if "row" in message:
            return job.row(message["row"]), phase
        phase = str(message["phase"])
        on_phase(phase)
    return None, phase


def _end(process: "subprocess.Popen[str] | ForkedWorker") -> int:
    """Close the pipes and make sure that the process is gone."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            # It may have died with our job unread; closing is all that is wanted.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    try:
        return process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _death(return_code: int, phase: str, stderr: IO[str], *, oom_kills: int) -> tuple[FailureStatus, str]:
    """Say why a worker ended without a row."""
    if return_code < 0:
        name = signal.Signals(-return_code).name
        if -return_code == signal.SIGKILL and oom_kills > 0:
            return "oom", f"{phase}: the kernel killed the worker for want of host memory ({name})"
        ended = f"was killed by {name}"
    else:
        ended = f"exited with {return_code}"
    stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, stderr.tell() - STDERR_TAIL_CHARACTERS))
    lines = [line.strip() for line in stderr.read().splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    # A process too small to load torch cannot make its own row; Python and C++ name the error in one of the last lines.
    if telling := next((line for line in lines[-3:] if says_oom(line) or line.startswith("MemoryError")), None):
        return "oom", f"{phase}: the worker {ended}: {telling}"
    return "failed", f"{phase}: the worker {ended}" + (f": {last}" if return_code >= 0 else "")


def kernel_oom_kills() -> int:
    """Return how many processes the kernel has killed for want of memory since boot; 0 where it does not tell."""
    try:
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def worker_environment() -> dict[str, str]:
    """Return this process's environment, with this very kvscope importable and quiet libraries.

    torch's allocator gets expandable segments unless the user has settings of their own: what is freed inside a segment
    then goes back to the driver, so that NVML sees it.
    """
    here = str(Path(kvscope.__file__).parent.parent)
    paths = [here, *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != here)]
    own_settings = any(os.environ.get(name) for name in ALLOCATOR_VARIABLES)
    return {
        **os.environ,
        **({} if own_settings else {ALLOCATOR_VARIABLES[0]: ALLOCATOR_SETTINGS}),
        "PYTHONPATH": os.pathsep.join(paths),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
