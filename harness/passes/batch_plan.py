"""How many sequences of the accuracy pass share a step, by length: ``--batch auto`` is resolved here.

From what the plan knows alone (byte formulas, what the machine has in all), never from what is free at the moment: the
same call on the same machine gives the same steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvscope.harness.engine.host_memory import total_host_bytes
from kvscope.harness.passes.chunks import accuracy_chunk_tokens
from kvscope.harness.passes.config import RunConfig
from kvscope.harness.passes.device_budget import CONTEXT_BYTES
from kvscope.harness.passes.facts import ModelFacts
from kvscope.harness.passes.memory import total_device_bytes
from kvscope.harness.passes.target import Target
from kvscope.harness.passes.workers import worker_devices
from kvscope.units import format_bytes, format_length

if TYPE_CHECKING:
    from kvscope.methods.base import CacheMethod
    from kvscope.tasks.base import Task

#: Most sequences of a step, where memory holds more.
MOST_ROWS_CPU, MOST_ROWS_CUDA = 32, 144
#: Rows of every step of the accuracy pass on a GPU, whoever is in it (``Session``). So few rows are expected to take
#: little longer than the weights take to be read; it was not timed yet.
STEP_ROWS_CUDA = MOST_ROWS_CUDA
#: Share of a memory that the pass may fill: allocators keep more than is asked of them, and others live there, too.
DEVICE_SHARE, HOST_SHARE = 0.85, 0.5


@dataclass(frozen=True, kw_only=True)
class BatchCell:
    """Sequences that share a step at one length.

    Attributes:
        rows: how many, at most.
        prompts: prompts begun at once, at most.
        device_bytes, host_bytes: what all of it takes at most, weights and prefill included; on a CPU all of it is
            host memory, and of several devices it is the one that holds most. None where it cannot be told.
    """

    length_tokens: int
    rows: int
    prompts: int
    device_bytes: int | None
    host_bytes: int | None


def step_rows(facts: ModelFacts) -> int | None:
    """Return the rows of every step's forward: on a GPU always as many, so that answers are the same in any batch.

    None: a row an answer. A model that brings its own cache steps one at a time, and has always the same.
    """
    return STEP_ROWS_CUDA if facts.device.startswith("cuda") and not facts.backend.holds_one_sequence else None


def prompts_of(rows: int, n_methods: int) -> int:
    """Return how many prompts may be begun at once: as many as consecutive pairs can be of."""
    return -(-(rows - 1) // max(1, n_methods)) + 1


def plan_batch(
    config: RunConfig,
    facts: ModelFacts,
    methods: "Sequence[CacheMethod[Any]]",
    tasks: "Sequence[Task]",
    *,
    target: Target | None = None,
) -> tuple[BatchCell, ...]:
    """Return the steps' sizes, a cell a length of the accuracy pass, shortest first.

    Args:
        target: another machine that is planned for; None: this one.
    """
    if not tasks:
        return ()
    longest_answer = max(task.max_new_tokens for task in tasks)
    # No more than there are: noise of steps that no answers share is not worth measuring. Answers of several lengths
    # share steps; on a GPU each that comes costs a capture, so there they are counted by length.
    n_lengths = len(config.lengths_tokens) if facts.device == "cpu" else 1
    n_answers = max(1, config.samples * len(tasks) * len(methods) * n_lengths)
    sizes = _Sizes(config, facts, methods, n_new_tokens=longest_answer, most_rows=n_answers, target=target)
    return tuple(sizes.cell(length_tokens) for length_tokens in config.lengths_tokens)


def batch_text(cells: Sequence[BatchCell], *, device: str) -> list[str]:
    """Return the plan's line on it; none where every sequence steps alone."""
    if all(cell.rows == 1 for cell in cells):
        return []
    said = []
    for cell in cells:
        takes = [
            f"{format_bytes(n_bytes)} of {where}"
            for n_bytes, where in ((cell.device_bytes, device), (cell.host_bytes, "the host"))
            if n_bytes
        ]
        said.append(f"{cell.rows} at {format_length(cell.length_tokens)} ({' and '.join(takes) or 'unknown bytes'})")
    return [f"batch      sequences a step, with what they take at most: {', '.join(said)}"]


def jobs_text(devices: Sequence[str]) -> list[str]:
    """Return the plan's line on processes; none where there is one."""
    if len(devices) == 1:
        return []
    places = ", ".join(f"{devices.count(device)} on {device}" for device in dict.fromkeys(devices))
    return [f"jobs       {len(devices)} processes answer prompts, {places}; memory and times are measured alone"]


