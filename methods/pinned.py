"""Host memory a GPU can copy from at full speed, at its exact size.

torch's own pinned allocator rounds every block up to a power of two, which for a long prompt's mirror can nearly double
it, unseen by any count. Blocks that would waste much are mapped here, page-locked by registering them with CUDA, and
unlocked and unmapped when their last tensor goes.
"""

import contextlib
import math
import mmap
import weakref
from collections.abc import Sequence
from typing import Any

import torch

#: Waste that rounding up may cause before a block is mapped at its exact size: small blocks stay with torch, which
#: keeps them locked for the next prompt.
MAX_ROUNDING_BYTES = 16 * 1024 * 1024
#: cudaHostRegisterPortable | cudaHostRegisterMapped: locked for every context, and readable by kernels.
_FLAGS = 3


class _Block(mmap.mmap):
    """Anonymous memory that is unlocked before it is unmapped."""

    locked_at: int | None = None

    def __del__(self) -> None:
        if self.locked_at is not None:
            _unlock(self.locked_at)
            self.locked_at = None


def rounding_bytes(n_bytes: int) -> int:
    """Return what torch's pinned allocator adds to a block of ``n_bytes``."""
    return (1 << max(0, n_bytes - 1).bit_length()) - n_bytes if n_bytes else 0


#: Address -> the living block that begins there.
_blocks: "weakref.WeakValueDictionary[int, _Block]" = weakref.WeakValueDictionary()


def empty_pinned(size: Sequence[int], *, dtype: torch.dtype) -> torch.Tensor:
    """Return an uninitialised page-locked tensor; its bytes are what it takes, to ``MAX_ROUNDING_BYTES``.

    Raises:
        MemoryError: the host has not that much memory to map or to lock.
    """
    n_bytes = math.prod(size) * dtype.itemsize
    if rounding_bytes(n_bytes) <= MAX_ROUNDING_BYTES:
        try:
            return torch.empty(tuple(size), dtype=dtype, pin_memory=True)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            # CUDA words it as if the device had run out.
            raise MemoryError(f"the host cannot lock {n_bytes:,} bytes for the GPU") from error
    tensor = empty_mapped(size, dtype=dtype)
    lock(tensor)
    return tensor


def empty_mapped(size: Sequence[int], *, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor over memory mapped for it alone, in huge pages where the kernel gives them.

    Raises:
        MemoryError: the memory cannot be mapped.
    """
    n_bytes = math.prod(size) * dtype.itemsize
    try:
        block = _Block(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"the host cannot map {n_bytes:,} bytes: {error.strerror}") from error
    with contextlib.suppress(OSError, AttributeError):  # a kernel without huge pages is merely slower
        block.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(block, dtype=dtype).view(tuple(size))  # the tensor keeps the block alive
    _blocks[tensor.data_ptr()] = block
    return tensor


def lock(tensor: torch.Tensor) -> None:
    """Page-lock a tensor of ``empty_mapped``. Filling it first is faster: many threads touch its pages then.

    Raises:
        MemoryError: the host has not that much memory to lock.
    """
    address, n_bytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = runtime.cudaHostRegister(address, n_bytes, _FLAGS)
    if int(code) != 0:
        raise MemoryError(f"the host cannot lock {n_bytes:,} bytes for the GPU (cudaHostRegister: {code})")
    _blocks[address].locked_at = address


def _unlock(address: int) -> None:
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(address)
