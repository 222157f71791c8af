"""Many prompts under one method: answered, or scored against continuations, several sequences a step.

Sequences enter as others end. Where memory ends, those under way begin again, half as many at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvscope.harness.engine.batch_decode import BatchDecode
from kvscope.harness.engine.decoding import DecodeResult, Decoding, Request, check_lengths
from kvscope.harness.engine.finite import finite_tokens
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.oom import is_oom
from kvscope.harness.engine.prefill import DEFAULT_CHUNK_TOKENS, prefill
from kvscope.harness.engine.rehearsal import rehearsed
from kvscope.harness.engine.session import Session
from kvscope.harness.lm_harness.usage import Usage
from kvscope.harness.passes.answering import release_memory
from kvscope.harness.passes.batch_plan import STEP_ROWS_CUDA
from kvscope.methods.base import CacheMethod, union_collectors
from kvscope.methods.store import PromptKV
from kvscope.results.schema import DecodeGraph

Ids = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One prompt to answer greedily.

    Attributes:
        ids: its tokens; the last is fed under the method.
        max_new_tokens: longest answer.
        stop_strings: end the answer where one of them begins, before its first word, too.
    """

    ids: Ids
    max_new_tokens: int
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """One continuation to score.

    Attributes:
        context_ids: tokens before it; the last is fed under the method.
        ids: its own tokens, at least one.
    """

    context_ids: Ids
    ids: Ids


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a continuation is worth.

    Attributes:
        log_likelihood: sum over its tokens, in nats.
        is_greedy: whether each of its tokens is the likeliest.
    """

    log_likelihood: float
    is_greedy: bool


def step_rows(loaded: LoadedModel) -> int | None:
    """Return the rows of every step's forward: those of an accuracy pass, so that no batch changes a score."""
    return STEP_ROWS_CUDA if loaded.device.type == "cuda" else None


