"""One decode step as a CUDA graph: captured once for the sequences of a session, replayed for every token.

Fixed are addresses, shapes and grids; what changes (token, position, counts, page tables) is written into small tensors
between replays. The model's own forward is captured as it is, with kvscope's attention inside. Where a sequence moves
its tensors (a pool that grows) the step is captured again, and counted.

Memory of captured steps comes from one pool a model. The first capture is kept for the model's life, so that pool is
part of what a process holds before any prompt is opened, not of what a method adds.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from kvscope.errors import UsageError
from kvscope.harness.engine.configs import text_config
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.member import Rows
from kvscope.harness.engine.oom import is_oom
from kvscope.harness.engine.static_stock import unsupported_stock
from kvscope.methods.base import SequenceCache
from kvscope.methods.step_counters import StepCounters

#: How a step ran, as rows say it; an eager one may give its reasons behind a colon.
GRAPH, EAGER = "cuda graph", "eager"
#: Steps from which a capture pays. What it takes, over what a replay saves, is 2.9 to 5.2 steps at 8K to 128K tokens on
#: an H100 (Llama-3.1-8B's shape, captures that compile aside: benchmarks/results/decode_step.json). Steps of
#: smaller models are launches alone: a replay saves more of them.
PAYS_FROM_STEPS = 5
#: Position tables that are made anew from the largest position the host reads back.
_HOST_ROPES = {"dynamic", "longrope"}
_EXPERTS: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


class NoStaticStepError(Exception):
    """A sequence whose steps cannot run at fixed addresses came to a session that keeps to them."""


def static_reasons(loaded: LoadedModel, cache: SequenceCache) -> list[str]:
    """Return every reason why a step of this sequence cannot run at fixed addresses."""
    reasons = list(cache.static_reasons())
    if loaded.shape.devices:
        n_devices = len({*loaded.shape.devices, str(loaded.device)})
        reasons.append(f"the model is on {n_devices} devices, and a graph is of one")
    config = text_config(loaded.model.config)
    ropes = getattr(config, "rope_parameters", None) or {}
    nested = [ropes, *(value for value in ropes.values() if isinstance(value, dict))]
    types = {str(rope.get("rope_type")) for rope in nested} & _HOST_ROPES
    if types:
        reasons.append(f"rotary positions of type {', '.join(sorted(types))} are computed from the host")
    # What brings its own cache calls the model itself, and knows what its experts do.
    if cache.model_cache is None and has_experts(loaded.model):
        reasons.append("which experts a token goes to is known to the device alone")
    if cache.stock:
        reasons += unsupported_stock(loaded.shape, loaded.device, loaded.dtype)
    return reasons


def has_experts(model: Any) -> bool:
    """Whether tokens go to experts: which weights a step reads, the device alone knows. Looked for once a model."""
    if model not in _EXPERTS:
        _EXPERTS[model] = any(type(module).__name__.endswith("Experts") for module in model.modules())
    return _EXPERTS[model]


class GraphStep:
    """The model's forward of one token a sequence at fixed addresses, captured and replayed.

    Shapes: n sequences, V vocabulary.

    Attributes:
        backend: how such a step ran, as rows say it.
        captures: how often the step was captured.
        capture_s: seconds of all captures, warm-up included.
    """

    backend: ClassVar[str] = GRAPH

    @classmethod
    def reasons(cls, loaded: LoadedModel, cache: SequenceCache) -> list[str]:
        """Return every reason why a step of this sequence cannot be captured; empty when it can be tried."""
        reasons = []
        if loaded.device.type != "cuda":
            reasons.append(f"the device is {loaded.device.type}")
        return reasons + static_reasons(loaded, cache)

    def __init__(self, loaded: LoadedModel, rows: Rows, counters: StepCounters, cache: Any) -> None:
        """Prepare; nothing runs yet.

        Args:
            rows: static already.
            counters: of their steps.
            cache: what the model is called with.
        """
        self.captures, self.capture_s = 0, 0.0
        self._rows, self._counters = rows, counters
        self._model, self._members, self._cache = loaded.model, tuple(rows.members), cache
        size = (rows.n_rows, 1)
        self._tokens_n1 = torch.zeros(size, dtype=torch.long, device=loaded.device)
        self._positions_n1 = torch.zeros(size, dtype=torch.long, device=loaded.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits_nV: torch.Tensor | None = None
        self._versions: list[int] | None = None

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture the step, so that the first token does not wait for it. The sequences are as before afterwards."""
        self._begin()
        self._write_positions()
        self._capture()

    @torch.inference_mode()
    def __call__(self, tokens: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Feed a token to every sequence, [n]; return the logits [n, V], which the next step overwrites."""
        self._begin()
        self._write_positions()
        self._write(self._tokens_n1, tokens)
        if self._versions != self._static_versions():
            self._capture()
        self._replay()
        for member in self._members:
            if not member.rests:
                member.end_step()
        assert self._logits_nV is not None
        return self._logits_nV

    def _begin(self) -> None:
        for member in self._members:
            if not member.rests:
                member.begin_step()
        self._counters.send()

    def _static_versions(self) -> list[int]:
        return [member.cache.static_version for member in self._members]

    def _write_positions(self) -> None:
        self._write(self._positions_n1, [member.n_tokens for member in self._members])

    @staticmethod
    def _write(held_n1: torch.Tensor, values: Sequence[int] | torch.Tensor) -> None:
        held_n1 = held_n1[: len(values)]
        if isinstance(values, torch.Tensor):
            held_n1.copy_(values[:, None])
        elif len(set(values)) == 1:
            # A scalar travels as an argument of the kernel: no transfer, and nothing waits.
            held_n1.fill_(values[0])
        else:
            held_n1.copy_(torch.tensor(values)[:, None])

    def _forward(self) -> torch.Tensor:
        if self._rows.batch is not None:
            self._rows.batch.begin()
        return self._rows.logits(self._model, self._tokens_n1, self._positions_n1, self._cache)

    def _capture(self) -> None:
        """Run the step once as it is (kernels compile, libraries make their workspaces), then capture it.

        What the trial writes, the step itself writes again: it has the same token, place and position.
        """
        started_s = time.perf_counter()
        device = self._tokens_n1.device
        self.release()
        self._rows.make_batch()
        memory = _memory_of(self._model)
        side = memory.stream
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self._forward()
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(device)
        try:
            # Other threads (the memory sampler) may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=memory.pool, stream=side, capture_error_mode="thread_local"):
                self._logits_nV = self._forward()
        except Exception:
            _free_generator(device)
            raise
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own stream behind
        memory.keep(graph)
        self._graph, self._versions = graph, self._static_versions()
        torch.cuda.synchronize(device)
        self.captures += 1
        self.capture_s += time.perf_counter() - started_s

    def _replay(self) -> None:
        assert self._graph is not None
        self._graph.replay()

    def release(self) -> None:
        """Let go of the captured step."""
        self._graph = self._logits_nV = None


def _free_generator(device: torch.device) -> None:
    """Give the device's default generator a state that no capture holds, with the same seed and offset.

    A capture takes the generator's state; one that fails never gives it back, and every later random number of the
    process then raises "Offset increment outside graph capture" (torch 2.11).
    """
    generator = torch.cuda.default_generators[device.index or 0]
    generator.graphsafe_set_state(generator.clone_state())


class _GraphMemory:
    """The memory pool of a model's captured steps, kept by its first graph; and the stream they are captured on: cuBLAS
    keeps a workspace for every stream it ever saw."""

    def __init__(self, device: torch.device) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._first: torch.cuda.CUDAGraph | None = None

    def keep(self, graph: torch.cuda.CUDAGraph) -> None:
        if self._first is None:
            self._first = graph


#: A graph's memory goes with its model.
_memory: weakref.WeakKeyDictionary[Any, _GraphMemory] = weakref.WeakKeyDictionary()


def _memory_of(model: Any) -> _GraphMemory:
    if model not in _memory:
        _memory[model] = _GraphMemory(next(model.parameters()).device)
    return _memory[model]


def capture_failed(error: Exception) -> str:
    """Return, in one line, why a step could not be captured.

    Raises:
        Exception: the error that says memory ran out, where one does: that is no property of the model. Ending a
            capture in which memory ran out raises an error of its own, which has that one as its context.
    """
    found: BaseException | None = error
    while found is not None:
        if is_oom(found):
            raise found
        found = found.__context__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"the model's step cannot be captured ({lines[0][:200]})"


def graph_demanded(why_eager: str, label: str) -> UsageError:
    """Return the error of a graph that was asked for by ``on`` and cannot be had."""
    return UsageError(f"Decode steps of '{label}' cannot be a CUDA graph here: {why_eager}. Use decode_graph=auto.")
