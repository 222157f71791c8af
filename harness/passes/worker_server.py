"""Worker processes on call: ``python -m kvscope.harness.passes.worker_server`` forks one for each request.

Its stdin is a Unix socket. A request is a line of JSON with three open files beside it, the worker's stdin, stdout and
stderr; the answer is the worker's process id. When the worker ends, its exit status follows, and the process is reaped
once the other side has read that, so that nobody signals a stranger. The server ends when the socket closes.

Importing torch and transformers takes most of a worker's start, and is the same for each. It happens here, once. No
CUDA context may be made here: each worker makes its own, and what NVML reads is of that process alone. Where a library
has asked CUDA for devices as it was imported, workers could make none, and are programs of their own.
"""

import gc
import json
import os
import socket
import sys
import traceback
from typing import NoReturn

from kvscope.harness.passes import worker
from kvscope.harness.passes.forked import WORKER_COMMAND
from kvscope.harness.passes.libraries import import_libraries

REQUEST_BYTES = 1 << 16
STANDARD_FILES = 3


def main() -> int:
    """Fork workers until nobody asks any more."""
    requests = socket.socket(fileno=os.dup(0))
    import_libraries()
    # The collector of a worker would write to every page it shares with this process.
    gc.freeze()
    while True:
        message, files, _, _ = socket.recv_fds(requests, REQUEST_BYTES, STANDARD_FILES)
        if not message:
            return 0
        sys.stderr.flush()
        process_id = os.fork()
        if process_id == 0:
            requests.close()
            _be_worker(files, folder=json.loads(message)["folder"])
        for file in files:
            os.close(file)
        try:
            _send(requests, process_id)
            _send(requests, _exit_status(process_id))
            requests.recv(1)
        except OSError:
            return 0  # the sweep is gone; its worker sees so by itself
        os.waitpid(process_id, 0)


def _send(requests: socket.socket, number: int) -> None:
    requests.sendall(f"{number}\n".encode())


def _exit_status(process_id: int) -> int:
    """Wait for a process without reaping it; return its exit code, or less the number of the signal that ended it."""
    ended = os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOWAIT)
    assert ended is not None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def context_is_impossible() -> bool:
    """Whether CUDA was asked before this process was forked, which then cannot make a context."""
    import torch

    # torch has no public name for it. Without it, a worker that cannot make a context says so in its row.
    return bool(getattr(torch.cuda, "_is_in_bad_fork", bool)())


def _be_worker(files: list[int], *, folder: str) -> NoReturn:
    """Do what ``python -m kvscope.harness.passes.worker`` does with these three files, in this process."""
    try:
        os.setsid()
        os.chdir(folder)
        for standard, file in enumerate(files):
            os.dup2(file, standard)
            os.close(file)
        if context_is_impossible():
            os.execv(WORKER_COMMAND[0], WORKER_COMMAND)
        code = worker.main()
    except BaseException:  # noqa: BLE001 - the end of this process: the traceback is what its parent reads
        traceback.print_exc()
        code = 1
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    # Nothing is left to do, and taking torch down would take as long as a worker.
    os._exit(main())
