"""Greedy decoding of sequences that step together, each with its own prompt, method, question and end.

Sequences enter by ``add`` and leave when their answers end; the others go on. What a sequence gives is what it gives
alone, but for rounding: a product of several rows is added up in another order than that of one. With ``step_rows``
all steps have as many rows, so that all products are added up alike, but for those of experts.

Where the step was captured (a CUDA graph), a sequence that ended rests in it: taking it out would capture anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from kvscope.errors import UsageError
from kvscope.harness.engine.answer_end import AnswerEnd, text_of
from kvscope.harness.engine.decode_graph import EAGER
from kvscope.harness.engine.finite import Best, best_tokens
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.member import Member
from kvscope.harness.engine.session import Session
from kvscope.methods.base import CacheMethod, Footprint, Residency
from kvscope.methods.step_counters import SPARE_SHARE
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
        step_s: seconds of each step, forced ones first. A step of several sequences counts whole for each.
        footprint_mean: mean over the steps of the exact bytes of live cache tensors.
        footprint_last: the same after the last step.
        footprint_peak: the same at the step that held most on the device.
        bytes_by_kind: KV bytes of the last step by kind of entry; None where K and V of tokens are all there is.
        bytes_recalled: bytes copied from the host while decoding.
        residency: how the resident set changed; None where it is fixed at opening.
        stop_reason: ``eos``, ``stop`` (a stop string) or ``length``.
        step_backend: how a step ran: ``cuda graph``, ``eager``, or ``eager: `` and why it was no graph.
        captures: how often the step was captured: once, and again each time the resident set outgrew its slots, or
            sequences came or went.
        capture_s: seconds of the first capture, in none of the times above.
        backends: what computed the rest of the method beside attention.
        batch: most sequences that were in a step with this one, itself included.
        least_logit_gap: least distance of the best logit to the second best over the generated tokens.
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
    batch: int = 1
    least_logit_gap: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to decode.

    Attributes:
        method: from ``create_method``.
        prompt: from ``prefill``; not changed.
        forced_ids: what follows the prefilled tokens and is fed under the method, one step a token. At least one.
        max_new_tokens: longest answer.
        stop_strings: end the answer where one of them begins.
        stop_at_eos: end the answer at the model's end-of-sequence tokens.
        stops_before_text: whether a stop string of white space counts before the answer's first word.
    """

    method: CacheMethod[Any]
    prompt: PromptKV
    forced_ids: Sequence[int]
    max_new_tokens: int
    stop_strings: tuple[str, ...] = ()
    stop_at_eos: bool = True
    stops_before_text: bool = False

    @property
    def reserve_tokens(self) -> int:
        """Most steps there can be: the last generated token is never fed."""
        return len(self.forced_ids) + self.max_new_tokens - 1

    def check(self, loaded: LoadedModel) -> None:
        """Refuse what cannot be decoded.

        Raises:
            UsageError: no forced token, no new token, too long, or stop strings without a tokenizer.
        """
        check_lengths(loaded, self.prompt, self.forced_ids, self.max_new_tokens)
        if self.stop_strings and loaded.tokenizer is None:
            raise UsageError(f"Model '{loaded.name}' has no tokenizer, so stop strings cannot be looked for.")


