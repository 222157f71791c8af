"""A process that computes on a GPU has few threads on the host, unless the user says how many."""

import os

import pytest
import torch

from kvscope.harness.engine.host_threads import GPU_HOST_THREADS, few_host_threads, threads_a_process


@pytest.fixture
def set_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return what torch is told; it has 16 threads."""
    told: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return told


def test_few_within_and_as_many_as_before_behind_it(set_threads: list[int]) -> None:
    with few_host_threads("cuda:1"):
        assert set_threads == [GPU_HOST_THREADS]
    assert set_threads == [GPU_HOST_THREADS, 16]


def test_a_cpu_computes_with_all_of_them(set_threads: list[int]) -> None:
    with few_host_threads("cpu"):
        pass
    assert set_threads == []


def test_the_users_number_stays(set_threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with few_host_threads("cuda:0"):
        pass
    assert set_threads == []


@pytest.mark.parametrize(
    ("cores", "processes", "device", "expected"),
    [(32, 6, "cuda:0", 4), (8, 6, "cuda:0", 1), (8, 2, "cpu", 4), (2, 5, "cpu", 1), (None, 2, "cuda:0", 1)],
)
def test_processes_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, processes: int, device: str, expected: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert threads_a_process(processes, device=device) == expected