class Answering:
    """Answers and scores under one method.

    Args:
        loaded: the model.
        method: in the form the model's backend has of it.
        rows: most sequences of a step.
        chunk_tokens: tokens of a prefill's forward.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        method: CacheMethod[Any],
        *,
        rows: int,
        chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    ) -> None:
        self._loaded, self._method, self._chunk_tokens = loaded, method, chunk_tokens
        self.rows = 1 if loaded.backend.holds_one_sequence else rows
        self.usage = Usage()

    def answer(self, asks: Sequence[Ask], done: Callable[[int, DecodeResult], None]) -> None:
        """Answer every prompt, and hand over (its place, its result) as each ends.

        Raises:
            UsageError: a prompt that is too long.
            NotFinite: logits or scores are NaN or infinite.
        """
        self._all(deque(enumerate(asks)), lambda waiting: self._answer(waiting, done))

    def score(self, asked: Sequence[Continuation], done: Callable[[int, Score], None]) -> None:
        """Score every continuation, teacher forced; arguments and errors as ``answer``.

        Continuations that differ in their last token alone share their steps, and those of one context its prefill.
        """
        alike: dict[tuple[Ids, Ids], list[int]] = {}
        for place, each in enumerate(asked):
            alike.setdefault((each.context_ids, each.ids[:-1]), []).append(place)
        groups = sorted(alike.values(), key=lambda places: (asked[places[0]].context_ids, places))
        waiting = deque([_Scoring([(place, asked[place]) for place in places]) for places in groups])
        self._all(waiting, lambda left: self._score(left, done))

    def _all(self, waiting: deque[Any], some: Callable[[deque[Any]], None]) -> None:
        while waiting:
            try:
                some(waiting)
            except Exception as error:
                if not is_oom(error) or self.rows == 1:
                    raise
                self.rows //= 2
            release_memory()

    @torch.inference_mode()
    def _prefill(self, ids: Ids) -> PromptKV:
        collectors = union_collectors([self._method], self._loaded.shape.layers)
        return prefill(self._loaded, ids, collectors=collectors, chunk_tokens=self._chunk_tokens)

    # -- answers

    def _answer(self, waiting: deque[tuple[int, Ask]], done: Callable[[int, DecodeResult], None]) -> None:
        loaded = self._loaded
        under_way: dict[Decoding, tuple[int, Ask]] = {}
        graph: DecodeGraph = "auto" if loaded.device.type == "cuda" else "off"
        with BatchDecode(loaded, decode_graph=graph, step_rows=step_rows(loaded)) as batch:
            try:
                while waiting or under_way:
                    self._fill(batch, waiting, under_way)
                    for row in batch.step():
                        place, ask = under_way[row]
                        if row.error is not None:
                            raise row.error
                        assert row.result is not None
                        self._note(row.result, ask)
                        done(place, row.result)
                        del under_way[row]
            except Exception:
                waiting.extendleft(sorted(under_way.values(), key=lambda pair: -pair[0]))
                raise

    def _fill(
        self, batch: BatchDecode, waiting: deque[tuple[int, Ask]], under_way: dict[Decoding, tuple[int, Ask]]
    ) -> None:
        if batch.resting:
            # The step stays as it was captured until a new capture is worth it.
            if not waiting or 2 * len(batch.resting) < batch.n_rows:
                return
            batch.remove_resting()
        while waiting and batch.n_rows < self.rows:
            place, ask = waiting[0]
            request = Request(
                method=self._method,
                prompt=self._prefill(ask.ids[:-1]),
                forced_ids=ask.ids[-1:],
                max_new_tokens=ask.max_new_tokens,
                stop_strings=ask.stop_strings,
                stops_before_text=True,
            )
            row = batch.add(rehearsed(self._loaded, request))
            waiting.popleft()
            under_way[row] = place, ask

    def _note(self, result: DecodeResult, ask: Ask) -> None:
        usage = self.usage
        # Room for every step is reserved at opening, whether or not the answer ends early.
        dense_kv_bytes = self._loaded.shape.dense_kv_bytes(len(ask.ids) - 1, ask.max_new_tokens)
        usage.add(result.footprint_mean, dense_kv_bytes=dense_kv_bytes)
        usage.step_s += result.step_s
        usage.batch = max(usage.batch, result.batch)

    # -- scores

    @torch.inference_mode()
    def _score(self, waiting: deque[_Scoring], done: Callable[[int, Score], None]) -> None:
        under_way: list[_Scoring] = []
        context_ids, prompt = None, None
        with Session(self._loaded, step_rows=step_rows(self._loaded)) as session:
            try:
                while waiting or under_way:
                    while waiting and len(under_way) < self.rows:
                        entering = waiting[0]
                        if prompt is None or entering.context_ids != context_ids:
                            context_ids, prompt = entering.context_ids, self._prefill(entering.context_ids[:-1])
                        check_lengths(self._loaded, prompt, entering.fed_ids[:1], len(entering.fed_ids))
                        request = Request(
                            method=self._method, prompt=prompt, forced_ids=entering.fed_ids, max_new_tokens=1
                        )
                        method = rehearsed(self._loaded, request).method
                        entering.begin(session.add(method, prompt, reserve_tokens=len(entering.fed_ids)))
                        under_way.append(waiting.popleft())
                    self._score_step(session, under_way)
                    for each in [each for each in under_way if each.has_ended]:
                        held = each.member.cache.footprint()
                        dense_kv_bytes = self._loaded.shape.dense_kv_bytes(len(each.context_ids) - 1, len(each.fed_ids))
                        self.usage.add(held, dense_kv_bytes=dense_kv_bytes)
                        session.remove(each.member)
                        under_way.remove(each)
                        for place, score in each.scores():
                            done(place, score)
            except Exception:
                for each in reversed(under_way):
                    each.begin_again()
                waiting.extendleft(reversed(under_way))
                raise

    def _score_step(self, session: Session, under_way: list[_Scoring]) -> None:
        started_s = time.perf_counter()
        logits_nV = session.step([each.next_token for each in under_way])
        finite_tokens(session, logits_nV, step=max(each.steps for each in under_way))
        log_probs_nV = torch.log_softmax(logits_nV.float(), dim=-1)
        best_n = log_probs_nV.argmax(dim=-1)
        for each, log_probs_V, best in zip(under_way, log_probs_nV, best_n.tolist(), strict=True):
            each.took(log_probs_V, best)
        self.usage.step_s.append(time.perf_counter() - started_s)
        self.usage.batch = max(self.usage.batch, len(under_way))


class _Scoring:
    """Continuations of one context that differ in their last token alone: one sequence."""

    def __init__(self, asked: Sequence[tuple[int, Continuation]]) -> None:
        first = asked[0][1]
        self.context_ids = first.context_ids
        self.fed_ids = (first.context_ids[-1], *first.ids[:-1])
        self.member: Any = None
        self._asked = asked
        self.begin_again()

    def begin_again(self) -> None:
        self.steps = 0
        self._sums = [0.0] * len(self._asked)
        self._greedy = [True] * len(self._asked)

    def begin(self, member: Any) -> None:
        self.member = member

    @property
    def next_token(self) -> int:
        return self.fed_ids[self.steps]

    @property
    def has_ended(self) -> bool:
        return self.steps == len(self.fed_ids)

    def took(self, log_probs_V: torch.Tensor, best: int) -> None:
        for at, (_, each) in enumerate(self._asked):
            token = each.ids[self.steps]
            self._sums[at] += float(log_probs_V[token])
            self._greedy[at] &= token == best
        self.steps += 1

    def scores(self) -> Iterable[tuple[int, Score]]:
        for (place, _), total, greedy in zip(self._asked, self._sums, self._greedy, strict=True):
            yield place, Score(log_likelihood=total, is_greedy=greedy)
