"""Run folders of commit c942a2f go on: what they were asked for reads the same today.

``data/run_c942a2f`` is what that commit wrote for the command below; ``data/identities_c942a2f.json`` what it made of
some configurations.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.passes.config import load_config

DATA = Path(__file__).parent / "data"
COMMAND = (
    "run", "-m", "dense", "-m", "random: seed=3, fraction=0.25", "-m", "recency:recency_tokens=4k",
    "-m", "lsa:budget_tokens=256,tau=8", "-t", "niah_single_1", "-t", "long_qa:types=single_fact+hops_2", "-l", "1k",
    "-n", "1", "--max-new-tokens", "2", "--no-footprint", "--device", "cpu", "--no-report",
)  # fmt: skip


def test_the_same_command_continues_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shutil.copytree(DATA / "run_c942a2f", folder)
    rows = (folder / "samples.jsonl").read_bytes()
    assert cli.run_cli([*COMMAND, "--out", str(folder)]) == 0
    assert "All 8 rows are there already: nothing left to measure." in capsys.readouterr().err
    assert (folder / "samples.jsonl").read_bytes() == rows
    assert cli.run_cli([*COMMAND, "--seed", "1", "--out", str(folder)]) == UsageError.exit_code
    assert "seed (there: 0, asked: 1)" in capsys.readouterr().err


def test_a_missing_row_is_measured_again_as_it_was(tmp_path: Path) -> None:
    """One of the prompts lost a row of a method with options: what is measured for it is what was there."""
    folder = tmp_path / "run"
    shutil.copytree(DATA / "run_c942a2f", folder)
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
