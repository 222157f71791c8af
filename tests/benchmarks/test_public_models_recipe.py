"""The recipe of public models: what is asked of which method, at which bytes, and what a limit of time leaves."""

import argparse
import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark_scripts import load_script

from kvscope.errors import UsageError
from kvscope.methods.registry import create_method

SHARES = {4096: 0.25, 32_768: 0.135}


@pytest.fixture
def script() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        yield load_script(patch, "public_models")


@pytest.fixture
def recipe(script: Any, tmp_path: Path) -> Any:
    options = argparse.Namespace(
        work=tmp_path, model="none", samples=10, compare_samples=4, share=None, device=None, gpus=None, jobs=1,
        time_limit=math.inf, footprint_batch=2,
    )  # fmt: skip
    bytes_of = {"window_bytes": 100, "dense_bytes": {"4096": 500, "32768": 3100}}
    (tmp_path / script.BYTES_FILE).write_text(json.dumps(bytes_of), encoding="utf-8")
    (tmp_path / script.TASKS_FILE).write_text(json.dumps({"tasks": ["niah_single_1", "vt"]}), encoding="utf-8")
    return script.Recipe(options, SHARES)


def test_every_spec_is_one_of_a_method(script: Any) -> None:
    tested = script.tested(0.25, fitted=False)
    specs = [*tested, *script.compared([0.05, 0.25], fitted=False)]
    labels = [create_method(spec).label for spec in specs]
    assert len(set(labels)) == len(specs) - len(tested)  # the comparison has them all
    assert "lsa:indexer=landmark,share=0.25" in labels
    assert "moba:block_tokens=64,read_share=0.05" in labels


def test_a_share_of_managed_bytes_leaves_windows_out(recipe: Any) -> None:
    assert recipe._of_all(0.25, 4096) == pytest.approx((100 + 0.25 * 400) / 500)
    assert recipe._of_all(0.135, 32_768) == pytest.approx((100 + 0.135 * 3000) / 3100)


def test_every_length_is_asked_with_its_own_share(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(recipe.work, "kvscope", lambda *arguments: asked.append(arguments))
    assert not recipe.test()  # nothing was measured, so it is not done, and the next length is not begun
    assert asked[0][asked[0].index("--out") + 1] == "test-4K"
    assert "lsa:indexer=landmark,share=0.4" in asked[0]
    assert asked[0][asked[0].index("--samples") + 1] == "5"
    assert "--time-limit" not in asked[0]


def test_times_ask_for_a_cell_a_method_and_length(script: Any, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def rows(out: str) -> int:
        return sum(2 * each.count("--method") for each in asked if out in each)

    monkeypatch.setattr(recipe.work, "kvscope", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(recipe.work, "rows", rows)
    assert recipe.times()
    first, second = asked
    assert first[first.index("--out") + 1] == "times-4K"
    assert second[second.index("--out") + 1] == "times-32K"
    assert f"footprint_decode_tokens={script.TIMED_STEPS}" in first
    assert "--no-footprint" not in first
    assert "snapkv:share=0.308" in first  # 13.5 % of the managed bytes, and the window's
    assert len({create_method(spec).label for spec in first[first.index("--method") + 1 :: 2] if ":" in spec}) > 10


def test_a_limit_of_time_is_no_failure(script: Any, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(script.time, "monotonic", lambda: now_s[0])
    recipe.work.deadline_s = 1060.5
    took_s, code = 60.0, 1

    def run(*arguments: str) -> None:
        assert arguments[arguments.index("--time-limit") + 1] == "60"
        now_s[0] += took_s
        raise subprocess.CalledProcessError(code, "kvscope")

    monkeypatch.setattr(recipe.work, "kvscope", run)
    assert not recipe.test()

    now_s[0], took_s = 1000.0, 5.0  # it failed long before
    with pytest.raises(subprocess.CalledProcessError):
        recipe.test()
    now_s[0], took_s, code = 1000.0, 60.0, 2
    with pytest.raises(subprocess.CalledProcessError):
        recipe.test()
    now_s[0] = 1055.0  # too late to begin
    assert not recipe.test()


def test_without_a_limit_every_end_is_a_failure(script: Any, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: str) -> None:
        raise subprocess.CalledProcessError(1, "kvscope")

    monkeypatch.setattr(recipe.work, "kvscope", fail)
    with pytest.raises(subprocess.CalledProcessError):
        recipe.test()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--length", "4k"], "'4k' has no share"),
        (["--length", "4k=x"], "'4k=x' has no share"),
        (["--length", "4k=1.5"], "'4k=1.5' has no share"),
        (["--length", "4k=nan"], "'4k=nan' has no share"),
        (["--length", "4q=0.5"], "'4q' is not a length"),
        (["--length", "4k=0.5", "--length", "4096=0.2"], "4096 is given twice"),
        (["--length", "4k=0.5", "--share", "3"], "--share must be above 0"),
        (["--length", "4k=0.5", "--samples", "0"], "--samples must be 1 or more"),
        (["--length", "4k=0.5", "--step", "test"], "which --step choose writes"),
        (["--length", "4k=0.5", "--step", "recall", "--recall-length", "4k"], "which --step fit writes"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(script: Any, tmp_path: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        script.main(["--model", "none", "--work", str(tmp_path), *arguments])
    assert "\n" not in str(caught.value)


def test_a_failed_command_is_told_with_its_step(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: str) -> None:
        raise subprocess.CalledProcessError(2, "kvscope")

    monkeypatch.setattr(script.WorkFolder, "kvscope", fail)
    with pytest.raises(UsageError, match="Step fit: kvscope ended with exit code 2"):
        script.main(["--model", "none", "--work", str(tmp_path), "--length", "4k=0.5"])


def test_a_folder_is_one_models_and_takes_further_lengths(
    script: Any, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = recipe.work.path
    other = argparse.Namespace(**{**vars(recipe.options), "model": "other"})
    with pytest.raises(UsageError, match="is of the model none, not of other"):
        script.Recipe(other, SHARES)
    with pytest.raises(UsageError, match="cannot be"):
        script.Recipe(argparse.Namespace(**{**vars(recipe.options), "work": folder / "model.txt" / "x"}), SHARES)

    loaded = argparse.Namespace(shape=argparse.Namespace(stock_kv_bytes=lambda *_: 100))
    monkeypatch.setattr(script, "load_model", lambda *_, **__: loaded)
    predicted = argparse.Namespace(predict=lambda *_: argparse.Namespace(device_bytes=900))
    monkeypatch.setattr(script, "Dense", lambda: predicted)
    more = script.Recipe(recipe.options, {8192: 0.5})
    assert more._of_all(0.5, 8192) == pytest.approx((100 + 0.5 * 800) / 900)
    assert set(json.loads((folder / script.BYTES_FILE).read_text())["dense_bytes"]) == {"4096", "32768", "8192"}


def test_figures_need_a_run(monkeypatch: pytest.MonkeyPatch, recipe: Any) -> None:
    results, folder = load_script(monkeypatch, "public_models_result"), recipe.work.path
    with pytest.raises(UsageError, match="or no run yet"):
        results.main(["result", "--run", str(folder), "--out", str(folder / "figures.json")])
