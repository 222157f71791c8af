"""As much of Ray as the accuracy pass calls: nodes that come and go, and actors that live in this process."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any


class ActorDiedError(Exception):
    pass


class RayTaskError(Exception):
    pass


class RuntimeEnvSetupError(Exception):
    pass


class FakeRay:
    """Stands in for the package.

    Args:
        nodes: CPUs of each node.

    Attributes:
        sent: the first line of every worker, and the node it was bound to.
        asked: what ``init`` was called with.
    """

    def __init__(self, *nodes: int) -> None:
        self._names = itertools.count(1)
        self._nodes: dict[str, dict[str, Any]] = {}
        self._actors: list[_Actor] = []
        self.sent: list[tuple[str, dict[str, Any]]] = []
        self.asked: list[dict[str, Any]] = []
        self.is_up = False
        self.breaks: Callable[[], None] = lambda: None
        for n_cpus in nodes:
            self.add(n_cpus)
        self.exceptions = SimpleNamespace(
            ActorDiedError=ActorDiedError, RayTaskError=RayTaskError, RuntimeEnvSetupError=RuntimeEnvSetupError
        )
        strategy = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node_id, soft: node_id)
        self.util = SimpleNamespace(scheduling_strategies=strategy)

    def add(self, n_cpus: int) -> str:
        name = f"node-{next(self._names)}"
        self._nodes[name] = {
            "NodeID": name, "Alive": True, "NodeManagerAddress": name, "Resources": {"CPU": float(n_cpus)},
        }  # fmt: skip
        return name

    def drop(self, name: str) -> None:
        """Take a node away, with what runs there."""
        self._nodes[name]["Alive"] = False
        for actor in self._actors:
            if actor.node == name:
                actor.die()

    def is_initialized(self) -> bool:
        return self.is_up

    def init(self, **options: Any) -> None:
        self.asked.append(options)
        self.breaks()
        self.is_up = True

    def shutdown(self) -> None:
        self.is_up = False

    def nodes(self) -> Sequence[dict[str, Any]]:
        return list(self._nodes.values())

    def get(self, reference: Any) -> Any:
        return reference

    def kill(self, actor: "_Actor") -> None:
        actor.die()

    def remote(self, kind: type) -> Any:
        def options(*, scheduling_strategy: str, **_: Any) -> Any:
            def make(task: dict[str, Any], folder: str) -> _Actor:
                self.sent.append((scheduling_strategy, task))
                self._actors.append(_Actor(kind(task, folder), scheduling_strategy))
                return self._actors[-1]

            return SimpleNamespace(remote=make)

        return SimpleNamespace(options=options)


class _Actor:
    def __init__(self, inner: Any, node: str) -> None:
        self.node, self.is_dead = node, False
        self.inner = inner
        self.lines = SimpleNamespace(remote=self._lines)
        self.give = SimpleNamespace(remote=inner.give)

    def die(self) -> None:
        self.is_dead = True
        self.inner._process.kill()

    def _lines(self) -> Iterator[str]:
        for line in self.inner.lines():
            if self.is_dead:
                break
            yield line
        if self.is_dead:
            raise ActorDiedError("The actor died unexpectedly before finishing this task.")
