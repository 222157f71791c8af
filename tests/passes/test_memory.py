"""Memory readings and the verdict; the NVML wrapper runs against a stand-in driver with the real one's call surface."""

import os
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from kvscope.harness.passes import memory as memory_module
from kvscope.harness.passes import sweep_process
from kvscope.harness.passes.memory import (
    NvmlProcessMemory,
    PeakSampler,
    free_device_bytes,
    host_rss_bytes,
    host_rss_peak_bytes,
    in_host_pid_namespace,
)
from kvscope.harness.passes.sweep_process import BLOCK_BYTES, grown_process, sweep_process_id
from kvscope.harness.passes.verdict import RESOLUTION_BYTES, verdict

MIB = 1024 * 1024
DENSE = 4096 * MIB


def judged(kind: Any, *, ledger_mib: int, seen_mib: int | None, dense_bytes: int = DENSE) -> tuple[str, str | None]:
    base = 1000 * MIB
    return verdict(
        saving_kind=kind,
        dense_kv_bytes=dense_bytes,
        ledger_bytes=ledger_mib * MIB,
        baseline_nvml_bytes=None if seen_mib is None else base,
        decode_peak_nvml_bytes=None if seen_mib is None else base + seen_mib * MIB,
    )


def judge(kind: Any, **readings: Any) -> str:
    found, why = judged(kind, **readings)
    assert (why is not None) == (found == "mismatch")
    return found


