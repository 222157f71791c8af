"""The accuracy pass on a real Ray cluster, two nodes of one machine: rows are those of one process, whatever is lost.

Ray is not among the development tools (260 MiB): where it is missing these are skipped. ``pip install ray`` runs them.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import SMALL

import kvscope
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.process import worker_environment
from kvscope.results.columns import SURROUNDINGS_COLUMNS, TIME_COLUMNS

pytest.importorskip("ray", reason="Ray is not installed (pip install 'kvscope[ray]')")

pytestmark = pytest.mark.slow
WIDE = {
    "tasks": ["niah_single_1", "vt"], "lengths_tokens": [512, 640], "samples": 20, "batch": 1, "self_check": False,
}  # fmt: skip
N_ROWS = 2 * 2 * 20 * 2
PLUGIN = """
import sys
from kvscope.methods.recency.method import Recency

# A worker on a node has it from Ray, and from nowhere else.
assert "shard_worker" not in sys.argv[0] or "py_modules_files" in __file__, __file__


class Travelled(Recency):
    name = "travelled"
"""


def rows_of(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    found = {}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        key = (row["task"], row["length_tokens"], row["sample"], row["method_label"])
        assert key not in found, "a row was written twice"
        found[key] = {name: value for name, value in row.items() if name not in TIME_COLUMNS | SURROUNDINGS_COLUMNS}
    return found


@pytest.fixture(scope="module")
def one(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Return the rows of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    kvscope.run(make_config({**SMALL, **WIDE, "model": tiny_model, "out": str(folder)}), progress=False)
    found = rows_of(folder)
    assert len(found) == N_ROWS
    return found


class Cluster:
    """Two nodes with a CPU each, and drivers that use them."""

    def __init__(self, model: str, folder: Path) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
        node = {"num_cpus": 1, "object_store_memory": 96 * 2**20, "include_dashboard": False}
        self.ray = RayCluster(initialize_head=True, head_node_args=node)
        self.node = {"num_cpus": 1, "object_store_memory": 96 * 2**20}
        self.second = self.ray.add_node(**self.node)
        self.model, self.folder = model, folder / "run"

    def start(self, *, path: str = "", **values: Any) -> "subprocess.Popen[str]":
        """Start a driver."""
        config = {
            **SMALL, **WIDE, "model": self.model, "out": str(self.folder), "executor": "ray",
            "ray_address": self.ray.address, **values,
        }  # fmt: skip
        code = "import json, sys, kvscope; kvscope.run(json.loads(sys.argv[1]))"
        environment = worker_environment()
        return subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(config)],
            env={**environment, "PYTHONPATH": os.pathsep.join([environment["PYTHONPATH"], path])},
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_rows(self, driver: "subprocess.Popen[str]", least: int) -> None:
        """Wait until so many rows are there."""
        file = self.folder / "samples.jsonl"
        while not file.exists() or file.read_bytes().count(b"\n") < least:
            assert driver.poll() is None, driver.communicate()[1]
            time.sleep(0.005)

    def n_rows(self) -> int:
        return (self.folder / "samples.jsonl").read_bytes().count(b"\n")

    def processes(self, word: str) -> list[psutil.Process]:
        """Return the nodes' processes of one kind; all of them descend from this one."""
        return [each for each in psutil.Process().children(recursive=True) if word in " ".join(each.cmdline())]


@pytest.fixture
def cluster(tiny_model: str, tmp_path: Path, one_thread: None) -> Iterator[Cluster]:
    found = Cluster(tiny_model, tmp_path)
    yield found
    found.ray.shutdown()


def ended(driver: "subprocess.Popen[str]") -> str:
    said = driver.communicate()[1]
    assert driver.returncode == 0, said
    return said


@pytest.mark.parametrize("what", ["shard_worker", "NodeWorker"])
def test_a_worker_that_is_killed_loses_nothing(cluster: Cluster, one: dict[Any, Any], what: str) -> None:
    driver = cluster.start()
    cluster.wait_for_rows(driver, 20)
    (victim, *_) = cluster.processes(what)
    victim.kill()
    assert cluster.n_rows() < N_ROWS, "it was killed too late to test anything"
    assert ("its actor died" if what == "NodeWorker" else "ended with code -9") in ended(driver)
    assert rows_of(cluster.folder) == one


def test_a_node_that_is_removed_and_one_that_comes(cluster: Cluster, one: dict[Any, Any]) -> None:
    driver = cluster.start(samples=20)
    cluster.wait_for_rows(driver, 20)
    cluster.ray.remove_node(cluster.second, allow_graceful=False)
    assert cluster.n_rows() < N_ROWS, "it was removed too late to test anything"
    cluster.ray.add_node(**cluster.node)
    ended(driver)
    assert rows_of(cluster.folder) == one


def test_the_same_command_again_after_a_driver_was_killed(cluster: Cluster, one: dict[Any, Any]) -> None:
    for least in (15, 60):
        driver = cluster.start()
        cluster.wait_for_rows(driver, least)
        driver.send_signal(signal.SIGKILL)
        driver.communicate()
        assert cluster.n_rows() < N_ROWS, "it was killed too late to test anything"
    ended(cluster.start())
    assert rows_of(cluster.folder) == one


def test_methods_from_outside_the_tree_travel(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "far_away.py").write_text(PLUGIN)
    methods = ["far_away:Travelled:recency_tokens=128"]
    ended(cluster.start(path=str(tmp_path / "plugins"), methods=methods, samples=2))
    rows = rows_of(cluster.folder)
    assert len(rows) == 8
    assert {row["status"] for row in rows.values()} == {"ok"}
