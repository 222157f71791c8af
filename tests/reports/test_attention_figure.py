"""The figure of attention on the evidence: what it averages, what it writes, what it refuses."""

from pathlib import Path

import pandas as pd
import pytest

from kvscope import cli
from kvscope.reports.attention_mass import attention_cells, attention_figure

LENGTHS = tuple(1024 * 2**i for i in range(10))

COMMAND = ["study", "attention-figure"]


def measured_rows(*, tasks: tuple[str, ...] = ("niah_single_1", "vt"), samples: int = 3) -> pd.DataFrame:
    """Four heads in two layers; mass falls with length, the last head's slowest."""
    return pd.DataFrame(
        {
            "model": "reference",
            "task": task,
            "length_tokens": length,
            "sample": sample,
            "seed": 0,
            "prompt_tokens": length - 128,
            "evidence_tokens": 20,
            "layer": 3 + 4 * (head // 2),
            "head": head % 2,
            "evidence_mass": 0.2 * (head + 1) * (1024 / length) ** 0.3 * (1 + 0.1 * sample),
            "evidence_peak": min(1.0, 0.24 * (head + 1) * (1024 / length) ** 0.2),
            "answer_peak": None,
            "answer_mass": 0.1 * (head + 1) * (1024 / length) ** 0.3 if task != "vt" else None,
        }
        for task in tasks
        for length in LENGTHS
        for sample in range(samples)
        for head in range(4)
    )


def test_cells_are_over_prompts_not_over_heads() -> None:
    cells = attention_cells(measured_rows())
    assert list(cells["task"]) == ["niah_single_1"] * 10 + ["vt"] * 10
    cell = cells.iloc[0]
    assert cell["n"] == 3
    assert cell["evidence_mass_max"] == pytest.approx(0.8 * 1.1)
    assert cell["evidence_mass_mean"] == pytest.approx(0.5 * 1.1)
    assert cell["evidence_mass_max_low"] < cell["evidence_mass_max"] < cell["evidence_mass_max_high"]
    assert cell["answer_mass_max"] == pytest.approx(0.4)
    assert cell["evidence_peak_max"] == pytest.approx(0.96)
    assert cell["uniform_share"] == pytest.approx(20 / 896)
    assert cells[cells["task"] == "vt"]["answer_mass_max"].isna().all()
    assert cells["evidence_mass_max"].iloc[9] < cells["evidence_mass_max"].iloc[0]


def test_every_point_lies_inside_its_panel() -> None:
    figure = attention_figure(measured_rows(tasks=("niah_single_1", "niah_multikey_2", "vt", "long_qa"))).figure
    assert len(figure.axes) == 4
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert len(axes.lines) == 4
        assert all(low < y < high for line in axes.lines for y in line.get_ydata())


@pytest.mark.parametrize("tasks", [("vt",), ("niah_single_1", "vt")])
def test_the_key_stays_inside_the_picture(tasks: tuple[str, ...]) -> None:
    figure = attention_figure(measured_rows(tasks=tasks, samples=1)).figure
    (key,) = figure.legends
    box = key.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_the_command_writes_picture_and_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured_rows().to_csv(tmp_path / "mass.csv", index=False)
    assert cli.run_cli([*COMMAND, str(tmp_path / "mass.csv"), "--out", str(tmp_path / "figures")]) == 0
    written = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert written == [f"attention_on_evidence.{ending}" for ending in ("csv", "png", "svg")]
    assert len(pd.read_csv(tmp_path / "figures/attention_on_evidence.csv")) == 20
    assert str(tmp_path) in capsys.readouterr().out


def test_other_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_cli([*COMMAND, str(tmp_path / "absent.csv")]) == 2
    (tmp_path / "odd.csv").write_text("task,length_tokens\nvt,1024\n")
    assert cli.run_cli([*COMMAND, str(tmp_path / "odd.csv")]) == 2
    measured_rows().head(0).to_csv(tmp_path / "empty.csv", index=False)
    assert cli.run_cli([*COMMAND, str(tmp_path / "empty.csv")]) == 2
    said = capsys.readouterr().err
    assert "absent.csv cannot be read" in said
    assert "it lacks answer_mass, answer_peak, evidence_mass, evidence_peak" in said
    assert "nothing was measured" in said
