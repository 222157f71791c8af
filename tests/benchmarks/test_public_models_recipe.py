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
    specs = [*script.tested(0.25, fitted=False), *script.compared([0.05, 0.25], fitted=False)]
    labels = [create_method(spec).label for spec in specs]
    assert len(set(labels)) == len(specs) - 1 - 1  # dense and landmark at 0.25 are in both
    assert "lsa:indexer=landmark,share=0.25" in labels
    assert "moba:block_tokens=64,read_share=0.05" in labels


def test_a_share_of_managed_bytes_leaves_windows_out(recipe: Any) -> None:
    assert recipe._of_all(0.25, 4096) == pytest.approx((100 + 0.25 * 400) / 500)
    assert recipe._of_all(0.135, 32_768) == pytest.approx((100 + 0.135 * 3000) / 3100)


def test_every_length_is_asked_with_its_own_share(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(recipe, "kvscope", lambda *arguments: asked.append(arguments))
    assert not recipe.test()  # nothing was measured, so it is not done, and the next length is not begun
    assert asked[0][asked[0].index("--out") + 1] == "test-4K"
    assert "lsa:indexer=landmark,share=0.4" in asked[0]
    assert asked[0][asked[0].index("--samples") + 1] == "5"
    assert "--time-limit" not in asked[0]


def test_a_limit_of_time_is_no_failure(script: Any, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [1000.0]
    monkeypatch.setattr(script.time, "monotonic", lambda: now_s[0])
    recipe.deadline_s = 1060.5
    took_s, code = 60.0, 1

    def run(*arguments: str) -> None:
        assert arguments[arguments.index("--time-limit") + 1] == "60"
        now_s[0] += took_s
        raise subprocess.CalledProcessError(code, "kvscope")

    monkeypatch.setattr(recipe, "kvscope", run)
    assert not recipe.test()

    now_s[0], took_s = 1000.0, 5.0  # it failed long before
    with pytest.raises(subprocess.CalledProcessError):
        recipe.test()
    now_s[0], took_s, code = 1000.0, 60.0, 2
    with pytest.raises(subprocess.CalledProcessError):
        recipe.test()
    now_s[0] = 1055.0  # too late to begin
    assert not recipe.test()
