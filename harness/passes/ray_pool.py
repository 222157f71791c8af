"""Workers of the accuracy pass on the nodes of a Ray cluster. Ray itself is imported on use: it is an extra.

Each worker is an actor bound to a node. The sweep alone writes rows: an actor passes the lines of its worker on, and a
node that goes takes no row with it that was written. Nodes that come are given workers, too.
"""

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import kvscope
from kvscope.errors import EnvironmentProblem, UsageError, shown
from kvscope.harness.passes.config import RunConfig
from kvscope.harness.passes.pools import Ended, Said, Worker
from kvscope.harness.passes.process import SAID
from kvscope.harness.passes.ray_node import NodeWorker
from kvscope.harness.passes.shipped import modules_to_ship

TICK_S = 2.0
PATIENCE_S = 60.0
"""How long a run waits for a node, where there is none that it can use."""
REACH_S = 5.0
_OBJECT_STORE_BYTES = 96 * 2**20
"""Of a cluster that is started here: rows are small, and pass through."""


def check_installed() -> None:
    """Refuse to go on without the package.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise UsageError("executor: Ray is not installed: pip install 'kvscope[ray]', or leave --executor out.")


def import_ray() -> Any:
    """Return the package.

    Raises:
        UsageError: it is not installed.
        EnvironmentProblem: it cannot be imported.
    """
    check_installed()
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise EnvironmentProblem(f"Ray cannot be imported: {one_line(error)}.") from error


def connect(ray: Any, config: RunConfig) -> bool:
    """Connect to the cluster, or start one here; return whether it was not connected before.

    Raises:
        UsageError: a module of the run cannot be sent, or nothing answers at the address.
        EnvironmentProblem: Ray refuses, say for its version, or no cluster is there.
    """
    if ray.is_initialized():
        return False
    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    check_reachable(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody unless the user says so
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if modules := modules_to_ship(config):  # an empty list fails in Ray 2.60, on the node
        options["runtime_env"] = {"py_modules": modules}
    own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        if address is None:
            with contextlib.suppress(ConnectionError):
                ray.init(address="auto", **options)
                return True
            address = "local"
        ray.init(address=address, **options, **(own if address == "local" else {}))
    except (RuntimeError, ValueError, OSError) as error:
        token = (
            " A cluster that asks for a token needs RAY_AUTH_MODE=token." if isinstance(error, ConnectionError) else ""
        )
        raise EnvironmentProblem(f"Ray cannot be used: {one_line(error)}.{token}") from error
    return True


def check_reachable(address: str | None) -> None:
    """Refuse an address where nothing answers: Ray itself tries for minutes.

    Raises:
        UsageError: nothing does, or it is one of Ray's client, whose sweep would write rows from afar.
    """
    if "://" in (address or ""):
        raise UsageError(
            f"ray_address: {shown(address)} is an address of Ray's client: run on a machine of the cluster, and give "
            "HOST:PORT or nothing."
        )
    host, colon, port = (address or "").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"ray_address: nothing answers at {address} ({one_line(error)}): give the address of the head node "
            "(ray start --head says it), or leave --ray-address out."
        ) from error


def one_line(error: BaseException) -> str:
    """Return the first line of what an error says, without its full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


class RayWorker:
    """A worker on a node.

    Attributes:
        node: the node's id.
        where: its device and node.
    """

    def __init__(self, ray: Any, actor: Any, said: Said, *, node: str, where: str) -> None:
        self.node, self.where = node, where
        self._ray, self._actor, self._said = ray, actor, said
        self._ended: Ended | None = None
        threading.Thread(target=self._listen, name=f"shards on {where}", daemon=True).start()

    def _listen(self) -> None:
        error: BaseException | None = None
        try:
            for each in self._actor.lines.remote():
                line = self._ray.get(each)
                if line.endswith("\n"):
                    self._said.put((self, line))
                else:
                    self._ended = self._said_end(json.loads(line))
        except Exception as raised:  # noqa: BLE001 - however an actor is lost, its rows are measured again
            error = raised
        if self._ended is None:
            self._ended = self._lost(error)
        self._said.put((self, None))

    def _said_end(self, how: Mapping[str, Any]) -> Ended:
        last = str(how["last"])
        if last.startswith(SAID):
            last = f"{SAID}On {self.where}: {last.removeprefix(SAID)}"
        return Ended(int(how["code"]), last)

    def _lost(self, error: BaseException | None) -> Ended:
        kinds = self._ray.exceptions
        if isinstance(error, kinds.RayTaskError | kinds.RuntimeEnvSetupError) or (
            isinstance(error, kinds.ActorDiedError) and "creation task" in str(error)
        ):  # its code failed: kvscope is not there, or another
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return Ended(1, lines[-1] if lines else type(error).__name__)
        there = any(node["NodeID"] == self.node and node["Alive"] for node in self._ray.nodes())
        return Ended(None, "its actor died" if there else "its node is gone", with_machine=not there)

    def give(self, text: str | None) -> None:
        """Send it a line; None lets it end."""
        self._actor.give.remote(text)

    def ended(self) -> Ended:
        """Return how it ended."""
        assert self._ended is not None
        return self._ended

    def kill(self) -> None:
        """End it; its worker sees its stdin close, and ends itself."""
        with contextlib.suppress(Exception):  # the cluster may be gone
            self._ray.kill(self._actor)


