"""What the driver says of a server's processes on this host: theirs, not kvscope's own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kvscope.errors import UsageError
from kvscope.harness.passes.memory import PeakSampler, in_host_pid_namespace

INTERVAL_S = 0.05
"""Between two readings: each asks for the server's children, too."""


class ServerMemory:
    """GPU bytes of a process and its children, over all GPUs of this host.

    Args:
        pid: the server's process; None where none was named.

    Attributes:
        reason: why there is no reading; None where there is one.

    Raises:
        UsageError: no such process is here.
    """

    def __init__(self, pid: int | None) -> None:
        self.reason: str | None = None
        self._pid = pid
        self._nvml: Any = None
        self._handles: list[Any] = []
        if pid is None:
            self.reason = "no --server-pid"
            return
        check_pid(pid)
        if not in_host_pid_namespace():
            self.reason = "process ids of a container are not those that NVML reports"
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            self._handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        except ImportError:
            self.reason = "the package nvidia-ml-py is not installed"
        except pynvml.NVMLError as error:
            self.reason = f"NVML is not available: {error}"
        else:
            self._nvml = pynvml

    def read_bytes(self) -> int | None:
        """Return the bytes held now; None without a reading (``reason`` says why)."""
        if self._nvml is None or self._pid is None:
            return None
        own = process_tree(self._pid)
        try:
            listed = [
                process
                for handle in self._handles
                for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
                if process.pid in own
            ]
        except self._nvml.NVMLError as error:
            self.reason = f"NVML does not list processes: {error}"
            return None
        if not listed:
            self.reason = f"NVML lists neither process {self._pid} nor its children"
            return None
        if any(process.usedGpuMemory is None for process in listed):
            self.reason = "this driver does not report memory per process"
            return None
        self.reason = None
        return sum(int(process.usedGpuMemory) for process in listed)

    @contextmanager
    def watched(self) -> Iterator[PeakSampler]:
        """Keep the largest reading meanwhile (``peak_bytes``)."""
        sampler = PeakSampler(self.read_bytes, interval_s=INTERVAL_S)
        if self._nvml is None:
            yield sampler
            return
        with sampler:
            yield sampler


def check_pid(pid: int) -> None:
    """Check that a process is there.

    Raises:
        UsageError: it is not.
    """
    import psutil

    if not psutil.pid_exists(pid):
        raise UsageError(
            f"server_pid: there is no process {pid} on this host: give the server's, or leave --server-pid out."
        )


def process_tree(pid: int) -> set[int]:
    """Return a process and all its children; empty where it has ended."""
    import psutil

    try:
        process = psutil.Process(pid)
        return {pid, *(child.pid for child in process.children(recursive=True))} - {os.getpid()}
    except psutil.Error:
        return set()
