"""Sequences that decode together: one forward of the model a step; where steps are graphs, one attention a layer.

The weights are read once a step for all of them, as a server reads them; each sequence keeps and reads its own cache.
Prompts, methods and positions may differ. Sequences come by ``add`` and leave by ``remove``, between any two steps. A
single sequence is a session of one.

A step can be a CUDA graph: launched one by one, the kernels of many sequences take several times as long as they run.

Shapes: n sequences, M hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any, ClassVar, Self

import torch

from kvscope.errors import UsageError
from kvscope.harness.engine.backend import form_on
from kvscope.harness.engine.decode_graph import EAGER, GraphStep, NoStaticStepError, capture_failed, graph_demanded
from kvscope.harness.engine.few_rows import turned_products
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.member import Member, Rows, session_cache
from kvscope.methods.base import CacheMethod, Footprint
from kvscope.methods.step_counters import SPARE_SHARE, StepCounters
from kvscope.methods.store import PromptKV
from kvscope.results.schema import DecodeGraph


class Session:
    """Sequences that are stepped together. Use as a context manager: hooks and tensors go at the end.

    Attributes:
        members: the sequences, in the order of a step's rows.
        step_backend: how steps run: ``cuda graph``, ``eager``, or ``eager: `` and why it is no graph. Known from
            ``prepare`` or the first step on.
        graph_step: what a step of fixed addresses is.
    """

    graph_step: ClassVar[type[GraphStep]] = GraphStep

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        decode_graph: DecodeGraph = "off",
        spare_share: float = SPARE_SHARE,
        keeps_static: bool = False,
        step_rows: int | None = None,
    ) -> None:
        """Begin with no sequence.

        Args:
            decode_graph: ``auto`` captures the step in a CUDA graph where that can be done, ``on`` demands it.
            keeps_static: under ``auto``, a sequence that cannot have fixed addresses is turned away
                (``NoStaticStepError``); without, the steps of all are eager from then on.
            spare_share: as ``StepCounters``: more where many sequences share a captured step, and each would capture
                it anew for all.
            step_rows: rows of every step's forward, whoever is in it, so that a sequence's numbers do not depend on who
                shares its step; a model that brings its own cache has one. None: a row a sequence.
        """
        self._rows = Rows(step_rows=step_rows)
        self.members = self._rows.members
        self.step_backend = EAGER
        self._loaded, self._asked, self._keeps_static = loaded, decode_graph, keeps_static
        self._is_static = decode_graph != "off"
        self._cache = session_cache(loaded, self._rows)
        self._counters = StepCounters(loaded.device, spare_share=spare_share)
        self._hooks, self._hooked = ExitStack(), set[int]()
        self._in_turn = False
        self._step: GraphStep | None = None
        self._captures, self._capture_s = 0, 0.0

    @property
    def captures(self) -> int:
        """How often a step was captured: once, and again when sequences came or went, or their tensors moved."""
        return self._captures + (0 if self._step is None else self._step.captures)

    @property
    def capture_s(self) -> float:
        """Seconds of all captures, warm-up included."""
        return self._capture_s + (0.0 if self._step is None else self._step.capture_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- sequences

    def add(self, method: CacheMethod[Any], prompt: PromptKV, *, reserve_tokens: int) -> Member:
        """Open a prompt under a method, as the last row of the steps to come.

        Where that fails (memory ends, a graph is demanded and cannot be had) the session is as it was.

        Args:
            reserve_tokens: steps to preallocate for.

        Raises:
            UsageError: the method cannot run on this model and device, or not as a graph; the message gives every
                reason. Or the model brings its own cache, which holds one sequence, and there is one.
            NoStaticStepError: the session keeps to fixed addresses, and the sequence cannot have them.
        """
        started_s, loaded = time.perf_counter(), self._loaded
        method = form_on(loaded.backend, method, loaded.shape)
        reasons = method.unsupported(loaded.shape, loaded.device)
        if reasons:
            raise UsageError(f"Method '{method.label}' cannot run on model '{loaded.name}': {'; '.join(reasons)}.")
        if prompt.shape != loaded.shape:
            raise ValueError("this prompt was prefilled by a model of another shape")
        member = Member(loaded, method, prompt, reserve_tokens=reserve_tokens)
        member.open_s = time.perf_counter() - started_s
        try:
            if self.members and (self._brings_cache(member) or self._brings_cache(self.members[0])):
                raise UsageError(
                    f"Model '{loaded.name}' brings its own cache, which holds one sequence: decode one at a time."
                )
            if self._asked != "off":
                member.why_eager = "; ".join(self.graph_step.reasons(self._loaded, member.cache))
            if self._is_static:
                self._make_static(member)
            self._observe_layers(member.observed)
        except BaseException:
            member.close()
            raise
        self._drop_step()
        self.members.append(member)
        return member

    def remove(self, member: Member) -> None:
        """Close a sequence; those behind it move up a row."""
        self._drop_step()
        self.members.remove(member)
        member.close()

    def step_backend_of(self, member: Member) -> str:
        """Return how steps of a sequence run, eager ones by its own reasons where it has some."""
        own = member.why_eager if self.step_backend.startswith(f"{EAGER}:") else ""
        return f"{EAGER}: {own}" if own else self.step_backend

    @property
    def attends_together(self) -> bool:
        """Whether the sequences attend in one launch a layer."""
        return self._rows.batch is not None

    @property
    def captured(self) -> bool:
        """Whether the step is a graph now: sequences that come or go cost another capture."""
        return self._step is not None

    def rest(self, member: Member) -> None:
        """Leave a sequence as it is from here on: it keeps its row in captured steps, its token means nothing."""
        if not self.captured:
            raise ValueError("only a captured step has rows to spare: remove the sequence")
        member.rests = True

    def close(self) -> None:
        """Close every sequence and take the hooks out of the model."""
        self._drop_step()
        while self.members:
            self.members.pop().close()
        self._hooks.close()
        self._hooked.clear()

    def footprint(self) -> Footprint:
        """Return the bytes of all sequences on the device; host bytes once for each prompt that is mirrored there."""
        host_bytes: dict[int, int] = {}
        total = Footprint()
        for member in self.members:
            found = member.cache.footprint()
            total += found
            host_bytes[id(member.prompt)] = max(found.host_bytes, host_bytes.get(id(member.prompt), 0))
        return replace(total, host_bytes=sum(host_bytes.values()))

    def bytes_recalled(self) -> int:
        """Return the bytes that all sequences copied from the host."""
        for member in self.members:
            member.cache.residency()  # enters what was left to the device
        return sum(member.cache.bytes_recalled for member in self.members)

    # -- steps

    @torch.inference_mode()
    def prepare(self) -> None:
        """Capture the step if it is to be a graph, so that the first token does not wait for it; a step does it, too.

        Where ``auto`` finds that the forward cannot be captured, steps are eager, and sequences that were fed no token
        yet are opened anew, without fixed addresses.

        Raises:
            RuntimeError: ``on`` was asked for and the forward cannot be captured; or memory ended.
        """
        if not self._is_static or self._step is not None or not self.members:
            return
        step = self.graph_step(self._loaded, self._rows, self._counters, self._cache)
        try:
            with self._turn():
                step.prepare()
        except RuntimeError as error:
            step.release()
            if self._asked != "auto":
                raise
            self._go_eager(capture_failed(error))
        else:
            self._step, self.step_backend = step, step.backend

    @torch.inference_mode()
    def step(self, tokens: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Feed one token to every sequence, [n] in the order of ``members``; return the logits after it, [n, V].

        A captured step writes them where the step before did.
        """
        if len(tokens) != len(self.members):
            raise ValueError(f"{len(tokens)} tokens for {len(self.members)} sequences")
        self.prepare()
        with self._turn():
            return self._eager_step(tokens) if self._step is None else self._step(tokens)

    def _eager_step(self, tokens: Sequence[int] | torch.Tensor) -> torch.Tensor:
        device = self._loaded.device
        for member in self.members:
            member.begin_step()
        self._counters.send()
        if not isinstance(tokens, torch.Tensor):
            tokens = torch.tensor(tokens, device=device)
        positions_n1 = torch.tensor([[member.n_tokens] for member in self.members], device=device)
        with turned_products() if device.type == "cpu" and self._rows.n_rows > 1 else nullcontext():
            logits = self._rows.logits(self._loaded.model, tokens[:, None], positions_n1, self._cache)
        for member in self.members:
            member.end_step()
        return logits

    @torch.inference_mode()
    def first_not_finite(self, tokens: Sequence[int]) -> str:
        """Return which layer gave NaN or infinity, as a clause, by another step; the sequences are of no use after it.

        Empty where that step does not tell.
        """
        loaded = self._loaded
        entered: dict[int, torch.Tensor] = {}

        def note(layer: int, hidden_nM: torch.Tensor) -> None:
            entered[layer] = hidden_nM[: len(self.members)].isfinite().all()

        try:
            with self._turn(), loaded.backend.observe(loaded.model, tuple(range(loaded.shape.n_layers)), note):
                self._eager_step(tokens)
        except Exception:  # noqa: BLE001 - the error that led here is the one to tell
            return ""
        first = next((layer for layer in sorted(entered) if not bool(entered[layer])), None)
        if first is None:
            return f", behind layer {loaded.shape.n_layers - 1}"
        return ", from the embedding on" if first == 0 else f", from layer {first - 1} on"

    # -- graphs

    def _make_static(self, member: Member) -> None:
        """Fix a new sequence's addresses, here so that what it takes counts in how many fit; or note why not."""
        if not member.why_eager:
            member.make_static(self._loaded.dtype, self._counters)
        elif self._asked == "on":
            raise graph_demanded(member.why_eager, member.method.label)
        elif self._keeps_static:
            raise NoStaticStepError(member.why_eager)
        else:
            self._go_eager(member.why_eager)

    def _go_eager(self, why: str) -> None:
        """Step eagerly from here on. A sequence in the midst of its tokens goes on at its fixed addresses."""
        self._is_static, self.step_backend = False, f"{EAGER}: {why}"
        self._drop_step()
        for member in self.members:
            if not member.is_fed:
                member.reopen()

    def _drop_step(self) -> None:
        if self._step is not None:
            self._captures, self._capture_s = self.captures, self.capture_s
            self._step.release()
            self._step = None
        self._rows.batch = None

    # -- hidden states

    @staticmethod
    def _brings_cache(member: Member) -> bool:
        return member.cache.model_cache is not None

    def _observe_layers(self, observed: frozenset[int]) -> None:
        """Hook the layers a sequence observes and none before it did."""
        layers = tuple(sorted(observed - self._hooked))
        if layers:
            loaded = self._loaded
            self._hooks.enter_context(loaded.backend.observe(loaded.model, layers, self._observe))
            self._hooked.update(layers)

    def _observe(self, layer: int, hidden_nM: torch.Tensor) -> None:
        if not self._in_turn:
            return
        for b, member in enumerate(self.members):
            if layer in member.observed:
                member.cache.observe(layer, hidden_nM if len(hidden_nM) == 1 else hidden_nM[b : b + 1])

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Mark the model's forwards as one's own: hooks of other open sessions on the same model fire, too."""
        self._in_turn = True
        try:
            yield
        finally:
            self._in_turn = False
