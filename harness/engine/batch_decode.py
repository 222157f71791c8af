"""Greedy decoding of sequences that step together, each with its own prompt, method, question and end.

Sequences enter by ``add`` and leave when their answers end; the others go on. What a sequence gives is what it gives
alone, but for rounding: a product of several rows is added up in another order than that of one. With ``step_rows``
all steps have as many rows, so that all products are added up alike, but for those of experts.

Where the step was captured (a CUDA graph), a sequence that ended rests in it: taking it out would capture anew.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch

from kvscope.harness.engine.answer_end import AnswerEnd
from kvscope.harness.engine.decoding import Decoding, Request
from kvscope.harness.engine.finite import best_tokens
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.session import Session
from kvscope.methods.step_counters import SPARE_SHARE
from kvscope.results.schema import DecodeGraph


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
