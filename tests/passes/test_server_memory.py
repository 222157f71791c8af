"""NVML of a server's processes: children count, strangers do not, and a null has its reason."""

import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvscope.errors import UsageError
from kvscope.harness.passes import server_memory
from kvscope.harness.passes.server_memory import ServerMemory, check_pid, process_tree

MIB = 2**20


@pytest.fixture
def family() -> Iterator[tuple[int, int]]:
    """Start a process with a child; return the ids of both."""
    child = "import sys; print('here', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    (second,) = process_tree(process.pid) - {process.pid}
    yield process.pid, second
    process.stdin.close()
    process.wait()
    process.stdout.close()


def nvml(monkeypatch: pytest.MonkeyPatch, listed: list[list[tuple[int, int | None]]]) -> None:
    """Let the driver list (process, bytes) a GPU."""

    class FakeError(Exception):
        pass

    def processes(gpu: int) -> list[Any]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=used_bytes) for pid, used_bytes in listed[gpu]]

    fake = SimpleNamespace(
        NVMLError=FakeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: len(listed),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=processes,
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(server_memory, "in_host_pid_namespace", lambda: True)


def test_the_server_and_its_children_on_all_gpus(monkeypatch: pytest.MonkeyPatch, family: tuple[int, int]) -> None:
    parent, child = family
    nvml(monkeypatch, [[(parent, 100 * MIB), (os.getpid(), 7 * MIB)], [(child, 50 * MIB)]])
    memory = ServerMemory(parent)
    with memory.watched() as seen:
        pass
    assert (seen.peak_bytes, memory.reason) == (150 * MIB, None)


@pytest.mark.parametrize(
    ("used_bytes", "listed", "reason"),
    [
        (None, True, "this driver does not report memory per process"),
        (MIB, False, r"NVML lists neither process \d+ nor its children"),
    ],
)
def test_a_null_has_its_reason(
    monkeypatch: pytest.MonkeyPatch, family: tuple[int, int], used_bytes: int | None, listed: bool, reason: str
) -> None:
    nvml(monkeypatch, [[(family[1] if listed else os.getpid(), used_bytes)]])
    memory = ServerMemory(family[0])
    with memory.watched() as seen:
        pass
    assert seen.peak_bytes is None
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(memory.reason)


def test_ids_of_a_container_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(monkeypatch, [[(os.getpid(), MIB)]])
    monkeypatch.setattr(server_memory, "in_host_pid_namespace", lambda: False)
    memory = ServerMemory(os.getpid())
    assert memory.read_bytes() is None
    assert memory.reason == "process ids of a container are not those that NVML reports"


def test_no_such_process() -> None:
    with pytest.raises(UsageError, match="there is no process 4194305 on this host"):
        check_pid(2**22 + 1)
