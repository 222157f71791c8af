"""Question types excluded from pooled scores: the rule, its file, what a run copies, and bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import MakeConfig

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.pooling import EXCLUDED_FILE, excluded_types, exclusion_list
from kvscope.harness.passes.recording import run_info
from kvscope.results.store import read_info
from kvscope.specs import parse_spec

COMMAND = ["backbone", "exclude-types"]


def row(percents: dict[str, float], **changes: Any) -> dict[str, Any]:
    values = {
        "task": "long_qa",
        "length_tokens": 4096,
        "samples": 90,
        "seed": 1000,
        "closed_book": False,
        "accuracy_percent_by_type": percents,
    }
    return values | changes


def test_the_rule_takes_the_mean_over_lengths_and_names_what_is_under_it() -> None:
    made = exclusion_list(
        [
            row({"hops_3": 80.0, "temporal": 60.0, "multi_session": 70.0}),
            row({"hops_3": 90.0, "temporal": 60.0, "multi_session": 49.0}, length_tokens=8192, samples=91),
            row({"niah_single_1": 12.0}, task="niah_single_1"),
        ]
    )
    assert made.dense_percent == {"long_qa": {"hops_3": 85.0, "temporal": 60.0, "multi_session": 59.5}}
    assert [(each.task, each.question_type, each.n) for each in made.excluded] == [("long_qa", "multi_session", 60)]
    assert made.excluded[0].sentence == (
        "multi_session of long_qa counts in no pooled score: dense answers 60 % of it on training seeds (n=60)"
    )
    assert (made.seeds, made.lengths_tokens, made.least_percent) == ((1000,), (4096, 8192), 60.0)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row({"a": 1.0, "b": 2.0}, seed=0)], "seed 0, which evaluates"),
        ([row({"a": 1.0, "b": 2.0}, closed_book=True)], "closed-book"),
        ([row({"a": 1.0})], "No row is of a task with several question types"),
    ],
)
def test_rows_that_must_not_decide_are_refused(rows: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        exclusion_list(rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that passes for a model's."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    return made


def test_the_command_writes_the_list_that_runs_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([row({"hops_3": 40.0, "single_fact": 99.0})]))
    assert excluded_types(str(folder)) == ()
    assert cli.run_cli([*COMMAND, str(rows), "--model", str(folder)]) == 0
    assert "hops_3 of long_qa counts in no pooled score: dense answers 40 %" in capsys.readouterr().out
    (found,) = excluded_types(str(folder))
    assert (found.task, found.question_type, found.dense_percent, found.n) == ("long_qa", "hops_3", 40.0, 45)
    assert excluded_types("owner/hub-model") == ()


def test_bad_files_get_one_clear_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.json"
    for text in ("{", "[1]", "7", '[{"seed": 1000}]'):
        rows.write_text(text)
        assert cli.run_cli([*COMMAND, str(rows), "--model", str(folder)]) == 2
        assert "holds no rows of" in capsys.readouterr().err
    assert cli.run_cli([*COMMAND, str(rows), "--model", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err
    (folder / EXCLUDED_FILE).write_text('{"excluded": ["hops_3"]}')
    with pytest.raises(UsageError, match=r"excluded_types\.json is no list of excluded question types"):
        excluded_types(str(folder))


def test_a_run_copies_the_list_and_keeps_its_own(small: MakeConfig, tmp_path: Path) -> None:
    """A list that changes later does not change what an old run pools."""
    from kvscope.harness.passes.sweep import run

    config = small(
        methods=["dense"], tasks=["long_qa:types=hops_3"], lengths_tokens=[2048], samples=1, max_new_tokens=2,
        footprint=False,
    )  # fmt: skip
    listed = Path(config.model) / EXCLUDED_FILE
    made = exclusion_list([row({"hops_3": 40.0, "single_fact": 99.0})])
    try:
        listed.write_text(made.model_dump_json())
        plan = make_plan(config)
        assert run_info(plan).excluded_types == made.excluded
        assert f"note       {made.excluded[0].sentence}." in plan.text()
        other = config.model_copy(update={"tasks": (parse_spec("long_qa:types=single_fact", kind="task"),)})
        assert make_plan(other).excluded_types == (), "no prompt is of that type"
        run(config, out=tmp_path / "run", progress=False)
    finally:
        listed.unlink()
    run(config, out=tmp_path / "run", progress=False)
    assert read_info(tmp_path / "run").excluded_types == made.excluded
