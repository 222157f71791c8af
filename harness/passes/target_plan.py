"""What ``kvscope plan --target`` says of another machine: longest contexts, batches that fit, times of a step.

Bytes are the methods' formulas, as everywhere in a plan. A time is a range: at least the step's bytes over the
bandwidth of a copy, at most that and what captured steps took beyond it where they were measured. Of packed pages there
is no upper end: unpacking bounds their steps.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from kvscope.harness.passes.chunks import memory_chunk_tokens
from kvscope.harness.passes.config import RunConfig
from kvscope.harness.passes.device_budget import CONTEXT_BYTES
from kvscope.harness.passes.facts import ModelFacts
from kvscope.harness.passes.floor import floor_s
from kvscope.harness.passes.forecast import Rooms, longest_that_fits
from kvscope.harness.passes.target import LAYER_S, LAYER_SOURCE, Target
from kvscope.terminal import grid
from kvscope.units import format_length

if TYPE_CHECKING:
    from kvscope.methods.base import CacheMethod


@dataclass(frozen=True, kw_only=True)
class TargetCell:
    """One (method, length) on another machine.

    Attributes:
        largest_batch: sequences with prompts of their own that fit while one more prompt is prefilled; 0: not one. None
            where the weights' size is not known.
        least_step_s, most_step_s: range of a decode step of one sequence; None where it cannot be told.
        least_batch_step_s, most_batch_step_s: the same of the largest batch.
        refresh_s: most seconds that a recall of the whole resident set takes, on top; None without one.
    """

    method_label: str
    length_tokens: int
    largest_batch: int | None
    least_step_s: float | None = None
    most_step_s: float | None = None
    least_batch_step_s: float | None = None
    most_batch_step_s: float | None = None
    refresh_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class TargetPlan:
    """All of it.

    Attributes:
        longest_tokens: label -> longest context of one sequence; 0 where none fits.
        max_length_tokens: longest that the model takes.
    """

    target: Target
    longest_tokens: dict[str, int]
    max_length_tokens: int
    cells: tuple[TargetCell, ...]

    def text(self, *, width: int | None = None) -> list[str]:
        """Return its lines."""
        rows = [self._row(cell) for cell in self.cells]
        if not rows:
            longest = [[label, self._longest(label)] for label in self.longest_tokens]
            return [
                "",
                f"On {self.target.name}",
                *_table(longest, ["method", "longest context"], width),
                *self._notes(),
            ]
        header = ["method", "longest context", "length", "largest batch", "ms a token, alone", "ms, largest batch"]
        return [f"On {self.target.name}", *_table(rows, header, width), *self._notes()]

    def values(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "target": asdict(self.target),
            "longest_tokens": self.longest_tokens,
            "cells": [asdict(cell) for cell in self.cells],
            "layer_s": LAYER_S,
        }

    def _longest(self, label: str) -> str:
        longest = self.longest_tokens[label]
        if not longest:
            return "none fits"
        return f"{longest:,}" + (" (the model's most)" if longest >= self.max_length_tokens else "")

    def _row(self, cell: TargetCell) -> list[str]:
        return [
            cell.method_label,
            self._longest(cell.method_label),
            format_length(cell.length_tokens),
            "not known" if cell.largest_batch is None else str(cell.largest_batch) if cell.largest_batch else "OOM",
            _range(cell.least_step_s, cell.most_step_s),
            _range(cell.least_batch_step_s, cell.most_batch_step_s),
        ]

    def _notes(self) -> list[str]:
        said = [
            "A batch has prompts of its own, all resident, and room to prefill one more. Formulas leave out "
            "workspaces, a few percent."
        ]
        timed = [cell for cell in self.cells if cell.least_step_s is not None]
        if timed and self.target.is_measured:
            said.append(
                "Times are predicted: the step's bytes over the measured bandwidth, to that plus "
                f"{LAYER_S * 1e3:.2f} ms a layer, the most that a captured step took beyond it ({LAYER_SOURCE}). Steps "
                "that cannot be captured as a CUDA graph take longer."
            )
            if any(cell.most_step_s is None for cell in timed):
                said.append(
                    "Packed pages (kv) are unpacked as they are read, at less than that bandwidth: no step over them "
                    "is faster, and steps are slower."
                )
        elif timed:
            said.append("Times are no predictions: no step can be faster by the data sheet, and steps are slower.")
        elif self.cells and self.target.copy_bytes_per_s is not None:
            said.append("Times are not predicted: which experts' weights a step reads is known to the device alone.")
        refreshes = [cell for cell in self.cells if cell.refresh_s is not None]
        if refreshes:
            worst = max(refreshes, key=lambda cell: cell.refresh_s or 0.0)
            said.append(
                "Recalls come on top: one that brings the whole resident set anew takes "
                f"{1e3 * (worst.refresh_s or 0):.0f} ms ({worst.method_label}, {format_length(worst.length_tokens)})."
            )
        return [f"note       {sentence}" for sentence in said]


def plan_target(
    target: Target,
    methods: "Sequence[CacheMethod[Any]]",
    lengths_tokens: Sequence[int],
    *,
    config: RunConfig,
    facts: ModelFacts,
    rooms: Rooms,
) -> TargetPlan:
    """Forecast methods on another machine; those that cannot run there are left out.

    Args:
        facts: as of a GPU elsewhere (``describe_model``).
        rooms: of the target, as ``device_rooms`` returns.
    """
    able = [method for method in methods if not method.unsupported(facts.shape, facts.device)]
    return TargetPlan(
        target=target,
        longest_tokens={
            method.label: longest_that_fits(method, config=config, facts=facts, rooms=rooms) for method in able
        },
        max_length_tokens=facts.max_length_tokens // config.page_tokens * config.page_tokens,
        cells=tuple(
            _cell(target, method, length_tokens, config=config, facts=facts, rooms=rooms)
            for method in able
            for length_tokens in lengths_tokens
        ),
    )


def _cell(
    target: Target,
    method: "CacheMethod[Any]",
    length_tokens: int,
    *,
    config: RunConfig,
    facts: ModelFacts,
    rooms: Rooms,
) -> TargetCell:
    steps = min(config.footprint_decode_tokens, length_tokens - 1)
    each = method.predict(facts.shape, length_tokens - steps - 1, steps)
    batch = None
    is_mirrored = method.saving_kind == "offloaded"
    if facts.weights_bytes is not None:
        synthetic = config.synthetic_kv and not config.tasks
        prefill_bytes = (
            0 if synthetic else facts.prefill_peak_bytes(length_tokens, chunk_tokens=memory_chunk_tokens(config))
        )
        fixed_bytes = CONTEXT_BYTES + facts.weights_bytes + prefill_bytes
        pages_bytes = facts.shape.dense_kv_bytes(length_tokens)

        def fits(n: int) -> bool:
            host_bytes = pages_bytes * (n if method.recalls_raw_pages else 1)
            if method.kv is not None:  # what is recalled packed is held beside the prompt
                host_bytes += n * each.host_bytes
            needs = {facts.device: fixed_bytes + n * each.device_bytes, "cpu": host_bytes}
            return all(room is None or needs[where] <= room for where, (room, _) in rooms.items())

        batch = most(fits, limit=config.max_batch if config.throughput else 2**20)
    times: dict[str, float] = {}
    if target.copy_bytes_per_s is not None and facts.step_weights_bytes is not None:
        for name, n in (("step_s", 1), ("batch_step_s", batch or 0)):
            if not n or not batch:
                continue
            least_s = floor_s(
                facts.step_weights_bytes + n * each.bytes_read_per_step,
                0,
                copy_bytes_per_s=target.copy_bytes_per_s,
                bus_bytes_per_s=None,
                recalls_behind=False,
            )
            times[f"least_{name}"] = least_s
            if target.is_measured and method.kv is None:
                times[f"most_{name}"] = least_s + LAYER_S * facts.shape.n_layers
    if is_mirrored and target.bus_bytes_per_s is not None and batch:
        times["refresh_s"] = each.kv_bytes / target.bus_bytes_per_s
    return TargetCell(method_label=method.label, length_tokens=length_tokens, largest_batch=batch, **times)


def most(fits: Callable[[int], bool], *, limit: int) -> int:
    """Return the largest n up to ``limit`` that fits, 0 where none does; what fits n fits fewer."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _range(least_s: float | None, most_s: float | None) -> str:
    if least_s is None:
        return "not known"
    return f"over {1e3 * least_s:.1f}" if most_s is None else f"{1e3 * least_s:.1f} to {1e3 * most_s:.1f}"


def _table(rows: list[list[str]], header: list[str], width: int | None) -> list[str]:
    aligned = ["left", *("right" for _ in header[1:])]
    return grid(rows, header, aligned=aligned, width=width).split("\n")
