"""The plan's tables: predicted bytes of every method at every length."""

from collections.abc import Sequence

from kvscope.results.run_schema import PlannedCell
from kvscope.terminal import grid
from kvscope.units import format_length

MIB = 1024**2


def forecast_tables(labels: Sequence[str], cells: Sequence[PlannedCell], *, width: int | None = None) -> list[str]:
    """Return the tables of device bytes and, where there are any, of host bytes, each under its title.

    Args:
        labels: the methods, a row each.
        cells: a forecast of each method at each length.
        width: columns of a line; None for any.
    """
    by_key = {(cell.method_label, cell.length_tokens): cell for cell in cells}
    lengths = sorted({cell.length_tokens for cell in cells})
    header = ["method", *(format_length(n) for n in lengths)]
    aligned = ("left", *("right" for _ in lengths))

    def table(texts: list[list[str]]) -> str:
        return grid(texts, header, aligned=aligned, width=width)

    kv = [[label, *(_device_text(by_key[label, n]) for n in lengths)] for label in labels]
    lines = ["Predicted bytes on the device (KV + metadata), MiB", table(kv)]
    if any(cell.predicted_host_bytes for cell in cells):
        host = [[label, *(_mib(by_key[label, n].predicted_host_bytes) for n in lengths)] for label in labels]
        lines += ["", "Predicted bytes in host memory, MiB", table(host)]
    return lines


def lengths_text(lengths_tokens: Sequence[int]) -> str:
    """Return lengths as ``1K, 2K tokens``."""
    return ", ".join(format_length(n) for n in lengths_tokens) + " tokens"


def _mib(value_bytes: int | None) -> str:
    return "unsupported" if value_bytes is None else f"{value_bytes / MIB:,.2f}"


def _device_text(cell: PlannedCell) -> str:
    if cell.predicted_kv_bytes is None:
        return "unsupported"
    text = _mib(cell.predicted_kv_bytes + (cell.predicted_metadata_bytes or 0))
    return f"{text} OOM" if cell.forecast == "oom" else text
