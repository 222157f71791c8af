"""Greedy decoding of one sequence under one method, and teacher-forced likelihood.

Step 0 is the first forced token, fed under the method: no scored token comes from dense logits. Batch 1, no padding,
positions from the logical length.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from kvscope.errors import UsageError
from kvscope.harness.engine.decode_graph import EAGER
from kvscope.harness.engine.finite import finite_tokens
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.session import Session
from kvscope.methods.base import CacheMethod, Footprint, Residency
from kvscope.methods.store import PromptKV
from kvscope.results.schema import DecodeGraph, StopReason
from kvscope.tasks.answers import stop_index


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """What one decode gave.

    Attributes:
        ids: generated tokens, the one that ended the answer included.
        text: their text up to the first stop string (``tasks.answers.stop_index``), special tokens left out; empty
            without a tokenizer.
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
        decode_graph: whether steps are replays of a CUDA graph; as ``Session``.

    Raises:
        UsageError: no forced token, no new token, stop strings without a tokenizer, an unsupported method, or a graph
            demanded where there can be none.
        NotFinite: logits, or scores that the method chose by, are NaN or infinite.
    """
    _check(loaded, prompt_kv, forced_ids, max_new_tokens)
    if stop_strings and loaded.tokenizer is None:
        raise UsageError(f"Model '{loaded.name}' has no tokenizer, so stop strings cannot be looked for.")
    footprints = peak = Footprint()
    step_s: list[float] = []
    ids: list[int] = []
    stop_reason: StopReason = "length"
    # The last generated token is never fed.
    reserve_tokens = len(forced_ids) + max_new_tokens - 1
    with Session(loaded, decode_graph=decode_graph) as session:
        member = session.add(method, prompt_kv, reserve_tokens=reserve_tokens)
        session.prepare()
        capture_s = session.capture_s
        pending = list(forced_ids)
        while True:
            token = pending.pop(0)
            started_s = time.perf_counter()
            _, [chosen] = finite_tokens(session, session.step([token]), step=len(step_s))
            step_s.append(time.perf_counter() - started_s)
            last = member.cache.footprint()
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
        residency = member.cache.residency()  # first: it enters what the device has counted
        return DecodeResult(
            ids=ids,
            text=text[: stop_index(text, stop_strings)],
            open_s=member.open_s,
            decode_s=sum(step_s),
            step_s=step_s,
            footprint_mean=footprints.divided_by(len(step_s)),
            footprint_last=last,
            footprint_peak=peak,
            bytes_by_kind=member.cache.bytes_by_kind(),
            bytes_recalled=member.cache.bytes_recalled,
            residency=residency,
            stop_reason=stop_reason,
            step_backend=session.step_backend,
            captures=session.captures,
            capture_s=capture_s,
            backends=member.cache.backends(),
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
    if stop_strings and (
        stop_index(_text(loaded, ids), stop_strings) is not None or _special_text(loaded, ids[-1]) in stop_strings
    ):
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
    decode_graph: DecodeGraph = "off",
) -> float:
    """Return the mean negative log-likelihood of ``answer_ids`` under the method, in nats a token, teacher forced.

    Opens the prompt anew; arguments as ``decode``.

    Raises:
        UsageError: no forced token, no answer token, or an unsupported method.
        NotFinite: as ``decode``.
    """
    _check(loaded, prompt_kv, forced_ids, len(answer_ids))
    fed = [*forced_ids, *answer_ids[:-1]]
    total = 0.0
    with Session(loaded, decode_graph=decode_graph) as session:
        session.add(method, prompt_kv, reserve_tokens=len(fed))
        for index, token in enumerate(fed):
            logits_1V = session.step([token])
            finite_tokens(session, logits_1V, step=index)
            logits = logits_1V[0]
            answered = index - (len(forced_ids) - 1)
            if answered >= 0:
                target = torch.tensor(answer_ids[answered], device=logits.device)
                total += float(F.cross_entropy(logits.float(), target))
    return total / len(answer_ids)


def _check(loaded: LoadedModel, prompt_kv: PromptKV, forced_ids: Sequence[int], n_answer_tokens: int) -> None:
    if not forced_ids:
        raise UsageError("At least one token (the last of the prompt) has to be fed under the method.")
    if n_answer_tokens < 1:
        raise UsageError(f"The answer needs at least one token, got {n_answer_tokens}.")
    n_total = prompt_kv.n_tokens + len(forced_ids) + n_answer_tokens
    if n_total > loaded.max_length_tokens:
        raise UsageError(
            f"Prompt and answer are {n_total} tokens; model '{loaded.name}' takes {loaded.max_length_tokens}."
        )


def _text(loaded: LoadedModel, ids: list[int]) -> str:
    if loaded.tokenizer is None:
        return ""
    text: str = loaded.tokenizer.decode(ids, skip_special_tokens=True)
    return text


def _special_text(loaded: LoadedModel, token: int) -> str | None:
    """Return how a token that texts leave out is written; None for any other."""
    if loaded.tokenizer.decode([token], skip_special_tokens=True):
        return None
    text: str = loaded.tokenizer.decode([token])
    return text
