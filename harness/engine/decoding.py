"""One sequence's greedy decoding: what is asked, where it stands between steps, and what it gave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvscope.errors import UsageError
from kvscope.harness.engine.answer_end import AnswerEnd, text_of
from kvscope.harness.engine.decode_graph import EAGER
from kvscope.harness.engine.finite import Best
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.member import Member
from kvscope.harness.engine.session import Session
from kvscope.methods.base import CacheMethod, Footprint, Residency
from kvscope.methods.store import PromptKV
from kvscope.results.schema import StopReason
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