@pytest.mark.parametrize("kind", ["freed", "offloaded", "resident"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_driver_and_ledger_agree_within_three_percent_and_64_mib(kind: str, sign: int) -> None:
    # 3 % of 2,000 MiB is 60 MiB.
    assert judge(kind, ledger_mib=2000, seen_mib=2000 + sign * 124) == kind
    assert judge(kind, ledger_mib=2000, seen_mib=2000 + sign * 125) == "mismatch"


def test_a_mismatch_says_which_readings_disagree() -> None:
    _, why = judged("freed", ledger_mib=100, seen_mib=300)
    assert why == (
        "NVML reads 314,572,800 bytes where the ledger counts 104,857,600: 209,715,200 apart, "
        "70,254,592 allowed (3 % and 64 MiB)"
    )


def test_a_saving_of_a_large_cache_must_be_confirmed_to_ninety_percent() -> None:
    # Claim: 300 of 4,000 MiB. Reading 80 MiB too much is agreement, and yet leaves 220 MiB, less than 270.
    found, why = judged("freed", ledger_mib=3700, seen_mib=3780, dense_bytes=4000 * MIB)
    assert (found, why) == ("mismatch", "NVML confirms 230,686,720 of 314,572,800 bytes claimed, less than 90 %")
    assert judge("freed", ledger_mib=3700, seen_mib=3730, dense_bytes=4000 * MIB) == "freed"


def test_masking_that_frees_nothing_is_a_mismatch() -> None:
    assert judge("freed", ledger_mib=400, seen_mib=4096) == "mismatch"


def test_small_claims_are_below_resolution() -> None:
    assert judge("freed", ledger_mib=4096 - 255, seen_mib=4000) == "below_resolution"
    assert judge("freed", ledger_mib=4096 - 256, seen_mib=4096 - 256) == "freed"
    assert judge("resident", ledger_mib=60, seen_mib=0, dense_bytes=60 * MIB) == "below_resolution"
    assert RESOLUTION_BYTES == 256 * MIB


def test_a_small_claim_that_the_driver_contradicts_is_a_mismatch() -> None:
    """50 MiB claimed and 600 MiB there is no matter of resolution."""
    assert judge("freed", ledger_mib=50, seen_mib=600, dense_bytes=100 * MIB) == "mismatch"


def test_a_resident_method_must_be_there() -> None:
    assert judge("resident", ledger_mib=4096, seen_mib=4100) == "resident"
    assert judge("resident", ledger_mib=4096, seen_mib=3000) == "mismatch"


def test_without_nvml_there_is_no_verdict() -> None:
    assert judge("freed", ledger_mib=96, seen_mib=None) == "not_measured"


class Driver(types.ModuleType):
    """The part of pynvml that is called, over a table of processes."""

    class NVMLError(Exception):
        pass

    def __init__(self, processes: dict[int, int | None], *, broken: bool = False) -> None:
        super().__init__("pynvml")
        self.processes = processes
        self.broken = broken
        self.instances: list[tuple[int, int | None]] = []  # what a GPU in instances lists again
        self.asked: list[object] = []

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's name
        if self.broken:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        self.asked.append(index)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[Any]:  # noqa: N802
        listed = [*self.processes.items(), *self.instances]
        return [types.SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in listed]


def with_driver(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Driver:
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return driver


def test_our_own_process_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = with_driver(monkeypatch, Driver({7: 5 * MIB}))
    memory = NvmlProcessMemory()
    assert memory.read_bytes() is None
    driver.processes[os.getpid()] = 620 * MIB
    memory.identify()
    assert (memory.reason, memory.read_bytes()) == (None, 620 * MIB)


def test_other_processes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = with_driver(monkeypatch, Driver({7: 5 * MIB, 9: 3 * MIB}))
    memory = NvmlProcessMemory()
    driver.processes[os.getpid()] = 620 * MIB
    assert memory.others() is None
    memory.identify()
    assert memory.others() == (2, 8 * MIB)
    driver.processes[9] = None
    assert memory.others() == (2, None)
    driver.processes = {os.getpid(): 620 * MIB}
    assert memory.others() == (0, 0)
    driver.processes = {os.getpid(): 620 * MIB, os.getppid(): 518 * MIB}
    in_a_container(monkeypatch, inside=False)
    assert memory.others(os.getppid()) == (0, 0)  # the sweep that asked for this process's row waits


def test_free_device_memory_is_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's answer would create a context, half a GiB of the GPU whose cells are yet to be measured."""
    import torch

    driver = with_driver(monkeypatch, Driver({}))
    driver.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(free=(40 + handle) * MIB)  # type: ignore[attr-defined]
    asked: list[object] = []

    def torch_answers(device: object) -> tuple[int, int]:
        asked.append(device)
        return 7 * MIB, 80 * MIB

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    monkeypatch.setattr(torch.cuda, "mem_get_info", torch_answers)
    assert free_device_bytes("cuda:1") == (41 * MIB, "GPU X")
    assert free_device_bytes("cuda") == (40 * MIB, "GPU X")
    assert not asked
    driver.broken = True
    assert free_device_bytes("cuda:1") == (7 * MIB, "GPU X")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert free_device_bytes("cuda:1") == (7 * MIB, "GPU X")
    assert len(asked) == 2


def test_in_a_container_the_process_that_appeared_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = with_driver(monkeypatch, Driver({7: 5 * MIB}))
    memory = NvmlProcessMemory()
    driver.processes[-1] = 620 * MIB
    memory.identify()
    assert (memory.reason, memory.read_bytes()) == (None, 620 * MIB)


def in_a_container(monkeypatch: pytest.MonkeyPatch, inside: bool = True) -> None:
    monkeypatch.setattr(memory_module, "in_host_pid_namespace", lambda: not inside)


def test_in_a_container_a_stranger_with_our_process_id_is_not_us(monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_container(monkeypatch)
    driver = with_driver(monkeypatch, Driver({os.getpid(): 9000 * MIB, os.getppid(): 70 * MIB}))
    memory = NvmlProcessMemory()
    driver.processes[2_000_001] = 620 * MIB
    memory.identify()
    assert (memory.reason, memory.read_bytes()) == (None, 620 * MIB)
    assert memory.others() == (2, 9070 * MIB)


def test_in_a_container_a_stranger_with_our_process_id_that_grows_is_not_us(monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_container(monkeypatch)
    driver = with_driver(monkeypatch, Driver({os.getpid(): 100 * MIB}))
    memory = NvmlProcessMemory()
    driver.processes[os.getpid()] = 720 * MIB
    memory.identify()
    assert memory.reason is not None
    assert "0 processes appeared" in memory.reason
    assert (memory.read_bytes(), memory.others()) == (None, None)


def test_in_a_container_our_process_id_may_have_appeared_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = with_driver(monkeypatch, Driver({}))
    memory = NvmlProcessMemory()
    driver.processes.update({os.getpid(): 620 * MIB, 77: 500 * MIB})
    in_a_container(monkeypatch)
    memory.identify()
    assert memory.reason is not None
    assert "2 processes appeared" in memory.reason
    on_the_host = NvmlProcessMemory()
    in_a_container(monkeypatch, inside=False)
    on_the_host.identify()
    assert (on_the_host.reason, on_the_host.read_bytes()) == (None, 620 * MIB)


@contextmanager
def growth(driver: Driver, grown: dict[int, int]) -> Iterator[None]:
    """Processes that hold more meanwhile."""
    before = dict(driver.processes)
    driver.processes.update({pid: (before[pid] or 0) + n_bytes for pid, n_bytes in grown.items()})
    yield
    driver.processes.update(before)


@pytest.mark.parametrize(
    ("grown", "found"),
    [
        ({77: BLOCK_BYTES}, 77),
        ({77: BLOCK_BYTES + 2 * MIB, 7: 30 * MIB}, 77),
        ({}, None),
        ({77: BLOCK_BYTES - MIB}, None),
        ({77: BLOCK_BYTES, 7: BLOCK_BYTES}, None),
        ({5: BLOCK_BYTES}, None),
    ],
)
def test_the_sweep_is_the_process_that_grows_by_its_block(
    monkeypatch: pytest.MonkeyPatch, grown: dict[int, int], found: int | None
) -> None:
    driver = with_driver(monkeypatch, Driver({7: 5 * MIB, 77: 518 * MIB, 5: None}))
    assert grown_process(NvmlProcessMemory(), growth(driver, grown)) == found


def test_in_a_container_the_sweep_that_waits_is_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = with_driver(monkeypatch, Driver({77: 518 * MIB}))
    in_a_container(monkeypatch)
    sweep_pid = grown_process(NvmlProcessMemory(), growth(driver, {77: BLOCK_BYTES}))
    memory = NvmlProcessMemory()
    driver.processes[99] = 620 * MIB
    memory.identify()
    assert memory.others() == (1, 518 * MIB), "what cannot be told from a stranger counts"
    assert memory.others(sweep_pid) == (0, 0)
    driver.processes[7] = 5 * MIB
    assert memory.others(sweep_pid) == (1, 5 * MIB)


def test_a_sweep_without_a_context_makes_none_to_know_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(sweep_process, "in_host_pid_namespace", lambda: False)
    monkeypatch.setattr(torch, "empty", lambda *args, **options: pytest.fail("a block was allocated"))
    assert sweep_process_id("cpu") is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert sweep_process_id("cuda:0") is None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})
    assert sweep_process_id("cuda:0") is None


def test_on_the_host_the_sweep_knows_its_own_id(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {})
    monkeypatch.setattr(sweep_process, "in_host_pid_namespace", lambda: True)
    assert sweep_process_id("cuda:0") == os.getpid()


def test_without_a_driver_nobody_is_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = with_driver(monkeypatch, Driver({}, broken=True))
    assert grown_process(NvmlProcessMemory(), growth(driver, {})) is None


@pytest.mark.parametrize("inside", [True, False])
def test_a_process_listed_once_an_instance_has_the_sum(monkeypatch: pytest.MonkeyPatch, inside: bool) -> None:
    in_a_container(monkeypatch, inside)
    driver = with_driver(monkeypatch, Driver({7: 5 * MIB}))
    memory = NvmlProcessMemory()
    driver.processes[os.getpid()] = 400 * MIB
    driver.instances = [(os.getpid(), 220 * MIB), (7, 3 * MIB)]
    memory.identify()
    assert (memory.reason, memory.read_bytes()) == (None, 620 * MIB)
    assert memory.others() == (1, 8 * MIB)
    driver.instances = [(os.getpid(), None)]
    assert memory.read_bytes() is None


def test_the_namespace_is_that_of_the_host_by_its_inode(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def stat(path: object) -> Any:
        seen.append(path)
        return types.SimpleNamespace(st_ino=inode)

    monkeypatch.setattr(memory_module.sys, "platform", "linux")
    monkeypatch.setattr(memory_module.os, "stat", stat)
    inode = 4026531836
    assert in_host_pid_namespace()
    inode = 4026532500
    assert not in_host_pid_namespace()
    assert seen == ["/proc/self/ns/pid"] * 2


def test_two_that_appeared_cannot_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = with_driver(monkeypatch, Driver({}))
    memory = NvmlProcessMemory()
    driver.processes.update({-1: MIB, -2: MIB})
    memory.identify()
    assert memory.reason is not None
    assert "2 processes appeared" in memory.reason
    assert memory.read_bytes() is None


@pytest.mark.parametrize("told", [None, 0])
def test_a_driver_without_per_process_memory_gives_a_reason(monkeypatch: pytest.MonkeyPatch, told: int | None) -> None:
    driver = with_driver(monkeypatch, Driver({}))
    memory = NvmlProcessMemory()
    driver.processes[os.getpid()] = told
    memory.identify()
    assert memory.reason == "this driver does not report memory per process"


def test_a_driver_that_lists_no_processes_gives_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = with_driver(monkeypatch, Driver({}))
    memory = NvmlProcessMemory()
    driver.processes[os.getpid()] = 620 * MIB
    memory.identify()

    def refuse(handle: object) -> list[Any]:
        raise driver.NVMLError("Not Supported")

    monkeypatch.setattr(driver, "nvmlDeviceGetComputeRunningProcesses", refuse)
    assert (memory.read_bytes(), memory.others()) == (None, None)
    assert memory.reason == "NVML does not list processes: Not Supported"
    fresh = NvmlProcessMemory()
    fresh.identify()
    assert fresh.reason == "NVML does not list processes: Not Supported"


def test_no_driver_gives_a_reason_and_never_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, Driver({}, broken=True))
    memory = NvmlProcessMemory()
    memory.identify()
    assert memory.reason == "NVML is not available: Driver Not Loaded"
    assert memory.read_bytes() is None


@pytest.mark.parametrize(("visible", "asked"), [("3,5", 5), ("GPU-a,GPU-b", "GPU-b"), ("", 1)])
def test_renumbered_devices_are_found(monkeypatch: pytest.MonkeyPatch, visible: str, asked: object) -> None:
    driver = with_driver(monkeypatch, Driver({}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    NvmlProcessMemory(1)
    assert driver.asked == [asked]


class TwoGpus(Driver):
    """A driver whose second GPU has processes of its own."""

    second: dict[int, int | None]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[Any]:  # noqa: N802
        listed = self.processes if handle == 0 else self.second
        return [types.SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in listed.items()]


def test_several_gpus_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = TwoGpus({7: 5 * MIB})
    driver.second = {7: 3 * MIB, 9: MIB}
    with_driver(monkeypatch, driver)
    memory = NvmlProcessMemory(0, 1)
    driver.processes[os.getpid()], driver.second[os.getpid()] = 620 * MIB, 500 * MIB
    memory.identify()
    assert (memory.reason, memory.read_bytes()) == (None, 1120 * MIB)
    assert memory.others() == (2, 9 * MIB)  # a process on both is one
    driver.second[os.getpid()] = None
    assert memory.read_bytes() is None


def test_a_process_that_one_of_its_gpus_does_not_list_has_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = TwoGpus({})
    driver.second = {}
    with_driver(monkeypatch, driver)
    memory = NvmlProcessMemory(0, 1)
    driver.processes[os.getpid()] = 620 * MIB
    memory.identify()
    assert (memory.reason, memory.read_bytes()) == ("NVML does not list this process on each of its GPUs", None)


def test_the_sampler_keeps_a_peak_that_has_gone_again() -> None:
    value, seen = [10], threading.Event()

    def read() -> int:
        found = value[0]
        if found == 99:
            seen.set()
        return found

    with PeakSampler(read, interval_s=0.001) as sampler:
        value[0] = 99
        seen.wait()
        value[0] = 20
    assert sampler.peak_bytes == 99
    assert sampler.readings > 2


def test_the_sampler_reads_the_end_even_between_intervals() -> None:
    value = [10]
    with PeakSampler(lambda: value[0], interval_s=60.0) as sampler:
        value[0] = 30
    assert sampler.peak_bytes == 30


def test_no_reading_is_none_not_zero() -> None:
    with PeakSampler(lambda: None) as sampler:
        pass
    assert sampler.peak_bytes is None


def test_an_error_in_the_thread_is_raised() -> None:
    calls, again = [], threading.Event()

    def read() -> int:
        calls.append(1)
        if len(calls) > 1:
            again.set()
            raise OSError("gone")
        return 1

    with pytest.raises(OSError, match="gone"), PeakSampler(read, interval_s=0.001):
        again.wait()


def test_the_rss_peak_of_a_child_is_its_own() -> None:
    """getrusage's maximum survives exec; ours must not report the parent's 200 MiB."""
    if host_rss_peak_bytes() is None:
        pytest.skip("this kernel keeps no VmHWM")
    ballast = bytearray(os.urandom(1)) * (200 * MIB)
    code = "from kvscope.harness.passes.memory import host_rss_peak_bytes; print(host_rss_peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < 150 * MIB
    assert host_rss_bytes() > len(ballast)
