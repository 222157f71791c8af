"""Pinned host memory at its exact size; CUDA's two calls are stood in for."""

import gc
import mmap
from typing import Any

import pytest
import torch

from kvscope.methods import pinned

MIB = 1024 * 1024


class Runtime:
    """The part of the CUDA runtime that is called."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.calls: list[tuple[str, int]] = []

    def cudaHostRegister(self, address: int, n_bytes: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        self.calls.append(("lock", address))
        assert flags == 3
        return self.code

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.calls.append(("unlock", address))
        return 0


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    found = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: found)
    return found


@pytest.mark.parametrize(("n_bytes", "added"), [(0, 0), (1, 0), (1024, 0), (1025, 1023), (3 * MIB, MIB), (1 << 30, 0)])
def test_what_rounding_up_adds(n_bytes: int, added: int) -> None:
    assert pinned.rounding_bytes(n_bytes) == added


def test_small_waste_stays_with_torch(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: (asked.append(pin_memory), real(*a, **k))[1])
    assert pinned.empty_pinned((64, 1024), dtype=torch.float16).shape == (64, 1024)
    assert asked == [True]
    assert runtime.calls == []


def test_torchs_out_of_memory_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(torch, "empty", refuse)
    message = "CUDA error: out of memory"
    with pytest.raises(MemoryError, match="the host cannot lock 1,024 bytes for the GPU"):
        pinned.empty_pinned((1024,), dtype=torch.uint8)
    message = "no accelerator"
    with pytest.raises(RuntimeError, match="no accelerator"):
        pinned.empty_pinned((1024,), dtype=torch.uint8)


def test_large_waste_is_mapped_locked_and_given_back_with_the_last_view(runtime: Runtime) -> None:
    tensor = pinned.empty_pinned((33, MIB), dtype=torch.bfloat16)  # 66 MiB would become 128
    address = tensor.data_ptr()
    assert runtime.calls == [("lock", address)]
    assert tensor.shape == (33, MIB)
    assert tensor.untyped_storage().nbytes() == 66 * MIB
    tensor.fill_(1.5)
    view = tensor[7]
    del tensor
    gc.collect()
    assert runtime.calls == [("lock", address)]
    assert float(view.sum()) == 1.5 * MIB
    del view
    gc.collect()
    assert runtime.calls == [("lock", address), ("unlock", address)]


def test_memory_that_cannot_be_locked_is_an_error_and_is_unmapped(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(code=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(MemoryError, match=r"cannot lock 69,206,016 bytes .*cudaHostRegister: 2"):
        pinned.empty_pinned((33, MIB), dtype=torch.bfloat16)
    gc.collect()
    assert [kind for kind, _ in runtime.calls] == ["lock"]
    assert len(pinned._blocks) == 0


def test_memory_that_cannot_be_mapped_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(mmap.mmap):
        def __new__(cls, *arguments: Any, **options: Any) -> Any:
            raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(pinned, "_Block", Full)
    with pytest.raises(MemoryError, match="cannot map 1,024 bytes: Cannot allocate memory"):
        pinned.empty_mapped((1024,), dtype=torch.uint8)
