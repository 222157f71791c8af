"""Sequences that decode together in two lanes: those whose step can be captured, and the others.

One sequence without fixed addresses would make the steps of all eager, which takes many times as long on a GPU. So it
steps beside them, with its like.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from kvscope.harness.engine.batch_decode import BatchDecode
from kvscope.harness.engine.decode_graph import NoStaticStepError
from kvscope.harness.engine.decoding import Decoding, Request
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.results.schema import DecodeGraph


class Lanes:
    """Two ``BatchDecode``s as one. Use as a context manager."""

    def __init__(self, loaded: LoadedModel, *, counts_spare: bool, spare_share: float, step_rows: int | None) -> None:
        """Begin with no sequence.

        Args:
            counts_spare, spare_share, step_rows: as ``BatchDecode``.
        """
        options: dict[str, Any] = {"counts_spare": counts_spare, "spare_share": spare_share, "step_rows": step_rows}
        self._first = BatchDecode(loaded, keeps_static=True, **options)
        self._eager = BatchDecode(loaded, **options)
        self._turned_away: set[tuple[str, int, int]] = set()
        """Methods without fixed addresses, with the tokens of prompt and steps: they need not be opened to know."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def set_graph(self, decode_graph: DecodeGraph) -> None:
        """Say whether steps are replays of a CUDA graph, of sessions that begin from here on."""
        self._first.decode_graph = self._eager.decode_graph = decode_graph

    @property
    def resting(self) -> list[Decoding]:
        """The sequences that ended and are still in a captured step."""
        return self._first.resting

    @property
    def n_rows(self) -> int:
        """Rows of a step of both, resting ones included."""
        return self._first.n_rows + self._eager.n_rows

    @property
    def brings_cache(self) -> bool:
        """Whether a sequence has the model's own cache, which holds one."""
        return self._first.brings_cache or self._eager.brings_cache

    def add(self, request: Request) -> Decoding:
        """Open a sequence, in the lane that it can have.

        Raises:
            UsageError: as ``BatchDecode.add``.
        """
        # Some have them at one length and not at another. Which lane a sequence has must not depend on who came before.
        key = request.method.label, request.prompt.n_tokens, request.reserve_tokens
        if self._first.decode_graph == "auto" and key in self._turned_away:
            return self._eager.add(request)
        try:
            return self._first.add(request)
        except NoStaticStepError:
            self._turned_away.add(key)
        return self._eager.add(request)

    def step(self) -> list[Decoding]:
        """Feed every sequence its next token; return those that ended with it, or failed.

        Raises:
            Exception: as ``BatchDecode.step``; then every sequence of both lanes is of no more use.
        """
        return [*self._first.step(), *self._eager.step()]

    def remove_resting(self) -> None:
        """Take the sequences that rest out of the step, which is captured anew."""
        self._first.remove_resting()

    def close(self) -> None:
        """Drop every sequence, also those under way."""
        self._first.close()
        self._eager.close()
