"""Physical memory: NVML per-process bytes, a sampler thread, and host RSS.

Three readings exist and are never mixed: NVML (this file), torch's allocator (the worker) and the ledger of live cache
tensors (the methods). A reading that cannot be taken is None with the reason, never zero.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from kvscope.harness.engine.host_memory import free_host_bytes

MIB = 1024 * 1024
#: Inode of the first process id namespace, the same on every Linux (PROC_PID_INIT_INO).
_HOST_PID_NAMESPACE = 0xEFFFFFFC


class NvmlProcessMemory:
    """Bytes that this process holds on one GPU, or on several together, as the driver counts them.

    Make it before the CUDA context exists: NVML reports the host's process ids, and those of a container are others. A
    process there may have our id and be a stranger, so that the one that appears between construction and
    :meth:`identify` is this one. Only in the host's own namespace an id says enough.

    ``reason`` is None when :meth:`read_bytes` works, else one clause that says why it does not.
    """

    def __init__(self, *device_indices: int) -> None:
        self.reason: str | None = None
        self._handles: list[Any] = []
        self._nvml: Any = None
        self._pid: int | None = None
        self._before: set[int] = set()
        try:
            import pynvml
        except ImportError:
            self.reason = "the package nvidia-ml-py is not installed"
            return
        try:
            pynvml.nvmlInit()
            self._handles = [nvml_handle(pynvml, index) for index in device_indices or (0,)]
            self._nvml = pynvml
            self._before = set(self.processes() or ())
        except pynvml.NVMLError as error:
            self.reason = f"NVML is not available: {error}"

    def identify(self) -> None:
        """Find this process in NVML's list; call it once, right after the CUDA context was created."""
        if self.reason is not None:
            return
        processes = self.processes()
        if processes is None:
            return
        appeared = sorted(set(processes) - self._before)
        if os.getpid() in processes and in_host_pid_namespace():
            found = os.getpid()
        elif len(appeared) == 1:
            found = appeared[0]
        else:
            self.reason = (
                f"NVML does not list this process ({len(appeared)} processes appeared on the GPU while its context was "
                "created): process ids of a container cannot be told apart"
            )
            return
        if len(self._handles) > 1 and not all(found in {each.pid for each in listed} for listed in self._listed()):
            self.reason = "NVML does not list this process on each of its GPUs"
            return
        self._pid = found
        if not processes[found]:  # a context takes memory: zero is no reading
            self.reason = "this driver does not report memory per process"

    def read_bytes(self) -> int | None:
        """Return the bytes used now, or None when there is no reading (``reason`` says why)."""
        if self.reason is not None or self._pid is None:
            return None
        processes = self.processes()
        return None if processes is None else processes.get(self._pid)

    def others(self, sweep_pid: int | None = None) -> tuple[int, int | None] | None:
        """Return (other processes on the GPU, bytes they hold or None where the driver does not tell).

        The sweep that asked for this process's row is none of them: it waits. None when NVML could not be asked, or
        does not say which process is this one.

        Args:
            sweep_pid: how NVML lists the sweep; None where it holds no context, or does not know itself how.
        """
        if self._nvml is None or self._pid is None:
            return None
        own = {self._pid, sweep_pid}
        processes = self.processes()
        if processes is None or self._pid not in processes:
            return None
        used = [used_bytes for pid, used_bytes in processes.items() if pid not in own]
        known = [used_bytes for used_bytes in used if used_bytes is not None]
        return len(used), sum(known) if len(known) == len(used) else None

    def processes(self) -> dict[int, int | None] | None:
        """Return process id -> bytes, None where the driver does not tell; None where it lists none (``reason``).

        A GPU cut into instances (MIG) lists a process once an instance, each of several GPUs lists it once: its bytes
        are their sum.
        """
        found: dict[int, int | None] = {}
        if self._nvml is None and self.reason is not None:
            return None
        try:
            listed = self._listed()
        except self._nvml.NVMLError as error:
            self.reason = f"NVML does not list processes: {error}"
            return None
        for process in chain.from_iterable(listed):
            used_bytes, other_bytes = process.usedGpuMemory, found.get(process.pid, 0)
            found[process.pid] = None if used_bytes is None or other_bytes is None else other_bytes + used_bytes
        return found

    def _listed(self) -> list[Any]:
        """Return the processes on each GPU, as NVML has them."""
        return [self._nvml.nvmlDeviceGetComputeRunningProcesses(handle) for handle in self._handles]


