"""Weights of indexers, read from safetensors files that may come from anywhere."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kvscope.errors import UsageError
from kvscope.files import first_line

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorHeader:
    """What the header of a safetensors file says of a tensor.

    Attributes:
        shape: its sizes.
        dtype: its type as the format names it: ``F32``, ``I8``.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers that need no scale."""
        return self.dtype in ("F64", "F32", "F16", "BF16")


def tensor_headers(path: Path) -> dict[str, TensorHeader]:
    """Return the tensors of a safetensors file by name, from its header alone.

    Raises:
        UsageError: it is missing, no regular file, cut, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    if path.exists() and not path.is_file():
        raise UsageError(f"Indexer weights '{path}' are no regular file; give a safetensors file.")
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return {name: TensorHeader(tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
    except (OSError, SafetensorError) as error:
        raise cannot_read(path, error) from error


def finite_weights(path: Path) -> "dict[str, torch.Tensor]":
    """Return the tensors of an indexer's weights, by name, on the CPU.

    Raises:
        UsageError: they cannot be read, or one holds NaN or infinity.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise cannot_read(path, error) from error
    damaged = sorted(name for name, value in weights.items() if not bool(value.isfinite().all()))
    if damaged:
        raise UsageError(
            f"Indexer weights '{path}' are not finite ({', '.join(damaged[:3])}); train the indexer again."
        )
    return weights


def cannot_read(path: Path, error: Exception) -> UsageError:
    """Return the error of weights that cannot be read."""
    return UsageError(f"Indexer weights '{path}' cannot be read ({first_line(error)}); train the indexer again.")
