"""Sessions as tests want them: of one sequence; and with the step of a CUDA graph run as it is, on any device."""

from dataclasses import dataclass
from typing import Any

import torch
from recorded import Recording

from kvscope.harness.engine.decode_graph import EAGER, GRAPH, GraphStep, static_reasons
from kvscope.harness.engine.session import Session

UNCAPTURED = "uncaptured"
TOGETHER = "together"
RECORDED = "recorded"


class UncapturedStep(GraphStep):
    """The step of fixed addresses, run instead of replayed."""

    backend = EAGER

    @classmethod
    def reasons(cls, loaded, cache):
        return static_reasons(loaded, cache)

    def _capture(self):
        self._versions = self._static_versions()
        self._forward()

    def _replay(self):
        self._logits_nV = self._forward()


class Recorded:
    """A step's operations recorded at a capture and done again at each step: nothing of its Python runs."""

    def _capture(self):
        super()._capture()
        self.captures += 1
        self._recording = Recording()
        with self._recording:
            self._logits_nV = self._forward()

    def _replay(self):
        self._recording.replay()


class RecordedStep(Recorded, UncapturedStep):
    """The step of fixed addresses, recorded."""


class TogetherStep(UncapturedStep):
    """The same, its sequences attending in one launch a layer, as on a GPU; elsewhere in Triton's interpreter."""

    @classmethod
    def reasons(cls, loaded, cache):
        # Only kernels choose blocks at fixed addresses, and here they are interpreted.
        return [reason for reason in static_reasons(loaded, cache) if "which a GPU has" not in reason]

    def _capture(self):
        self._rows.make_batch()
        super()._capture()


class RecordedTogetherStep(Recorded, TogetherStep):
    """The same, recorded."""


class UncapturedSession(Session):
    """A session whose steps have fixed addresses and are no graph."""

    graph_step = UncapturedStep


class RecordedSession(Session):
    """A session whose steps are recorded and done again."""

    graph_step = RecordedStep


class TogetherSession(Session):
    """The same, in one launch a layer."""

    graph_step = TogetherStep


class RecordedTogetherSession(Session):
    """The same, recorded and done again."""

    graph_step = RecordedTogetherStep


def captured_here(monkeypatch):
    """Let steps be captured without a GPU; return those that were, one entry a capture."""
    captures = []

    class CapturedHere(UncapturedStep):
        backend = GRAPH

        def _capture(self):
            super()._capture()
            self.captures += 1
            captures.append(self)

    monkeypatch.setattr(Session, "graph_step", CapturedHere)
    return captures


def new_session(loaded, decode_graph="off"):
    """A session; ``uncaptured`` demands a graph's step and runs it as it is, ``together`` in one launch a layer,
    ``recorded`` as it was at its capture."""
    if decode_graph == RECORDED:
        return RecordedSession(loaded, decode_graph="on")
    if decode_graph == TOGETHER:
        return TogetherSession(loaded, decode_graph="on")
    if decode_graph == UNCAPTURED:
        return UncapturedSession(loaded, decode_graph="on")
    return Session(loaded, decode_graph=decode_graph)


class Single:
    """One sequence in a session of its own.

    Attributes:
        session: the session.
        member: its one sequence.
    """

    def __init__(self, loaded, method, prompt, *, reserve_tokens, decode_graph="off"):
        self.session = new_session(loaded, decode_graph)
        try:
            self.member = self.session.add(method, prompt, reserve_tokens=reserve_tokens)
        except BaseException:
            self.session.close()
            raise

    def __enter__(self):
        try:
            self.session.prepare()
        except BaseException:
            self.session.close()
            raise
        return self

    def __exit__(self, *error):
        self.session.close()

    @property
    def sequence(self):
        """What the method holds."""
        return self.member.cache

    @property
    def step_backend(self):
        return self.session.step_backend

    @property
    def captures(self):
        return self.session.captures

    def step(self, token):
        """Feed a token; return the logits [vocabulary]."""
        return self.session.step([token])[0]


@dataclass(frozen=True)
class Side:
    """What one of several sequences gave: logits of every step, the record of its residency and its last footprint."""

    logits_TV: torch.Tensor
    record: Any
    footprint: Any


def side_by_side(loaded, methods, prompt, tokens):
    """Feed the same tokens to a prompt under each method, in one session: a forward for all costs little more than one.

    They share no more than that forward: each attends by itself, to what it holds.
    """
    with new_session(loaded) as session:
        members = [session.add(method, prompt, reserve_tokens=len(tokens)) for method in methods]
        logits_TnV = torch.stack([session.step([token] * len(methods)) for token in tokens])
        assert not session.attends_together
        caches = [member.cache for member in members]
        return [
            Side(logits_TV, cache.residency(), cache.footprint())
            for logits_TV, cache in zip(logits_TnV.unbind(1), caches, strict=True)
        ]
