"""The accuracy pass in several processes: the rows of one process, whatever dies on the way."""

import json
import queue
import sys
from pathlib import Path
from typing import Any

import pytest
import stub_shard_worker
from tiny import SMALL, MakeConfig

import kvscope
from kvscope import cli
from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.harness.passes import pools, shard_list, shard_worker, shards
from kvscope.harness.passes.accuracy import AccuracyPass
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.deadline import Deadline, TimeLimitReached
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.pools import ProcessPool
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.recording import run_info
from kvscope.harness.passes.shard_list import shards_of, worker_task
from kvscope.harness.passes.shards import ShardedAccuracy
from kvscope.results.columns import SURROUNDINGS_COLUMNS, TIME_COLUMNS
from kvscope.results.store import RunStore

Key = tuple[str, int, int, str]
WIDE = {
    "tasks": ["niah_single_1", "vt"], "lengths_tokens": [512, 640], "samples": 5, "batch": 1, "self_check": False,
}  # fmt: skip


def rows_of(folder: Path) -> dict[Key, dict[str, Any]]:
    found = {}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        key = (row["task"], row["length_tokens"], row["sample"], row["method_label"])
        assert key not in found, "a row was written twice"
        found[key] = {name: value for name, value in row.items() if name not in TIME_COLUMNS | SURROUNDINGS_COLUMNS}
    return found


@pytest.fixture
def wide(small: MakeConfig) -> MakeConfig:
    """Return a maker of configurations with two tasks, two lengths and five prompts of each, each answered alone."""

    def make(**values: Any) -> Any:
        return small(**{**WIDE, **values})

    return make


