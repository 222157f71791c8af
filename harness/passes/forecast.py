"""What a cell is expected to take, and whether that fits: from byte formulas and what is free, before anything runs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kvscope.harness.passes.chunks import memory_chunk_tokens
from kvscope.harness.passes.config import RunConfig
from kvscope.harness.passes.device_budget import CONTEXT_BYTES
from kvscope.harness.passes.facts import ModelFacts
from kvscope.harness.passes.memory import free_device_bytes
from kvscope.harness.passes.target import Target
from kvscope.results.run_schema import PlannedCell
from kvscope.results.schema import Forecast
from kvscope.units import format_bytes

if TYPE_CHECKING:
    from kvscope.methods.base import CacheMethod, Footprint


Rooms = Mapping[str, tuple[int | None, str]]
"""Device -> (free bytes, its name); None bytes where nobody told."""


def device_rooms(
    config: RunConfig, facts: ModelFacts, target: Target | None = None
) -> dict[str, tuple[int | None, str]]:
    """Return device -> (free bytes, its name) for computing devices and the host; a budget lowers the device's.

    Args:
        target: the machine that is planned for; None: this one.
    """
    if target is None:
        rooms = {device: free_device_bytes(device) for device in dict.fromkeys([*facts.devices, "cpu"])}
        if facts.device_map is not None:
            # Of several alike the name would not tell which.
            rooms |= {device: (rooms[device][0], device) for device in facts.devices}
    else:
        rooms = {facts.device: (target.memory_bytes, target.name), "cpu": (target.host_bytes, "host memory")}
    budget_bytes = config.gpu_budget_bytes
    if budget_bytes is not None and facts.device != "cpu":
        free_bytes, _ = rooms[facts.device]
        least_bytes = budget_bytes if free_bytes is None else min(free_bytes, budget_bytes)
        rooms[facts.device] = least_bytes, "the device budget"
    return rooms


def plan_cell(
    method: "CacheMethod[Any]",
    length_tokens: int,
    *,
    config: RunConfig,
    facts: ModelFacts,
    rooms: Rooms,
) -> PlannedCell:
    """Forecast one (method, length): predicted bytes, and whether they fit.

    Args:
        rooms: device -> (free bytes, its name), as ``free_device_bytes`` returns; the computing device and ``cpu``.
    """
    reasons = method.unsupported(facts.shape, facts.device)
    if reasons:
        return PlannedCell(
            method_label=method.label, length_tokens=length_tokens, forecast="unsupported", reason="; ".join(reasons)
        )
    decode_tokens = min(config.footprint_decode_tokens, length_tokens - 1)
    # As the footprint pass will find it: all tokens but the last prefilled, that one the first of the steps.
    predicted = method.predict(facts.shape, length_tokens - decode_tokens - 1, decode_tokens)
    forecast: Forecast = "unknown"
    reason = None
    needs = needed_bytes_by_device(method, predicted, length_tokens, config=config, facts=facts)
    for device, needed_bytes in needs.items():
        free_bytes, where = rooms[device]
        if free_bytes is None:
            continue
        if needed_bytes > free_bytes:
            forecast = "oom"
            reason = f"needs about {format_bytes(needed_bytes)} of {where}, {format_bytes(free_bytes)} is free"
            break
        forecast = "fits"
    return PlannedCell(
        method_label=method.label,
        length_tokens=length_tokens,
        predicted_kv_bytes=predicted.kv_bytes,
        predicted_metadata_bytes=predicted.metadata_bytes,
        predicted_host_bytes=predicted.host_bytes,
        forecast=forecast,
        reason=reason,
    )


def needed_bytes_by_device(
    method: "CacheMethod[Any]",
    predicted: "Footprint",
    length_tokens: int,
    *,
    config: RunConfig,
    facts: ModelFacts,
) -> dict[str, int]:
    """Estimate the peak bytes of a cell by device: where it computes, and the host that holds the prompt's pages.

    Of several devices each has its layers' part of the cache; the prefill comes to each in turn. A synthetic prompt is
    smaller where its pages are not recalled. What is recalled packed is held beside the prompt.
    """
    if facts.weights_bytes is None:
        return {}
    pages_bytes = facts.shape.dense_kv_bytes(length_tokens)
    prefill_bytes = facts.prefill_peak_bytes(length_tokens, chunk_tokens=memory_chunk_tokens(config))
    if config.synthetic_kv and not config.tasks:
        pages_bytes = pages_bytes if method.recalls_raw_pages else pages_bytes // max(1, len(facts.shape.layers))
        prefill_bytes = 0
    if method.kv is not None:
        pages_bytes += predicted.host_bytes
    held_bytes = config.footprint_batch * predicted.device_bytes
    needs = {
        part.device: part.weights_bytes + max(prefill_bytes, round(part.cache_share * held_bytes))
        for part in facts.device_parts()
    }
    if facts.device == "cpu":
        return {"cpu": needs["cpu"] + pages_bytes}
    return {**{device: CONTEXT_BYTES + n_bytes for device, n_bytes in needs.items()}, "cpu": pages_bytes}


def longest_that_fits(method: "CacheMethod[Any]", *, config: RunConfig, facts: ModelFacts, rooms: Rooms) -> int:
    """Return the longest length that the byte formulas expect to fit, in whole pages; 0 where none does."""
    unit = config.page_tokens

    def fits(length_tokens: int) -> bool:
        steps = min(config.footprint_decode_tokens, length_tokens - 1)
        predicted = method.predict(facts.shape, length_tokens - steps - 1, steps)
        if facts.device == "cpu" and config.gpu_budget_bytes is not None:
            needs = {"cpu": (facts.weights_bytes or 0) + predicted.device_bytes}
        else:
            needs = needed_bytes_by_device(method, predicted, length_tokens, config=config, facts=facts)
        return all(free is None or needs.get(device, 0) <= free for device, (free, _) in rooms.items())

    low, high = 0, facts.max_length_tokens // unit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle - 1)
    return low * unit