class Decoding:
    """A sequence under way: its forced tokens are fed first, then those it chooses.

    Attributes:
        request: what was asked for.
        member: its place in the session.
        result: what it gave; None until it ended, and where it failed.
        error: why it failed; None otherwise.
        batch: most sequences in its steps so far.
    """

    def __init__(
        self, request: Request, member: Member, *, end: AnswerEnd, session: Session, counts_spare: bool
    ) -> None:
        self.request, self.member = request, member
        self.result: DecodeResult | None = None
        self.error: Exception | None = None
        self.batch = 0
        self._end, self._counts_spare = end, counts_spare
        self._ids: list[int] = []
        self._step_s: list[float] = []
        self._sum = self._last = self._peak = Footprint()
        self._least_gap = math.inf
        self._captures, self._capture_s = session.captures, session.capture_s
        self._first_capture_s: float | None = None

    @property
    def has_ended(self) -> bool:
        """Whether no step of it is left."""
        return self.result is not None or self.error is not None

    @property
    def steps(self) -> int:
        """Steps made."""
        return len(self._step_s)

    @property
    def next_token(self) -> int:
        """The token to feed."""
        forced = self.request.forced_ids
        return forced[self.steps] if self.steps < len(forced) else self._ids[-1]

    def captured(self, session: Session) -> None:
        """Note what the first capture took; called before each step."""
        if self._first_capture_s is None:
            self._first_capture_s = session.capture_s - self._capture_s

    def took(self, best: Best, *, step_s: float, batch: int) -> StopReason | None:
        """Enter a step; return why the answer ends with it, None when it goes on."""
        self._step_s.append(step_s)
        self.batch = max(self.batch, batch)
        held = self.member.cache.footprint()
        self._last = held if self._counts_spare else held.without_spare()
        self._sum += self._last
        if self._last.device_bytes > self._peak.device_bytes or self.steps == 1:
            self._peak = self._last
        if self.steps < len(self.request.forced_ids):
            return None
        self._least_gap = min(self._least_gap, best.gap)
        self._ids.append(best.token)
        return self._end.reason(self._ids, max_new_tokens=self.request.max_new_tokens)

    def finish(self, reason: StopReason, *, session: Session, tokenizer: Any) -> None:
        """Make the result, while the cache is still there."""
        cache, request = self.member.cache, self.request
        text = text_of(tokenizer, self._ids)
        residency = cache.residency()  # first: it enters what the device has counted
        self.result = DecodeResult(
            ids=self._ids,
            text=text[: stop_index(text, request.stop_strings, before_text=request.stops_before_text)],
            open_s=self.member.open_s,
            decode_s=sum(self._step_s),
            step_s=self._step_s,
            footprint_mean=self._sum.divided_by(self.steps),
            footprint_last=self._last,
            footprint_peak=self._peak,
            bytes_by_kind=cache.bytes_by_kind(),
            bytes_recalled=cache.bytes_recalled,
            residency=residency,
            stop_reason=reason,
            step_backend=session.step_backend_of(self.member),
            captures=session.captures - self._captures,
            capture_s=self._first_capture_s or 0.0,
            backends=cache.backends(),
            batch=self.batch,
            least_logit_gap=self._least_gap,
        )