@pytest.fixture(scope="module")
def one_folder(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of one process: read it, do not change it."""
    folder = tmp_path_factory.mktemp("one")
    kvscope.run(make_config({**SMALL, **WIDE, "model": tiny_model, "out": str(folder / "run")}), progress=False)
    return folder / "run"


@pytest.fixture
def one(one_folder: Path) -> dict[Key, dict[str, Any]]:
    """Return the rows of one process."""
    return rows_of(one_folder)


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one(
    wide: MakeConfig, one: dict[Key, Any], tmp_path: Path, one_thread: None
) -> None:
    run = kvscope.run(wide(jobs=2), progress=False)
    assert rows_of(tmp_path / "run") == one
    assert set(run.samples["jobs"]) == {2}
    assert kvscope.run(wide(jobs=1), progress=False).samples.equals(run.samples)  # nothing was left


class Stubs:
    """Runs a plan with stubs for workers."""

    def __init__(self, config: Any, rows: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.plan, self.folder = make_plan(config), folder
        folder.mkdir()
        (folder / "rows.jsonl").write_text((rows / "samples.jsonl").read_text())
        command = (sys.executable, str(stub_shard_worker.__file__), str(folder))
        monkeypatch.setattr(pools, "WORKER_COMMAND", command)
        self.notes: list[str] = []

    def run(self, *deaths: int | str | None, deadline: Deadline | None = None) -> None:
        for claim in self.folder.glob("death-*"):
            claim.rmdir()
        (self.folder / "deaths.json").write_text(json.dumps(deaths))
        notes = self.notes

        class Listening(Progress):
            def note(self, text: str) -> None:
                notes.append(text)

        with RunStore.create(self.plan.config.out or "", run_info(self.plan)) as store:
            for each in self.plan.passes:
                each.reopen(self.plan, store)
            cells = AccuracyPass().cells(self.plan)
            said: pools.Said = queue.Queue()
            pool = ProcessPool(["cpu", "cpu"], worker_task(self.plan, store), said, note=notes.append)
            ShardedAccuracy(self.plan, store, Listening(), cells, pool, said).run(deadline or Deadline())


@pytest.fixture
def stubs(wide: MakeConfig, one_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stubs:
    return Stubs(wide(), one_folder, tmp_path / "stub", monkeypatch)


@pytest.mark.parametrize("deaths", [(0,), (3, 1), (1, None, 5), (7, 2, 4, 6)])
def test_no_row_is_lost_nor_doubled_where_workers_die(
    stubs: Stubs,
    one: dict[Key, Any],
    deaths: tuple[int | None, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards, "_MOST_DEATHS", 9)  # which worker takes up what another died with is for time to say
    stubs.run(*deaths)
    assert rows_of(tmp_path / "run") == one
    killed = [note for note in stubs.notes if "its prompts are given to another" in note]
    assert 1 <= len(killed) <= sum(death is not None for death in deaths)  # the others may have had nothing left


def test_what_two_workers_died_with_is_failed_and_measured_by_the_next_call(
    wide: MakeConfig, one_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubs = Stubs(wide(samples=1, tasks=["vt"], lengths_tokens=[512]), one_folder, tmp_path / "stub", monkeypatch)
    stubs.run(1, 0)
    rows = rows_of(tmp_path / "run")
    assert [row["status"] for row in rows.values()] == ["ok", "failed"]
    (failed,) = (row for row in rows.values() if row["status"] == "failed")
    assert failed["reason"].startswith("decode: a process on cpu ended with code -9")
    stubs.run()
    latest = {row.method_label: row.status for row in RunStore.open(tmp_path / "run").samples()}
    assert set(latest.values()) == {"ok"}


def test_a_worker_that_cannot_begin_ends_the_run_in_its_own_words(stubs: Stubs) -> None:
    with pytest.raises(UsageError, match=r"^The model's weights are cut off\.$"):
        stubs.run("begins not", "begins not")
    assert not Path(stubs.plan.config.out or "", "run.json").exists()  # the mended model is not refused


def test_a_worker_that_is_killed_as_it_begins_has_a_follower(stubs: Stubs, one: dict[Key, Any], tmp_path: Path) -> None:
    stubs.run("is killed as it begins", None, "is killed as it begins")
    assert rows_of(tmp_path / "run") == one
    assert "before it could begin: another begins." in stubs.notes[0]


def test_workers_that_are_all_killed_as_they_begin_end_the_run(stubs: Stubs) -> None:
    with pytest.raises(EnvironmentProblem, match=r"on cpu could not begin \(exit code -9\)"):
        stubs.run(*["is killed as it begins"] * 9)
    assert not Path(stubs.plan.config.out or "", "run.json").exists()


def test_what_the_user_is_to_mend_ends_the_run_in_the_midst_of_a_shard(stubs: Stubs) -> None:
    with pytest.raises(UsageError, match=r"^The folder holds another prompt\.$"):
        stubs.run("another prompt")


def test_prompts_of_a_shard_that_the_time_did_not_do_are_left(
    stubs: Stubs, one: dict[Key, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told(Deadline):
        """Is over where a stub says so."""

        @property
        def left_s(self) -> float:
            return 0.0 if (stubs.folder / "over").exists() else 60.0

    monkeypatch.setattr(shard_list, "_SHARDS_A_WORKER", 1)  # of several prompts each
    with pytest.raises(TimeLimitReached):
        stubs.run("is slow", "is slow", deadline=Told(60.0))
    assert 0 < len(rows_of(tmp_path / "run")) < len(one)
    stubs.run()
    assert rows_of(tmp_path / "run") == one


def test_a_worker_begins_no_prompt_after_its_time(
    wide: MakeConfig, tmp_path: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = wide()
    plan = make_plan(config)
    values = config.model_dump(mode="json", exclude={"out", "gpus"})
    shard = {"task": "vt", "length_tokens": 512, "prompts": [[0, ["dense"]]], "rows": []}
    info = run_info(plan).model_dump(mode="json")
    lines = [json.dumps({**shard, "left_s": left_s}) for left_s in (0.0, None)]
    monkeypatch.setattr(shard_worker, "_lines", lambda: iter(lines))
    said: list[dict[str, Any]] = []
    shard_worker.answer({"config": values, "folder": "run", "info": info, "n_jobs": 2}, said.append)
    assert [next(iter(each)) for each in said] == ["ready", "done", "row", "done"]


def test_a_worker_calls_tasks_what_the_folder_does(
    small: MakeConfig, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = "long_qa:types=single_fact"
    asked = {"lengths_tokens": [1024], "samples": 1, "self_check": False}
    begun = run_info(make_plan(small(tasks=["long_qa", facts], **asked)))
    values = small(tasks=[facts], **asked).model_dump(mode="json", exclude={"out", "gpus"})
    shard = {"task": facts, "length_tokens": 1024, "prompts": [[0, ["dense"]]], "rows": [], "left_s": None}
    monkeypatch.setattr(shard_worker, "_lines", lambda: iter([json.dumps(shard)]))
    said: list[dict[str, Any]] = []
    info = begun.model_dump(mode="json")
    shard_worker.answer({"config": values, "folder": "run", "info": info, "n_jobs": 2}, said.append)
    assert [each["row"]["task"] for each in said if "row" in each] == [facts]


def test_a_time_limit_gives_nothing_more_out(stubs: Stubs, one: dict[Key, Any], tmp_path: Path) -> None:
    with pytest.raises(TimeLimitReached):
        stubs.run(deadline=Deadline(0.0))
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    stubs.run()
    assert rows_of(tmp_path / "run") == one


def test_workers_are_told_their_device_and_all_of_the_run(stubs: Stubs) -> None:
    stubs.run()
    asked = [json.loads(path.read_text()) for path in stubs.folder.glob("asked-*.json")]
    assert len(asked) == 2
    for each in asked:
        assert each["n_jobs"] == 2
        assert (each["config"]["device"], each["config"]["samples"]) == ("cpu", 5)
        assert "out" not in each["config"]


def test_shards_are_runs_of_prompts_of_one_cell(wide: MakeConfig, tmp_path: Path) -> None:
    plan = make_plan(wide(samples=30, methods=["dense"]))
    with RunStore.create(tmp_path / "run", run_info(plan)) as store:
        found = shards_of(plan, store, AccuracyPass().cells(plan), n_workers=3)
    prompts = [(each.task, each.length_tokens, index) for each in found for index, _ in each.prompts]
    assert len(prompts) == len(set(prompts)) == 2 * 2 * 30
    assert [each.length_tokens for each in found] == sorted(each.length_tokens for each in found)
    assert {len(each.prompts) for each in found} == {3}
    assert all(labels == ("dense",) for each in found for _, labels in each.prompts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--jobs", "0"], "jobs"),
        (["--jobs", "many"], "jobs"),
        (["--gpus", "0,0"], "names no GPUs"),
        (["--gpus", "first"], "names no GPUs"),
        (["--gpus", "all", "--device", "cpu"], "leave out --device"),
        (["--jobs", "2", "--find-max"], "this run asks none"),
        (["--gpus", "all", "--throughput"], "this run asks none"),
        (["--footprint-batch", "2", "--no-footprint"], "leave out --no-footprint"),
    ],
)
def test_bad_options_are_one_sentence(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_cli(["plan", "--model", "reference", *options]) == 2
    assert said in capsys.readouterr().err


def test_the_plan_says_how_many_processes_there_are(wide: MakeConfig) -> None:
    text = make_plan(wide(jobs=3)).text()
    assert "jobs       3 processes answer prompts, 3 on cpu; memory and times are measured alone" in text
    assert "jobs  " not in make_plan(wide()).text()


def test_processes_share_the_memory(wide: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvscope.harness.passes import batch_plan

    alone, four = (make_plan(wide(batch=None, jobs=jobs)) for jobs in (1, 4))
    monkeypatch.setattr(batch_plan, "total_host_bytes", lambda: 2 * (alone.batch[0].host_bytes or 0))
    assert make_plan(wide(batch=None)).batch[0].rows == alone.batch[0].rows
    assert make_plan(wide(batch=None, jobs=4)).batch[0].rows < four.batch[0].rows
