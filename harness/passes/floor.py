"""The least time a decode step can take on this machine: its bytes over the bandwidths that were measured beside it."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from kvscope.harness.engine.loaded import LoadedModel

_COPIES = 10
_DEVICE_BYTES, _BUS_BYTES, _CPU_BYTES = 2**30, 2**28, 2**26


def copy_bytes_per_s(device: torch.device) -> float:
    """Return the bandwidth of a copy in the device's memory, bytes read and written."""
    import torch

    n_bytes = _DEVICE_BYTES if device.type == "cuda" else _CPU_BYTES
    source = torch.zeros(n_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * n_bytes / _copy_s(target, source, device)


def bus_bytes_per_s(device: torch.device) -> float | None:
    """Return the bandwidth of a copy from pinned host memory; None where there is no bus between host and device."""
    if device.type != "cuda":
        return None
    import torch

    source = torch.zeros(_BUS_BYTES, dtype=torch.uint8).pin_memory()
    return _BUS_BYTES / _copy_s(torch.empty_like(source, device=device), source, device)


def _copy_s(target: torch.Tensor, source: torch.Tensor, device: torch.device) -> float:
    times_s = []
    for _ in range(_COPIES + 2):
        _wait(device)
        started_s = time.perf_counter()
        target.copy_(source, non_blocking=True)
        _wait(device)
        times_s.append(time.perf_counter() - started_s)
    return statistics.median(times_s[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def weights_read_bytes(loaded: LoadedModel) -> int:
    """Return the bytes of weights that a step reads: all but a table of embeddings that serves as nothing else.

    Of a table of embeddings a step reads a row a sequence. Experts count whether or not a token goes to them.
    """
    return sum(each.numel() * each.element_size() for each in weights_read(loaded.model))


def weights_read(model: Any) -> list[torch.Tensor]:
    """Return the weights that a step reads, as ``weights_read_bytes`` counts them; the model may have no storage."""
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    apart = embeddings is not None and (output is None or output.weight is not embeddings.weight)
    skipped = {id(parameter) for parameter in embeddings.parameters()} if apart else set()
    return [each for each in model.parameters() if id(each) not in skipped]


def floor_s(
    read_bytes: float,
    recalled_bytes: float,
    *,
    copy_bytes_per_s: float,
    bus_bytes_per_s: float | None,
    recalls_behind: bool,
) -> float:
    """Return the seconds that a step's bytes take.

    Args:
        read_bytes: of weights, K, V and metadata, a step.
        recalled_bytes: from host memory, a step in the mean.
        recalls_behind: whether the recall runs behind the steps: then the longer of the two counts, else their sum.
    """
    device_s = read_bytes / copy_bytes_per_s
    bus_s = recalled_bytes / bus_bytes_per_s if bus_bytes_per_s else 0.0
    return max(device_s, bus_s) if recalls_behind else device_s + bus_s