class BatchDecode:
    """Sequences that decode together. Use as a context manager: tensors and hooks go at the end.

    A session lasts from the first sequence that enters to the last that leaves.

    Attributes:
        decode_graph: whether steps are replays of a CUDA graph, as ``Session``; of the next session.
        counts_spare: whether footprints hold the room that only steps at fixed addresses keep; without, they are those
            of steps that run as they come.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        decode_graph: DecodeGraph = "off",
        counts_spare: bool = True,
        spare_share: float = SPARE_SHARE,
        keeps_static: bool = False,
        step_rows: int | None = None,
    ) -> None:
        """Begin with no sequence.

        Args:
            spare_share, keeps_static, step_rows: as ``Session``.
        """
        self.decode_graph, self.counts_spare = decode_graph, counts_spare
        self._options: dict[str, Any] = {
            "spare_share": spare_share,
            "keeps_static": keeps_static,
            "step_rows": step_rows,
        }
        self._loaded = loaded
        self._session: Session | None = None
        self._rows: list[Decoding] = []
        self._ends: dict[tuple[tuple[str, ...], bool, bool], AnswerEnd] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def under_way(self) -> list[Decoding]:
        """The sequences that have steps left, in the order of their rows."""
        return [row for row in self._rows if not row.has_ended]

    @property
    def resting(self) -> list[Decoding]:
        """The sequences that ended and are still in the captured step."""
        return [row for row in self._rows if row.has_ended]

    @property
    def n_rows(self) -> int:
        """Rows of a step, resting ones included."""
        return len(self._rows)

    @property
    def brings_cache(self) -> bool:
        """Whether a sequence has the model's own cache, which holds one."""
        return any(row.member.cache.model_cache is not None for row in self._rows)

    @torch.inference_mode()
    def add(self, request: Request) -> Decoding:
        """Open a sequence, as the last row of the steps to come.

        Where that fails, the others are as they were.

        Raises:
            UsageError: as ``Request.check`` and ``Session.add``.
        """
        request.check(self._loaded)
        session = self._session or Session(self._loaded, decode_graph=self.decode_graph, **self._options)
        try:
            member = session.add(request.method, request.prompt, reserve_tokens=request.reserve_tokens)
        except BaseException:
            if self._session is None:
                session.close()
            raise
        self._session = session
        key = (request.stop_strings, request.stop_at_eos, request.stops_before_text)
        if key not in self._ends:
            self._ends[key] = AnswerEnd(
                self._loaded,
                stop_strings=request.stop_strings,
                stop_at_eos=request.stop_at_eos,
                stops_before_text=request.stops_before_text,
            )
        row = Decoding(request, member, end=self._ends[key], session=session, counts_spare=self.counts_spare)
        self._rows.append(row)
        return row

    @torch.inference_mode()
    def step(self) -> list[Decoding]:
        """Feed every sequence its next token; return those that ended with it, or failed (``error``).

        A sequence fails alone where its own logits or scores are not finite. Which layer that came from is found, and
        said, only of a sequence that is alone in its step.

        Raises:
            Exception: as a method, the model or the end of memory raises it; then every sequence is of no more use.
        """
        session = self._session
        if session is None:
            return []
        session.prepare()
        for row in self._rows:
            row.captured(session)
        started_s = time.perf_counter()
        logits_nV = session.step([0 if row.has_ended else row.next_token for row in self._rows])
        bests = best_tokens(session, logits_nV)  # waits for the device
        step_s = time.perf_counter() - started_s
        stepped = [(row, best) for row, best in zip(self._rows, bests, strict=True) if not row.has_ended]
        for row, best in stepped:
            if best.is_finite:
                reason = row.took(best, step_s=step_s, batch=len(self._rows))
                if reason is not None:
                    row.finish(reason, session=session, tokenizer=self._loaded.tokenizer)
                continue
            alone = len(self._rows) == 1 and not best.logits_are_finite
            where = session.first_not_finite([best.token]) if alone else ""
            row.batch = max(row.batch, len(self._rows))
            row.error = best.not_finite(step=row.steps, where=where, dtype=logits_nV.dtype)
        ended = [row for row, _ in stepped if row.has_ended]
        self._let_go(ended, session)
        return ended

    def remove_resting(self) -> None:
        """Take the sequences that rest out of the step, which is captured anew."""
        assert self._session is not None
        for row in self.resting:
            self._session.remove(row.member)
            self._rows.remove(row)

    def close(self) -> None:
        """Drop every sequence, also those under way."""
        self._rows.clear()
        if self._session is not None:
            session, self._session = self._session, None
            session.close()

    def _let_go(self, ended: Sequence[Decoding], session: Session) -> None:
        if not self.under_way:
            self.close()
            return
        for row in ended:
            if session.captured:
                session.rest(row.member)
            else:
                session.remove(row.member)
                self._rows.remove(row)


def check_lengths(loaded: LoadedModel, prompt: PromptKV, forced_ids: Sequence[int], n_answer_tokens: int) -> None:
    """Refuse a sequence without a token to feed or to answer, and one that is too long.

    Raises:
        UsageError: saying which.
    """
    if not forced_ids:
        raise UsageError("At least one token (the last of the prompt) has to be fed under the method.")
    if n_answer_tokens < 1:
        raise UsageError(f"The answer needs at least one token, got {n_answer_tokens}.")
    n_total = prompt.n_tokens + len(forced_ids) + n_answer_tokens
    if n_total > loaded.max_length_tokens:
        raise UsageError(
            f"Prompt and answer are {n_total} tokens; model '{loaded.name}' takes {loaded.max_length_tokens}."
        )
