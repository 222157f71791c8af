"""A disk that is full, or a limit on file sizes, while a collection, an indexer, a log or a table is written."""

import errno
import os
from pathlib import Path

import dsa_tools
import pytest
from full_disk import no_file_over
from lsa_tools import random_indexer
from planted import planted_collection
from tiny import save_tiny_model
from tiny_models import loaded_model

from kvscope import cli
from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.files import TextFile, whole_file
from kvscope.harness.indexers.collection.reading import Collection
from kvscope.harness.indexers.dsa import train as dsa_train
from kvscope.harness.indexers.dsa.objective import DsaTrainConfig
from kvscope.harness.indexers.lsa.evaluate import EvalConfig, evaluate
from kvscope.harness.indexers.lsa.objective import TrainConfig
from kvscope.harness.indexers.lsa.train import train


@pytest.mark.parametrize("most_bytes", [100, 3000])
def test_a_shard_that_does_not_fit_is_a_sentence_and_leaves_nothing(most_bytes: int, tmp_path: Path) -> None:
    folder = tmp_path / "collection"
    with no_file_over(most_bytes), pytest.raises(EnvironmentProblem, match="could not be written"):
        planted_collection(folder, documents=4, per_shard=2)
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    assert not (folder / "manifest.json").exists(), "nothing looks like a collection"
    planted_collection(folder, documents=4, per_shard=2)
    assert len(Collection(folder)) == 4


def test_an_indexer_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    shape = loaded_model("llama").shape
    folder = random_indexer(tmp_path / "indexer", shape)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with no_file_over(200), pytest.raises(EnvironmentProblem, match="could not be written"):
        random_indexer(folder, shape, seed=1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


QUICK = TrainConfig(tau=1, epochs=1, recency_tokens=128, device="cpu", encoder="mean", lookback=1)
EVAL = EvalConfig(recency_tokens=128)


def quiet(text: str) -> None:
    del text


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(planted_collection(tmp_path_factory.mktemp("planted") / "data", documents=8, per_shard=8))


@pytest.fixture(scope="module")
def trained(data: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("trained") / "indexer"
    train([data], folder, QUICK, note=quiet)
    return str(folder)


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.suffix == ".tmp"]


def test_a_training_log_that_does_not_fit_is_a_sentence(data: str, tmp_path: Path) -> None:
    with (
        no_file_over(100),
        pytest.raises(EnvironmentProblem, match=r"train_log.jsonl' could not be written .*make room"),
    ):
        train([data], tmp_path / "out", QUICK, note=quiet)
    train([data], tmp_path / "out", QUICK, note=quiet)


def test_a_card_that_does_not_fit_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = str(dsa_tools.planted_collection(tmp_path / "data"))
    config = DsaTrainConfig(epochs=1, key_dim=12, heads=2, device="cpu")
    monkeypatch.setattr(dsa_train, "card_text", lambda config: "x" * 10**6)
    with no_file_over(900_000), pytest.raises(EnvironmentProblem, match=r"README.md' could not be written"):
        dsa_train.train([data], tmp_path / "out", config, note=quiet)
    assert not (tmp_path / "out" / "README.md").exists()
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize("most_bytes", [100, 20_000])
def test_tables_that_do_not_fit_are_a_sentence_and_leave_the_ones_before(
    data: str, trained: str, tmp_path: Path, most_bytes: int
) -> None:
    out = tmp_path / "out"
    evaluate([data], trained, out, EVAL, device="cpu")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert max(map(len, before.values())) > 20_000
    with no_file_over(most_bytes), pytest.raises(EnvironmentProblem, match="could not be written"):
        evaluate([data], trained, out, EVAL, device="cpu")
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after.keys() == before.keys()
    assert after["recall.csv"] == before["recall.csv"]


def test_a_study_keeps_what_fitted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny_model(tmp_path / "model")
    out = tmp_path / "mass.csv"
    command = ["study", "attention-mass", "--model", str(tmp_path / "model"), "-t", "niah_single_1", "-l", "1k"]
    capsys.readouterr()
    with no_file_over(400):
        assert cli.run_cli([*command, "-n", "1", "--device", "cpu", "--out", str(out)]) == 3
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"'{out}' could not be written" in told
    assert len(out.read_bytes()) == 400


def test_any_command_says_that_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "x"))

    monkeypatch.setattr("kvscope.reports.attention_mass.write_attention_figure", full)
    assert cli.run_cli(["study", "attention-figure", "x.csv"]) == 3
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "No space left on device" in told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_text_file_on_a_full_device(tmp_path: Path) -> None:
    with TextFile(Path("/dev/full")) as file, pytest.raises(EnvironmentProblem, match="No space left on device"):
        file.write("x")
    with TextFile(tmp_path / "x") as file:
        assert file.write("é\n") == 2
    with TextFile(tmp_path / "x", append=True) as file:
        file.write("b")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "é\nb"
    with pytest.raises(UsageError, match="cannot be written: Is a directory"):
        TextFile(tmp_path)


def test_a_whole_file_is_the_old_one_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with no_file_over(10), pytest.raises(EnvironmentProblem), whole_file(path) as temporary:
        temporary.write_text("x" * 100)
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    "command",
    [
        ["lsa", "collect", "-t", "niah_single_1", "-l", "1k", "--out", "/proc/x"],
        ["lsa", "train", "--data", "nowhere", "--out", "/proc/x"],
        ["lsa", "eval", "--data", "nowhere", "--indexer", "x", "--out", "/proc/x"],
        ["dsa", "train", "--data", "nowhere", "--out", "/proc/x"],
        ["dsa", "eval", "--data", "nowhere", "--indexer", "x", "--out", "/proc/x"],
        ["study", "attention-mass", "-t", "niah_single_1", "-l", "1k", "--out", "/proc/x.csv"],
        ["study", "block-ranks", "-m", "quest", "-t", "niah_single_1", "-l", "1k", "--out", "/nowhere/x.csv"],
        ["backbone", "evaluate", "nowhere", "--out", "/proc/x.json"],
        ["backbone", "controls", "nowhere", "--out", "/proc"],
        ["plan", "--out", "/proc/x"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_place_that_cannot_be_written_is_told_first(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_cli(command) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "cannot be written" in told or "is a folder, not a file" in told