def in_host_pid_namespace() -> bool:
    """Whether process ids here are those that NVML reports. False where that cannot be told."""
    if not sys.platform.startswith("linux"):
        return True
    try:
        return os.stat("/proc/self/ns/pid").st_ino == _HOST_PID_NAMESPACE
    except OSError:
        return False


def nvml_handle(pynvml: Any, device_index: int) -> Any:
    """Return NVML's handle of CUDA device ``device_index``, which CUDA_VISIBLE_DEVICES may have renumbered."""
    visible = [item.strip() for item in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if item.strip()]
    if device_index < len(visible):
        chosen = visible[device_index]
        if not chosen.isdigit():
            return pynvml.nvmlDeviceGetHandleByUUID(chosen)
        device_index = int(chosen)
    return pynvml.nvmlDeviceGetHandleByIndex(device_index)


class PeakSampler:
    """Context manager: a thread that reads ``read_bytes`` every ``interval_s`` and keeps the largest value.

    ``peak_bytes`` is None when no reading was ever taken. One NVML query costs about 13 us (H100), so the default
    interval takes under 1 % of a core.
    """

    def __init__(self, read_bytes: Callable[[], int | None], *, interval_s: float = 0.005) -> None:
        self.peak_bytes: int | None = None
        self.readings = 0
        self._read_bytes = read_bytes
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="kvscope-memory-sampler", daemon=True)
        self._error: BaseException | None = None

    def mark(self) -> None:
        """Take one reading now: phase ends are read exactly, whatever the interval."""
        value_bytes = self._read_bytes()
        if value_bytes is not None:
            self.readings += 1
            self.peak_bytes = value_bytes if self.peak_bytes is None else max(self.peak_bytes, value_bytes)

    def _loop(self) -> None:
        try:
            while not self._stop.wait(self._interval_s):
                self.mark()
        except BaseException as error:  # noqa: BLE001 - a thread's error is raised in the thread that asked for it
            self._error = error

    def __enter__(self) -> Self:
        self.mark()
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if exc is None:
            if self._error is not None:
                raise self._error
            self.mark()


def host_rss_bytes() -> int:
    """Return the resident set of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def host_rss_peak_bytes() -> int | None:
    """Return the largest resident set of this process since it was started, or None where the kernel does not tell.

    ``getrusage`` would not do: its maximum survives ``exec``, so a small child of a large parent reports the parent.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def free_device_bytes(device: str) -> tuple[int | None, str]:
    """Return (free bytes of the memory that ``device`` computes in, its name); None bytes when it cannot be read.

    NVML is asked first: torch's answer creates a CUDA context, half a GiB that the cells to be measured then lack.
    """
    if not device.startswith("cuda"):
        return free_host_bytes(), "host memory"
    import torch

    if not torch.cuda.is_available():
        return None, "GPU"
    target = torch.device(device)
    name = torch.cuda.get_device_name(target)
    free_bytes = _nvml_free_bytes(torch.cuda.current_device() if target.index is None else target.index)
    return int(torch.cuda.mem_get_info(target)[0]) if free_bytes is None else free_bytes, name


def total_device_bytes(device: str) -> int | None:
    """Return the bytes that a GPU has in all, or None when they cannot be read; as ``free_device_bytes``."""
    import torch

    if not torch.cuda.is_available():
        return None
    target = torch.device(device)
    info = _nvml_memory(torch.cuda.current_device() if target.index is None else target.index)
    return int(torch.cuda.get_device_properties(target).total_memory) if info is None else int(info.total)


def _nvml_free_bytes(device_index: int) -> int | None:
    info = _nvml_memory(device_index)
    return None if info is None else int(info.free)


def _nvml_memory(device_index: int) -> Any:
    """Return what NVML says of a GPU's memory (``total``, ``free``); None where it cannot be asked."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except (ImportError, OSError):
        return None
    except pynvml.NVMLError:
        return None
    try:
        return pynvml.nvmlDeviceGetMemoryInfo(nvml_handle(pynvml, device_index))
    except pynvml.NVMLError:
        return None


def wait_for_quiet(read_bytes: Callable[[], int | None], *, timeout_s: float = 2.0) -> int | None:
    """Return NVML's reading once two readings 20 ms apart agree: the driver frees memory a little late."""
    deadline = time.monotonic() + timeout_s
    last_bytes = read_bytes()
    while time.monotonic() < deadline:
        time.sleep(0.02)
        now_bytes = read_bytes()
        if now_bytes == last_bytes:
            break
        last_bytes = now_bytes
    return last_bytes
