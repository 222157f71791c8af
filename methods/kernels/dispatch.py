"""Says whether a kernel runs here, with every reason why not. The one place that decides between Triton and torch.

The choice depends on the machine and on the model's shape, never on the data of a call, so what is in use can be
written into a row (``decode_backend``) and cannot change behind it.
"""

import os
import shutil
from dataclasses import dataclass
from functools import lru_cache

import torch

from kvscope.methods.kv_format import PagePacking

MAX_HEAD_DIM = 256
MAX_GROUP = 64
MAX_INDEXER_HEADS = 256
MIN_PACKED_TILE = 16
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_CAPABILITY = (8, 0)
_FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Backend:
    """What computes an operation.

    Attributes:
        name: ``triton`` or ``torch``.
        version: of that library.
        reasons: why it is not Triton; empty when it is.
    """

    name: str
    version: str
    reasons: tuple[str, ...] = ()


@lru_cache(maxsize=1)
def triton_version() -> tuple[str | None, str]:
    """Return the version of the installed Triton and an empty text, or None and what is wrong with it."""
    try:
        import triton
    except (ImportError, OSError) as error:
        return None, f"Triton cannot be imported ({error})"
    return str(triton.__version__), ""


def unsupported_machine(device: torch.device | str) -> list[str]:
    """Return every reason why no kernel runs on this device; empty when kernels run."""
    device = torch.device(device)
    version, problem = triton_version()
    reasons = [] if version else [problem]
    if device.type != "cuda":
        reasons.append(f"the device is {device.type}, kernels need a CUDA GPU")
        return reasons
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        reasons.append(f"the GPU has compute capability {capability[0]}.{capability[1]}, kernels need 8.0")
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if name):
        reasons.append("no C compiler is on the PATH, and Triton builds its launchers with one")
    return reasons


def unsupported_decode(
    device: torch.device | str, *, dtype: torch.dtype, head_dim: int, n_q_heads: int, n_kv_heads: int
) -> list[str]:
    """Return every reason why the ``paged_decode`` kernel does not run; empty when it does."""
    return list(_unsupported_decode(torch.device(device), dtype, head_dim, n_q_heads // n_kv_heads))


@lru_cache(maxsize=64)
def _unsupported_decode(device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> tuple[str, ...]:
    reasons = unsupported_machine(device)
    if dtype not in _DTYPES:
        reasons.append(f"K and V are {dtype}, the kernel takes bfloat16, float16 and float32")
    if head_dim % 16 or head_dim > MAX_HEAD_DIM:
        reasons.append(f"the head size is {head_dim}, the kernel takes multiples of 16 up to {MAX_HEAD_DIM}")
    if group > MAX_GROUP:
        reasons.append(f"{group} query heads share a KV head, the kernel takes {MAX_GROUP}")
    return tuple(reasons)


def unsupported_packed(
    device: torch.device | str, *, dtype: torch.dtype, packing: PagePacking, n_q_heads: int, n_kv_heads: int
) -> list[str]:
    """Return every reason why the ``paged_decode`` kernel does not read packed pages; empty when it does.

    Args:
        dtype: of the queries.
    """
    return list(_unsupported_packed(torch.device(device), dtype, packing, n_q_heads // n_kv_heads))


@lru_cache(maxsize=64)
def _unsupported_packed(device: torch.device, dtype: torch.dtype, packing: PagePacking, group: int) -> tuple[str, ...]:
    reasons = list(_unsupported_decode(device, dtype, packing.head_dim, group))
    if packing.key_group_tokens % MIN_PACKED_TILE:
        reasons.append(
            f"keys share scales over {packing.key_group_tokens} tokens, the kernel takes multiples of {MIN_PACKED_TILE}"
        )
    return tuple(reasons)


def unsupported_block_scores(
    device: torch.device | str, *, dtype: torch.dtype, head_dim: int, group: int, block_tokens: int | None = None
) -> list[str]:
    """Return every reason why the ``block_scores`` kernels do not run; empty when they do.

    Args:
        block_tokens: of a block whose own keys are read (MSA); None for scores by summaries.
    """
    reasons = list(_unsupported_decode(torch.device(device), dtype, head_dim, group))
    if block_tokens is not None and block_tokens & (block_tokens - 1):
        reasons.append(f"blocks have {block_tokens} tokens, the kernel takes powers of two")
    return reasons


def unsupported_scores(device: torch.device | str, *, key_dim: int, n_heads: int) -> list[str]:
    """Return every reason why the kernels ``indexer_score`` and ``select`` do not run; empty when they do."""
    reasons = unsupported_machine(device)
    if torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        reasons.append("the GPU has no fp8, which the indexer's keys are stored in")
    if key_dim % 16 or key_dim > MAX_HEAD_DIM:
        reasons.append(f"the indexer's key size is {key_dim}, the kernel takes multiples of 16 up to {MAX_HEAD_DIM}")
    if n_heads > MAX_INDEXER_HEADS:
        reasons.append(f"the indexer has {n_heads} heads, the kernel takes {MAX_INDEXER_HEADS}")
    return reasons


def unsupported_index_topk(device: torch.device | str, *, key_dim: int, n_heads: int) -> list[str]:
    """Return every reason why the ``index_topk`` kernels do not run; empty when they do."""
    return list(_unsupported_index_topk(torch.device(device), key_dim, n_heads))


@lru_cache(maxsize=64)
def _unsupported_index_topk(device: torch.device, key_dim: int, n_heads: int) -> tuple[str, ...]:
    reasons = unsupported_machine(device)
    if key_dim % 16 or key_dim > MAX_HEAD_DIM:
        reasons.append(f"the native indexer's key size is {key_dim}, the kernel takes multiples of 16 up to 256")
    if n_heads > MAX_INDEXER_HEADS:
        reasons.append(f"the native indexer has {n_heads} heads, the kernel takes {MAX_INDEXER_HEADS}")
    return tuple(reasons)


def decode_backend(
    device: torch.device | str, *, dtype: torch.dtype, head_dim: int, n_q_heads: int, n_kv_heads: int
) -> Backend:
    """Return what computes decode attention over pages for a model of this shape on this device."""
    reasons = unsupported_decode(device, dtype=dtype, head_dim=head_dim, n_q_heads=n_q_heads, n_kv_heads=n_kv_heads)
    version, _ = triton_version()
    if reasons or version is None:
        return Backend("torch", torch.__version__, tuple(reasons))
    return Backend("triton", version)
