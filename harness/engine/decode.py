"""Greedy decoding of one sequence under one method, and teacher-forced likelihood.

Step 0 is the first forced token, fed under the method: no scored token comes from dense logits. Batch 1, no padding,
positions from the logical length.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F

from kvscope.errors import UsageError
from kvscope.harness.engine.decode_graph import (
    EAGER,
    GRAPH,
    DecodeGraph,
    StaticStep,
    capture_failed,
    graph_demanded,
    graph_reasons,
    static_reasons,
)
from kvscope.harness.engine.glue import DecodeLayer, EngineCache
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.static_stock import Rings
from kvscope.methods.base import CacheMethod, Footprint, Residency, SequenceCache
from kvscope.methods.store import PromptKV

StopReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """What one decode gave.

    Attributes:
        ids: generated tokens, the one that ended the answer included.
        text: their text up to the first stop string, special tokens left out; empty without a tokenizer.
        open_s: seconds to open the method on the prompt.
        decode_s: seconds of all steps together, forced ones included.
        step_s: seconds of each step, forced ones first.
        footprint_mean: mean over the steps of the exact bytes of live cache tensors.
        footprint_last: the same after the last step.
        footprint_peak: the same at the step that held most on the device.
        bytes_by_kind: KV bytes of the last step by kind of entry; None where K and V of tokens are all there is.
        bytes_recalled: bytes copied from the host while decoding.
        residency: how the resident set changed; None where it is fixed at opening.
        stop_reason: ``eos``, ``stop`` (a stop string) or ``length``.
        step_backend: how a step ran: ``cuda graph``, ``eager``, or ``eager: `` and why it was no graph.
        captures: how often the step was captured: once, and again each time the resident set outgrew its slots.
        capture_s: seconds of the first capture, in none of the times above.
        backends: what computed the rest of the method beside attention.
    """

    ids: list[int]
    text: str
    open_s: float
    decode_s: float
    step_s: list[float]
    footprint_mean: Footprint
    footprint_last: Footprint
    footprint_peak: Footprint
    bytes_by_kind: dict[str, int] | None
    bytes_recalled: int
    residency: Residency | None
    stop_reason: StopReason
    step_backend: str = EAGER
    captures: int = 0
    capture_s: float = 0.0
    backends: tuple[str, ...] = ()


class DecodeSession:
    """A prompt opened under a method, fed token by token. Use as a context manager: hooks and tensors go at the end."""

    def __init__(
        self,
        loaded: LoadedModel,
        method: CacheMethod[Any],
        prompt: PromptKV,
        *,
        reserve_tokens: int,
        physical: bool = True,
        decode_graph: DecodeGraph | Literal["uncaptured"] = "off",
    ) -> None:
        """Open the method.

        Args:
            reserve_tokens: steps to preallocate for.
            physical: False masks instead of evicting (tests).
            decode_graph: ``auto`` captures the step in a CUDA graph where that can be done, ``on`` demands it. The
                capture is made on entering. ``uncaptured`` runs the step of the graph as it is (tests).

        Raises:
            UsageError: the method cannot run on this model and device, or not as a graph; the message gives every
                reason.
        """
        method = loaded.backend.form_of(method, loaded.shape)
        reasons = method.unsupported(loaded.shape, loaded.device)
        if reasons:
            raise UsageError(f"Method '{method.label}' cannot run on model '{loaded.name}': {'; '.join(reasons)}.")
        if prompt.shape != loaded.shape:
            raise ValueError("this prompt was prefilled by a model of another shape")
        started_s = time.perf_counter()
        self._loaded = loaded
        self._method, self._decode_graph = method, decode_graph
        self._open: Callable[[], SequenceCache] = partial(
            method.open, prompt, loaded.device, physical=physical, reserve_tokens=reserve_tokens
        )
        self.sequence = self._open()
        own = self.sequence.model_cache  # an empty transformers cache counts as false
        self._cache = self._engine_cache() if own is None else own
        self._observed = method.observed_layers(loaded.shape)
        self._stack = ExitStack()
        self._in_turn = False
        self._static: StaticStep | None = None
        self.step_backend = EAGER
        self.open_s = time.perf_counter() - started_s
        self.capture_s = 0.0

    @property
    def captures(self) -> int:
        """How often the step was captured."""
        return 0 if self._static is None else self._static.captures

    def _engine_cache(self, rings: Rings | None = None) -> EngineCache:
        loaded = self._loaded
        states: dict[int, Any] = dict(self.sequence.stock)
        if rings is not None:
            states.update(rings.layers)
        for layer in loaded.shape.layers:
            states[layer] = DecodeLayer(layer, self.sequence, loaded.rotations[layer])
        return EngineCache([states[layer] for layer in range(loaded.shape.n_layers)])

    def __enter__(self) -> Self:
        self._stack.callback(lambda: self.sequence.close())
        try:
            if self._observed:
                loaded = self._loaded
                self._stack.enter_context(loaded.backend.observe(loaded.model, self._observed, self._observe))
            if self._decode_graph != "off":
                with self._turn():
                    self._make_static()
        except BaseException:
            self._stack.close()
            raise
        return self

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Mark the model's forwards as one's own: hooks of other open sequences on the same model fire, too."""
        self._in_turn = True
        try:
            yield
        finally:
            self._in_turn = False

    def _observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        if self._in_turn:
            self.sequence.observe(layer, hidden_BM)

    def _make_static(self) -> None:
        """Fix the step's addresses and capture it, or note why not."""
        loaded, asked = self._loaded, self._decode_graph
        captured = asked != "uncaptured"
        reasons = (graph_reasons if captured else static_reasons)(loaded, self.sequence)
        if not reasons:
            self.sequence.make_static()
            rings = Rings(self.sequence, loaded.dtype)
            self._stack.callback(rings.clear)
            cache = self._engine_cache(rings)
            step = StaticStep(loaded, [self.sequence], cache, before=rings.place, captured=captured)
            try:
                step.prepare()
            except RuntimeError as error:
                if asked != "auto":
                    raise
                step.release()
                reasons = [capture_failed(error)]
                self.sequence.close()
                self.sequence = self._open()
                self._cache = self._engine_cache()
            else:
                self._static, self._cache = step, cache
                self._stack.callback(step.release)
                self.capture_s = step.capture_s
                self.step_backend = GRAPH if captured else EAGER
                return
        if asked != "auto":
            raise graph_demanded(reasons, self._method.label)
        self.step_backend = f"{EAGER}: {'; '.join(reasons)}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @torch.inference_mode()
    def step(self, token: int) -> torch.Tensor:
        """Feed one token under the method and return the logits after it, [vocabulary].

        A captured step writes them where the step before did.
        """
        with self._turn():
            return self._static(token)[0] if self._static is not None else self._eager_step(token)

    def _eager_step(self, token: int) -> torch.Tensor:
        device = self._loaded.device
        self.sequence.begin_step()
        out = self._loaded.model(
            input_ids=torch.tensor([[token]], device=device),
            position_ids=torch.tensor([[self.sequence.n_tokens]], device=device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.sequence.end_step()
        logits: torch.Tensor = out.logits[0, -1]
        return logits


@torch.inference_mode()
def decode(
    loaded: LoadedModel,
    method: CacheMethod[Any],
    prompt_kv: PromptKV,
    forced_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
    stop_at_eos: bool = True,
    device: str | torch.device | None = None,
    decode_graph: DecodeGraph = "off",
) -> DecodeResult:
    """Feed ``forced_ids`` under the method, then decode greedily.

    Args:
        loaded: the model.
        method: from ``create_method``.
        prompt_kv: from ``prefill``; not changed, so the next method opens the same one.
        forced_ids: what follows the prefilled tokens and is fed under the method, one step a token: the last prompt
            token, or the whole question. At least one.
        max_new_tokens: longest answer.
        stop_strings: end the answer where one of them begins.
        stop_at_eos: end the answer at the model's end-of-sequence tokens.
        device: must be the model's; None means it.
        decode_graph: whether steps are replays of a CUDA graph; as ``DecodeSession``.

    Raises:
        UsageError: no forced token, no new token, stop strings without a tokenizer, an unsupported method, or a graph
            demanded where there can be none.
    """
    _check(loaded, prompt_kv, forced_ids, max_new_tokens, device)
    if stop_strings and loaded.tokenizer is None:
        raise UsageError(f"Model '{loaded.name}' has no tokenizer, so stop strings cannot be looked for.")
    footprints = peak = Footprint()
    step_s: list[float] = []
    ids: list[int] = []
    stop_reason: StopReason = "length"
    # The last generated token is never fed.
    reserve_tokens = len(forced_ids) + max_new_tokens - 1
    with DecodeSession(loaded, method, prompt_kv, reserve_tokens=reserve_tokens, decode_graph=decode_graph) as session:
        pending = list(forced_ids)
        while True:
            token = pending.pop(0)
            started_s = time.perf_counter()
            chosen = int(session.step(token).argmax())  # reading the number waits for the device
            step_s.append(time.perf_counter() - started_s)
            last = session.sequence.footprint()
            footprints += last
            peak = max(peak, last, key=lambda footprint: footprint.device_bytes)
            if pending:
                continue
            ids.append(chosen)
            ended = answer_end(
                loaded, ids, max_new_tokens=max_new_tokens, stop_strings=stop_strings, stop_at_eos=stop_at_eos
            )
            if ended is not None:
                stop_reason = ended
                break
            pending.append(chosen)
        text = _text(loaded, ids)
        residency = session.sequence.residency()  # first: it enters what the device has counted
        return DecodeResult(
            ids=ids,
            text=text[: _stop_index(text, stop_strings)],
            open_s=session.open_s,
            decode_s=sum(step_s),
            step_s=step_s,
            footprint_mean=footprints.divided_by(len(step_s)),
            footprint_last=last,
            footprint_peak=peak,
            bytes_by_kind=session.sequence.bytes_by_kind(),
            bytes_recalled=session.sequence.bytes_recalled,
            residency=residency,
            stop_reason=stop_reason,
            step_backend=session.step_backend,
            captures=session.captures,
            capture_s=session.capture_s,
            backends=session.sequence.backends(),
        )


def answer_end(
    loaded: LoadedModel,
    ids: list[int],
    *,
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
    stop_at_eos: bool = True,
) -> StopReason | None:
    """Return why an answer ends with the last of these tokens; None when it goes on. Arguments as ``decode``."""
    if stop_at_eos and ids[-1] in loaded.eos_ids:
        return "eos"
    if stop_strings and _stop_index(_text(loaded, ids), stop_strings) is not None:
        return "stop"
    return "length" if len(ids) == max_new_tokens else None


@torch.inference_mode()
def answer_nll(
    loaded: LoadedModel,
    method: CacheMethod[Any],
    prompt_kv: PromptKV,
    forced_ids: Sequence[int],
    answer_ids: Sequence[int],
    *,
    device: str | torch.device | None = None,
    decode_graph: DecodeGraph = "off",
) -> float:
    """Return the mean negative log-likelihood of ``answer_ids`` under the method, in nats a token, teacher forced.

    Opens the prompt anew; arguments as ``decode``.

    Raises:
        UsageError: no forced token, no answer token, or an unsupported method.
    """
    _check(loaded, prompt_kv, forced_ids, len(answer_ids), device)
    fed = [*forced_ids, *answer_ids[:-1]]
    total = 0.0
    with DecodeSession(loaded, method, prompt_kv, reserve_tokens=len(fed), decode_graph=decode_graph) as session:
        for index, token in enumerate(fed):
            logits = session.step(token)
            answered = index - (len(forced_ids) - 1)
            if answered >= 0:
                target = torch.tensor(answer_ids[answered], device=logits.device)
                total += float(F.cross_entropy(logits.float(), target))
    return total / len(answer_ids)


def _check(
    loaded: LoadedModel,
    prompt_kv: PromptKV,
    forced_ids: Sequence[int],
    n_answer_tokens: int,
    device: str | torch.device | None,
) -> None:
    if not forced_ids:
        raise UsageError("At least one token (the last of the prompt) has to be fed under the method.")
    if n_answer_tokens < 1:
        raise UsageError(f"The answer needs at least one token, got {n_answer_tokens}.")
    n_total = prompt_kv.n_tokens + len(forced_ids) + n_answer_tokens
    if n_total > loaded.max_length_tokens:
        raise UsageError(
            f"Prompt and answer are {n_total} tokens; model '{loaded.name}' takes {loaded.max_length_tokens}."
        )
    if device is not None and torch.device(device).type != loaded.device.type:
        raise UsageError(f"Model '{loaded.name}' is on {loaded.device}, so it cannot decode on {device}.")


def _text(loaded: LoadedModel, ids: list[int]) -> str:
    if loaded.tokenizer is None:
        return ""
    text: str = loaded.tokenizer.decode(ids, skip_special_tokens=True)
    return text


def _stop_index(text: str, stop_strings: Sequence[str]) -> int | None:
    found = [text.index(stop) for stop in stop_strings if stop in text]
    return min(found) if found else None
