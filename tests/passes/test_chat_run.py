"""A run whose prompts are turns of a chat: what rows, plan and folder say of it, and what a folder refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import MakeConfig, save_tiny_model

import kvscope
from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.engine.chat import ChatTokenizer
from kvscope.harness.passes.footprint import FootprintPass
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.prompt_check import build

TEMPLATE = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' [assistant]' }}{% endfor %}"


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model whose tokenizer brings a template."""
    folder = tmp_path_factory.mktemp("models") / "instruct"
    save_tiny_model(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def frame(config: Any) -> Any:
    return kvscope.run(config, progress=False)


def test_rows_plan_and_identity_name_the_template(
    small: MakeConfig, instruct: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(model=str(instruct))
    run = frame(config)
    (said,) = set(run.samples["chat_template"])
    assert set(run.samples["status"]) == {"ok"}
    assert set(run.samples["prompt_tokens"]) == {512 - 4}
    assert run.info.identity["chat_template"] == said
    plan = make_plan(config)
    assert isinstance(plan.facts.tokenizer, ChatTokenizer)
    assert plan.facts.tokenizer.sha256 == said
    assert cli.run_cli(["plan", "--model", str(instruct), "-l", "512", "-t", "niah_single_1"]) == 0
    assert f"by its chat template, {said[:19]}" in capsys.readouterr().out


def test_memory_is_measured_on_the_same_kind_of_prompt(small: MakeConfig, instruct: Path) -> None:
    plan = make_plan(small(model=str(instruct), footprint=True, footprint_decode_tokens=4))
    job = FootprintPass().job(plan, plan.methods[0], 512)
    assert job.cell["chat_template"] == plan.facts.chat_template
    ids = [*job.context_ids, *job.forced_ids]
    assert len(ids) == 512 - 4
    assert plan.facts.tokenizer.decode(ids).startswith("[user] ")


def test_no_line_break_ends_the_answer_of_a_chat_model(small: MakeConfig, instruct: Path) -> None:
    stops = {}
    for choice in ("auto", "none"):
        plan = make_plan(small(model=str(instruct), chat_template=choice))
        stops[choice] = build(plan, plan.tasks[0], "niah_single_1", 512, 0).stop
    assert stops == {"auto": (), "none": ("\n",)}


def test_a_folder_keeps_to_its_template(small: MakeConfig, instruct: Path, tmp_path: Path) -> None:
    frame(small(model=str(instruct)))
    (tmp_path / "other.jinja").write_text(TEMPLATE.replace("[assistant]", "[bot]"))
    for choice in ("none", str(tmp_path / "other.jinja")):
        with pytest.raises(UsageError, match="differs in: chat_template"):
            frame(small(model=str(instruct), chat_template=choice))
    (tmp_path / "same.jinja").write_text(TEMPLATE)
    assert len(frame(small(model=str(instruct), chat_template=str(tmp_path / "same.jinja"))).samples) == 4


def test_a_folder_from_before_there_were_templates_says_how_to_go_on(
    small: MakeConfig, instruct: Path, tmp_path: Path
) -> None:
    config = small(model=str(instruct), chat_template="none")
    frame(config)
    path = tmp_path / "run" / "run.json"
    info = json.loads(path.read_text())
    del info["config"]["chat_template"]
    path.write_text(json.dumps(info))
    assert "chat_template" not in info["identity"]
    with pytest.raises(UsageError, match="add --chat-template none to go on"):
        frame(small(model=str(instruct)))
    assert len(frame(config).samples) == 4


@pytest.mark.parametrize(
    ("value", "said"), [("", "--chat-template is ''"), ("gone.jinja", "Cannot read the chat template")]
)
def test_a_bad_choice_is_refused_before_anything_is_measured(
    value: str, said: str, instruct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["run", "--model", str(instruct), "-l", "512", "--chat-template", value, "--out", str(out)]
    assert cli.run_cli(command) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
