"""Run folders of commit c942a2f go on: what they were asked for reads the same today.

``data/run_c942a2f`` is what that commit wrote for the command below; ``data/identities_c942a2f.json`` what it made of
some configurations.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER, sampled_revision
from kvscope.harness.passes.config import load_config

DATA = Path(__file__).parent / "data"
REVISION = "sha256:be2c7fe523870ffa"  # of the reference model then
COMMAND = (
    "run", "-m", "dense", "-m", "random: seed=3, fraction=0.25", "-m", "recency:recency_tokens=4k",
    "-m", "lsa:budget_tokens=256,tau=8", "-t", "niah_single_1", "-t", "long_qa:types=single_fact+hops_2", "-l", "1k",
    "-n", "1", "--max-new-tokens", "2", "--no-footprint", "--device", "cpu", "--no-report",
)  # fmt: skip


def begun(folder: Path) -> Path:
    """Return the old run folder as one of today's weights: those it was of are no longer in the tree."""
    folder.mkdir()
    today = sampled_revision(str(REFERENCE_MODEL_FOLDER), None)
    for path in (DATA / "run_c942a2f").iterdir():
        text = path.read_text(encoding="utf-8")
        (folder / path.name).write_text(text.replace(REVISION, today), encoding="utf-8")
    return folder


def test_the_same_command_continues_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = begun(tmp_path / "run")
    rows = (folder / "samples.jsonl").read_bytes()
    assert cli.run_cli([*COMMAND, "--out", str(folder)]) == 0
    assert "All 8 rows are there already: nothing left to measure." in capsys.readouterr().err
    assert (folder / "samples.jsonl").read_bytes() == rows
    assert cli.run_cli([*COMMAND, "--seed", "1", "--out", str(folder)]) == UsageError.exit_code
    assert "seed (there: 0, asked: 1)" in capsys.readouterr().err


def test_a_missing_row_is_measured_again_as_it_was(tmp_path: Path) -> None:
    """One of the prompts lost a row of a method with options: what is measured for it is what was there."""
    folder = begun(tmp_path / "run")
    lines = (folder / "samples.jsonl").read_text().splitlines()
    lost = next(line for line in lines if "random:fraction=0.25,seed=3" in line)
    (folder / "samples.jsonl").write_text("".join(f"{line}\n" for line in lines if line != lost))
    assert cli.run_cli([*COMMAND, "-q", "--out", str(folder)]) == 0
    again = json.loads((folder / "samples.jsonl").read_text().splitlines()[-1])
    for key in ("method_label", "task", "prompt_sha256", "resident_kv_bytes", "effective_config"):
        assert again.get(key) == json.loads(lost).get(key), key


@pytest.mark.parametrize("case", json.loads((DATA / "identities_c942a2f.json").read_text()))
def test_configurations_have_the_identity_they_had(case: dict[str, Any]) -> None:
    config = load_config(flags=case["flags"], sets=case.get("sets", ()), sweeps=case.get("sweeps", ()))
    assert json.loads(json.dumps(config.identity())) == case["identity"]