class RayPool:
    """Nodes of a cluster: ``jobs`` workers on each of their GPUs, or on each node where prompts are answered by CPUs.

    A model on several GPUs has one worker on as many of a node's.

    Args:
        config, devices: of the run; a node with fewer GPUs is left alone.
        task: the first line of a worker, but for its device.
    """

    tick_s: float | None = TICK_S

    def __init__(self, config: RunConfig, devices: Sequence[str], task: Mapping[str, Any], said: Said) -> None:
        self._ray = import_ray()
        self._config, self._said = config, said
        self._on_gpu, self._n_gpus = devices[0].startswith("cuda"), len(devices)
        self._is_ours = connect(self._ray, config)
        self._alive: list[RayWorker] = []
        self._unusable: set[str] = set()
        self._since_s = time.monotonic()
        self._task = {**task, "import_folders": [], "n_jobs": self.n_workers, "version": kvscope.__version__}

    @property
    def n_workers(self) -> int:
        """How many the nodes that are there have room for."""
        return max(1, sum(room for _, room in self._rooms()))

    def _rooms(self) -> list[tuple[Mapping[str, Any], int]]:
        """Return (node, workers that belong there)."""
        found = []
        for node in self._ray.nodes():
            resources = node["Resources"]
            places = int(resources.get("GPU", 0)) // self._n_gpus if self._on_gpu else int(resources.get("CPU", 0) >= 1)
            if node["Alive"] and node["NodeID"] not in self._unusable and places:
                found.append((node, places * self._config.jobs))
        return found

    def fill(self, most: int) -> Sequence[Worker]:
        """Start workers on nodes that have fewer than belong there.

        Raises:
            EnvironmentProblem: there has been no node to use for a while.
        """
        started: list[Worker] = []
        for node, room in self._rooms():
            there = sum(worker.node == node["NodeID"] for worker in self._alive)
            for _ in range(min(room - there, most - len(started))):
                worker = self._start(node, room)
                self._alive.append(worker)
                started.append(worker)
        if self._alive:
            self._since_s = time.monotonic()
        elif most > 0 and time.monotonic() - self._since_s > PATIENCE_S:
            what = self._place()
            raise EnvironmentProblem(
                f"The Ray cluster has had no node with {what} for {PATIENCE_S:g} s: every finished row is kept, and "
                "the same command continues when there is one."
            )
        return started

    def _start(self, node: Mapping[str, Any], room: int) -> RayWorker:
        ray, resources = self._ray, node["Resources"]
        share = resources.get("CPU", 0) / room
        # Ray shows an actor the GPUs that are its own, and no others: there the same map is settled anew.
        device = "cuda:0" if self._on_gpu else "cpu"
        where = {} if self._config.device_map != "none" else {"device": device}
        actor = (
            ray.remote(NodeWorker)
            .options(
                num_cpus=min(share, 1.0) if self._on_gpu else (int(share) if share >= 1 else share),
                num_gpus=self._n_gpus / self._config.jobs if self._on_gpu else 0,
                max_concurrency=2,  # it listens to its worker, and is given lines for it
                max_restarts=0,
                scheduling_strategy=ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                    node_id=node["NodeID"], soft=False
                ),
            )
            .remote({**self._task, "config": {**self._task["config"], **where}}, str(Path.cwd()))
        )
        place = f"{self._place()} of node {node['NodeManagerAddress']}"
        return RayWorker(ray, actor, self._said, node=node["NodeID"], where=place)

    def _place(self) -> str:
        """Return what a worker has of a node."""
        if not self._on_gpu:
            return "a CPU"
        return "a GPU" if self._n_gpus == 1 else f"{self._n_gpus} GPUs"

    def left(self, worker: Worker, *, usable: bool) -> None:
        """Note that a worker is gone."""
        assert isinstance(worker, RayWorker)
        self._alive.remove(worker)
        if not usable:
            self._unusable.add(worker.node)

    def close(self) -> None:
        """Leave the cluster; one that was started for this run ends."""
        if self._is_ours:
            self._ray.shutdown()