def ray_text(jobs: int, *, devices: Sequence[str]) -> str:
    """Return the plan's line on a Ray cluster, whose nodes are known when it is asked."""
    place = "each node" if devices[0] == "cpu" else "each GPU" if len(devices) == 1 else f"every {len(devices)} GPUs"
    processes = "1 process" if jobs == 1 else f"{jobs} processes"
    return f"jobs       {processes} on {place} of a Ray cluster; memory and times are measured here, alone"


class _Sizes:
    """Bytes of so many sequences."""

    def __init__(
        self,
        config: RunConfig,
        facts: ModelFacts,
        methods: "Sequence[CacheMethod[Any]]",
        *,
        n_new_tokens: int,
        most_rows: int,
        target: Target | None,
    ) -> None:
        self._config, self._facts, self._n_new_tokens = config, facts, n_new_tokens
        self._most_rows = most_rows
        self._methods = [method for method in methods if not method.unsupported(facts.shape, facts.device)]
        self._is_cpu = facts.device == "cpu"
        # Each process has its part of what there is.
        totals = [] if self._is_cpu else [total_device_bytes(device) for device in facts.devices]
        known = [n_bytes for n_bytes in totals if n_bytes is not None]
        device_bytes = min(known) if known else None
        host_bytes: int | None = None
        if target is None:
            host_bytes = total_host_bytes()
        else:
            device_bytes, host_bytes = target.memory_bytes, target.host_bytes
        self._device_room = None if device_bytes is None else device_bytes // config.jobs
        self._host_room = None if host_bytes is None else host_bytes // len(worker_devices(config, facts.device))

    def cell(self, length_tokens: int) -> BatchCell:
        """Return the size of a step at one length: as asked for, or the most that fits."""
        asked = self._config.batch
        if self._facts.backend.holds_one_sequence:
            asked = 1
        rows = asked or min(self._most_rows, MOST_ROWS_CPU if self._is_cpu else MOST_ROWS_CUDA)
        while asked is None and rows > 1 and not self._fits(rows, length_tokens):
            rows -= 1
        device_bytes, host_bytes = self._bytes(rows, length_tokens)
        return BatchCell(
            length_tokens=length_tokens,
            rows=rows,
            prompts=prompts_of(rows, len(self._methods)),
            device_bytes=device_bytes,
            host_bytes=host_bytes,
        )

    def _fits(self, rows: int, length_tokens: int) -> bool:
        device_bytes, host_bytes = self._bytes(rows, length_tokens)
        return not (
            (device_bytes and self._device_room and device_bytes > DEVICE_SHARE * self._device_room)
            or (host_bytes and self._host_room and host_bytes > HOST_SHARE * self._host_room)
        )

    def _bytes(self, rows: int, length_tokens: int) -> tuple[int | None, int | None]:
        """Return the bytes of the device (None on a CPU) and of the host, None where the weights' are not known."""
        facts, config = self._facts, self._config
        if facts.weights_bytes is None:
            return None, None
        n_new = min(self._n_new_tokens, length_tokens - 1)
        n_prompt = length_tokens - n_new
        predicted = [(method, method.predict(facts.shape, n_prompt, n_new)) for method in self._methods]
        found = sorted((each for _, each in predicted), key=lambda f: -f.device_bytes)
        whole, rest = divmod(rows, max(1, len(found)))
        # Pairs enter method by method, so that each method has its turn; the largest may stay longest.
        own_bytes = whole * sum(each.device_bytes for each in found) + sum(each.device_bytes for each in found[:rest])
        prefill_bytes = facts.prefill_peak_bytes(n_prompt, chunk_tokens=accuracy_chunk_tokens(config, facts))
        metadata_bytes = max((each.metadata_bytes for each in found), default=0)
        # What is recalled packed is held beside the prompt's own pages.
        packed_bytes = sum(each.host_bytes for method, each in predicted if method.kv is not None)
        prompt_bytes = facts.shape.dense_kv_bytes(n_prompt) + metadata_bytes + packed_bytes
        pages_bytes = prompts_of(rows, len(found)) * prompt_bytes
        device_bytes = prefill_bytes + max(
            part.weights_bytes + round(part.cache_share * own_bytes) for part in facts.device_parts()
        )
        device_bytes += self._logits_bytes(rows)
        if self._is_cpu:
            return None, device_bytes + pages_bytes
        return CONTEXT_BYTES + device_bytes, pages_bytes

    def _logits_bytes(self, rows: int) -> int:
        """Return the bytes of a step's logits, and of the copy of its sequences' that the second best is sought in."""
        least_rows = step_rows(self._facts) or 1
        n_rows = -(-rows // least_rows) * least_rows
        return (n_rows + rows) * self._facts.vocab_size * self._facts.shape.element_bytes
