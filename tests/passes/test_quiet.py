"""A machine that is not quiet is told before a run begins, by the limits that its rows are judged by."""

import os

import pytest
import torch
from notes import Notes
from tiny import MakeConfig

from kvscope.harness.passes import quiet
from kvscope.harness.passes.quiet import disturbances
from kvscope.harness.passes.sweep import run
from kvscope.reports.trust import time_doubts


@pytest.mark.parametrize(("load", "told"), [(2.5, ""), (2.6, "host load 2.6 on 2 cores"), (None, "")])
def test_load_is_judged_as_that_of_rows_is(monkeypatch: pytest.MonkeyPatch, load: float | None, told: str) -> None:
    monkeypatch.setattr(quiet, "load_1min", lambda: load)
    monkeypatch.setattr(quiet, "usable_cores", lambda: 2)
    assert disturbances(["cpu", "cpu"]) == told
    assert bool(told) == bool(time_doubts({"load_1min": load, "cpu_cores": 2}))


@pytest.mark.parametrize(
    ("in_host", "initialized", "listed", "told"),
    [
        (True, True, [os.getpid()], ""),
        (True, True, [os.getpid(), 1, 2], "2 other processes on cuda:0; 2 other processes on cuda:1"),
        (False, False, [1], "1 other process on cuda:0; 1 other process on cuda:1"),
        (False, True, [1], "1 other process on cuda:1"),
        (True, False, None, ""),
    ],
)
def test_other_processes_are_counted_without_our_own(
    monkeypatch: pytest.MonkeyPatch, in_host: bool, initialized: bool, listed: list[int] | None, told: str
) -> None:
    class Driver:
        def __init__(self, device_index: int) -> None:
            assert device_index in (0, 1)

        def processes(self) -> dict[int, int] | None:
            return None if listed is None else dict.fromkeys(listed, 5)

    monkeypatch.setattr(quiet, "NvmlProcessMemory", Driver)
    monkeypatch.setattr(quiet, "in_host_pid_namespace", lambda: in_host)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert disturbances(["cuda:0", "cuda:1", "cuda:0"]) == told


def test_a_run_says_so_in_one_line_where_something_is_to_be_measured(
    small: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiet, "load_1min", lambda: 99.0)
    monkeypatch.setattr(quiet, "usable_cores", lambda: 2)
    line = "note: this machine is not quiet (host load 99.0 on 2 cores): times measured now are not to be trusted."
    first, again = Notes(), Notes()
    run(small(samples=1), progress=first)
    assert first.said.count(line) == 1
    run(small(samples=1), progress=again)
    assert line not in again.said
