"""The examples do what they say, on a CPU and from any folder."""

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvscope.cli import run_cli
from kvscope.results.frames import load_run

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Return a way to call an example from ``tmp_path``, which gives what it printed."""

    def call(name: str, *arguments: str | Path) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


def test_two_methods_are_compared_on_the_same_prompts(call: Callable[..., str], tmp_path: Path) -> None:
    said = call("compare_methods.py", "--out", "run", "--samples", "1")
    assert "dense: 100 % right, 100 % of dense's bytes" in said
    held = re.search(r"^recency: \d+ % right, (\d+) % of dense's bytes$", said, re.MULTILINE)
    assert held is not None
    assert 5 < int(held[1]) < 60
    assert re.search(r"^recency against dense: [+-]\d+ points, inconclusive", said, re.MULTILINE)
    samples = load_run(tmp_path / "run").samples
    assert sorted(samples.method_label) == ["dense", "recency"]
    assert samples.prompt_sha256.nunique() == 1


def test_a_footprint_is_measured(call: Callable[..., str], tmp_path: Path) -> None:
    said = call("measure_footprint.py", "--method", "recency", "--out", "run")
    held = re.search(r"^recency: ([\d.]+) MiB by the ledger, ([\d.]+) MiB for dense$", said, re.MULTILINE)
    assert held is not None
    assert float(held[1]) < 0.5 * float(held[2])
    assert re.search(r"^verdict: (not_measured \(.+\)|below_resolution)$", said, re.MULTILINE)
    (row,) = load_run(tmp_path / "run").footprint.itertuples()
    assert (row.method_label, row.length_tokens, row.status) == ("recency", 1024, "ok")


def test_a_figure_is_drawn_from_committed_rows(call: Callable[..., str], tmp_path: Path) -> None:
    run = ROOT / "results" / "reference" / "h100" / "lsa-vt"
    said = call("figure_from_rows.py", "--run", run, "--out", "share.png")
    assert re.search(r"^ *vt +16384 +0\.998 +0\.110 +216$", said, re.MULTILINE), said
    assert (tmp_path / "share.png").read_bytes().startswith(b"\x89PNG")


def test_the_sweep_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["plan", str(EXAMPLES / "sweep.yaml")]) == 0
    said = capsys.readouterr().out
    assert "for 7 methods" in said
    for label in ("dense", "lsa:threshold=0.3", "recency:budget_fraction=0.4"):
        assert label in said


def test_every_example_is_named_on_the_page() -> None:
    page = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml")}
    assert len(names) == 4
    assert {name for name in names if name not in page} == set()
