"""Prompts answered on the nodes of a Ray cluster, with stand-ins for Ray and for the workers.

``test_ray_cluster`` does the same with Ray itself, where that is installed.
"""

import json
import queue
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import stub_shard_worker
from fake_ray import FakeRay
from tiny import SMALL, MakeConfig

import kvscope
from kvscope import cli
from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.harness.passes import ray_node, ray_pool, shard_worker
from kvscope.harness.passes.accuracy import AccuracyPass
from kvscope.harness.passes.batch_plan import ray_text
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.deadline import Deadline
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.pools import Said
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.ray_pool import RayPool, check_reachable, connect
from kvscope.harness.passes.recording import identity, run_info
from kvscope.harness.passes.shard_list import worker_task
from kvscope.harness.passes.shards import ShardedAccuracy
from kvscope.harness.passes.shipped import modules_to_ship
from kvscope.results.schema import SampleRow
from kvscope.results.store import RunStore

WIDE = {"tasks": ["niah_single_1", "vt"], "samples": 6, "batch": 1, "self_check": False, "executor": "ray"}


@pytest.fixture(scope="module")
def one_folder(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of one process: read it, do not change it."""
    folder = tmp_path_factory.mktemp("one") / "run"
    values = {**SMALL, **WIDE, "executor": "processes", "model": tiny_model, "out": str(folder)}
    kvscope.run(make_config(values), progress=False)
    return folder


class Cluster:
    """Runs a plan on a stand-in for a cluster, with stubs for workers."""

    def __init__(self, config: Any, rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ray_pool, "check_installed", lambda: None)
        monkeypatch.setattr("kvscope.harness.passes.plan.check_installed", lambda: None)
        monkeypatch.setattr(ray_pool, "import_ray", lambda: self.ray)
        monkeypatch.setattr(ray_pool, "TICK_S", 0.01)
        monkeypatch.setattr(RayPool, "tick_s", 0.01)
        monkeypatch.setattr(ray_node, "WORKER_COMMAND", (sys.executable, str(stub_shard_worker.__file__), str(folder)))
        folder.mkdir()
        (folder / "rows.jsonl").write_text((rows / "samples.jsonl").read_text())
        self.ray, self.plan, self.folder = FakeRay(1, 1), make_plan(config), folder
        self.rows = read_rows(rows)
        self.notes: list[str] = []
        self.on_row: Callable[[int], None] = lambda n_rows: None

    def run(self, *deaths: int | str | None) -> dict[Any, SampleRow]:
        """Run, and return the rows."""
        (self.folder / "deaths.json").write_text(json.dumps(deaths))
        cluster = self

        class Listening(Progress):
            def note(self, text: str) -> None:
                cluster.notes.append(text)

        class Heard(RunStore):
            def append_samples(self, rows: Sequence[SampleRow]) -> None:
                super().append_samples(rows)
                cluster.on_row(len(self.samples()))

        with Heard.create(self.plan.config.out or "", run_info(self.plan)) as store:
            said: Said = queue.Queue()
            pool = RayPool(self.plan.config, ["cpu"], worker_task(self.plan, store), said)
            cells = AccuracyPass().cells(self.plan)
            ShardedAccuracy(self.plan, store, Listening(), cells, pool, said).run(Deadline())
        return read_rows(Path(self.plan.config.out or ""))


def read_rows(folder: Path) -> dict[Any, SampleRow]:
    rows = [SampleRow.model_validate_json(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    found = {row.key: row.model_copy(update={"jobs": None}) for row in rows}
    assert len(found) == len(rows), "a row was written twice"
    return found


@pytest.fixture
def cluster(small: MakeConfig, one_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr(ray_pool, "check_installed", lambda: None)
    monkeypatch.setattr("kvscope.harness.passes.plan.check_installed", lambda: None)
    return Cluster(small(**WIDE), one_folder, tmp_path / "stub", monkeypatch)


def test_every_node_has_a_worker_and_rows_are_those_of_one_process(cluster: Cluster) -> None:
    assert cluster.run() == cluster.rows
    assert sorted(node for node, _ in cluster.ray.sent) == ["node-1", "node-2"]
    task = cluster.ray.sent[0][1]
    assert (task["config"]["device"], task["n_jobs"], task["version"]) == ("cpu", 2, kvscope.__version__)
    assert not {"out", "executor", "ray_address"} & set(task["config"])
    assert task["import_folders"] == []  # what a node needs is sent: its folders are its own
    assert not cluster.ray.is_up


@pytest.mark.parametrize("deaths", [(0,), (3, 1), (1, None, 5)])
def test_no_row_is_lost_nor_doubled_where_workers_die(cluster: Cluster, deaths: tuple[int | None, ...]) -> None:
    assert cluster.run(*deaths) == cluster.rows
    assert any("ended with code -9" in note for note in cluster.notes)


def test_a_node_that_goes_takes_no_row_along_and_is_no_fault_of_its_prompts(cluster: Cluster) -> None:
    """Two nodes go, one after the other; a shard that two workers die with would have been given up."""
    gone: list[str] = []

    def on_row(n_rows: int) -> None:
        if n_rows >= (2, 9, 1000)[len(gone)]:
            gone.append(str(n_rows))
            cluster.ray.drop(f"node-{len(gone)}")
            cluster.ray.add(1)

    cluster.on_row = on_row
    assert cluster.run() == cluster.rows
    assert len(gone) == 2
    assert sum("its node is gone" in note for note in cluster.notes) >= 1
    assert len({node for node, _ in cluster.ray.sent}) > 2  # those that came were used


def test_a_node_without_the_model_says_which_and_what(cluster: Cluster) -> None:
    with pytest.raises(UsageError, match=r"^On a CPU of node node-[12]: The model's weights are cut off\.$"):
        cluster.run("begins not", "begins not")
    assert not Path(cluster.plan.config.out or "", "run.json").exists()


def test_a_node_without_the_model_that_comes_later_is_left_out(cluster: Cluster) -> None:
    cluster.ray.drop("node-2")
    came: list[int] = []

    def on_row(n_rows: int) -> None:
        if not came:
            came.append(n_rows)
            cluster.ray.add(1)
            (cluster.folder / "deaths.json").write_text(json.dumps([None, "begins not"]))

    cluster.on_row = on_row
    assert cluster.run(None) == cluster.rows


def test_a_cluster_without_nodes_ends_the_run_in_a_while(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_pool, "PATIENCE_S", 0.0)
    for name in ("node-1", "node-2"):
        cluster.ray.drop(name)
    with pytest.raises(EnvironmentProblem, match="has had no node with a CPU for 0 s"):
        cluster.run()


def test_a_worker_refuses_another_kvscope_and_another_model(small: MakeConfig) -> None:
    plan = make_plan(small())
    asked = {"config": plan.config.model_dump(mode="json", exclude={"out"})}
    with pytest.raises(EnvironmentProblem, match=r"the run's is 0\.0\.1: install the same"):
        shard_worker.answer({**asked, "version": "0.0.1"}, lambda message: None)
    expected = json.loads(json.dumps(identity(plan)))
    shard_worker.check_identity(expected, identity(plan))
    expected["model"]["weights"] = "sha256:other"
    with pytest.raises(UsageError, match=r"The model here is another than the run's \(weights\)"):
        shard_worker.answer({**asked, "identity": expected}, lambda message: None)


def test_without_ray_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.run_cli(["plan", "--model", "reference", "--executor", "ray"]) == 2
    assert "pip install 'kvscope[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--executor", "slurm"], "executor"),
        (["--ray-address", "local"], "give --executor ray"),
        (["--executor", "ray", "--ray-address", "http://x"], "is no cluster"),
        (["--executor", "ray", "--gpus", "all"], "leave it out"),
        (["--executor", "ray", "--device", "cuda:1"], "write cuda without a number"),
        (["--executor", "ray", "--find-max"], "this run asks none"),
        (["--executor", "ray", "--model", "http://127.0.0.1:1/v1", "--tokenizer", "reference"], "with the URL"),
    ],
)
def test_bad_options_are_one_sentence(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_cli(["plan", "--model", "reference", *options]) == 2
    assert said in capsys.readouterr().err


def test_an_address_where_nothing_answers_is_one_sentence() -> None:
    check_reachable(None)
    check_reachable("local")
    with pytest.raises(UsageError, match="run on a machine of the cluster"):
        check_reachable("ray://head:10001")
    with pytest.raises(UsageError, match=r"nothing answers at 127\.0\.0\.1:1 "):
        check_reachable("127.0.0.1:1")


def test_a_cluster_is_looked_for_before_one_is_started(monkeypatch: pytest.MonkeyPatch, small: MakeConfig) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    ray = FakeRay()
    none_runs = iter([ConnectionError("Could not find any running Ray instance.")])

    def breaks() -> None:
        for error in none_runs:
            raise error

    ray.breaks = breaks
    assert connect(ray, small(executor="ray"))
    assert [each["address"] for each in ray.asked] == ["auto", "local"]
    assert "runtime_env" not in ray.asked[0]
    assert not connect(ray, small(executor="ray"))  # the caller's own connection stays
    ray.is_up, none_runs = False, iter([ConnectionError("Failed to connect to it.")])
    with pytest.raises(
        EnvironmentProblem, match=r"^Ray cannot be used: Failed to connect to it\. A cluster that asks for"
    ):
        connect(ray, small(executor="ray", ray_address="local"))


def test_modules_of_methods_and_tasks_by_path_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: MakeConfig
) -> None:
    (tmp_path / "far_file.py").write_text("")
    (tmp_path / "far_package").mkdir()
    (tmp_path / "far_package" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = small(
        methods=["dense", "far_file:Method", "far_package.deep.inside:Method", "numpy.of:Method"],
        tasks=["niah_single_1", "far_file:Task"],
    )
    assert modules_to_ship(config) == [str(tmp_path / "far_file.py"), str(tmp_path / "far_package")]
    with pytest.raises(UsageError, match="Module 'sys' cannot be sent"):
        modules_to_ship(small(methods=["sys:Method"]))


def test_a_model_on_several_gpus_has_one_worker_on_as_many(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    ray, asked = FakeRay(), []

    def remote(kind: type) -> Any:
        def options(**given: Any) -> Any:
            asked.append(given)
            return SimpleNamespace(remote=lambda task, folder: asked.append(task))

        return SimpleNamespace(options=options)

    monkeypatch.setattr(ray, "remote", remote)
    monkeypatch.setattr(ray_pool, "import_ray", lambda: ray)
    monkeypatch.setattr(ray_pool, "RayWorker", lambda *given, node, where: SimpleNamespace(node=node, where=where))
    for n_gpus in (5, 1):
        ray._nodes[ray.add(8)]["Resources"]["GPU"] = float(n_gpus)
    config = small(executor="ray", device="auto", device_map="balanced")
    task = {"config": {"device_map": "balanced"}}
    pool = RayPool(config, ["cuda:0", "cuda:1"], task, queue.Queue())
    started = pool.fill(9)
    assert [worker.where for worker in started] == ["2 GPUs of node node-1"] * 2
    assert [given["num_gpus"] for given in asked[::2]] == [2, 2]
    assert [given["config"] for given in asked[1::2]] == [{"device_map": "balanced"}] * 2
    assert pool.n_workers == 2
    assert "1 process on every 2 GPUs of a Ray cluster" in ray_text(1, devices=["cuda:0", "cuda:1"])


def test_the_plan_says_where_prompts_are_answered(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvscope.harness.passes.plan.check_installed", lambda: None)
    text = make_plan(small(executor="ray", jobs=2)).text()
    assert "2 processes on each node of a Ray cluster; memory and times are measured here, alone" in text
