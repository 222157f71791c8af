"""``kvscope lm-eval``: lm-eval's own command with a model under a method."""

import json
import sys
from functools import partialmethod
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager
from tiny import save_tiny_model

from kvscope import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(made)
    return str(made)


def test_results_say_what_ran(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Reading thousands of task files takes lm-eval seconds, and this needs one.
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    command = ["lm-eval", "--model", folder, "-m", "recency:recency_tokens=64", "--tasks", "kvscope_niah_single_1"]
    metadata = json.dumps({"length_tokens": 512, "samples": 2, "seed": 1})
    rest = ["--metadata", metadata, "--gen_kwargs", "max_gen_toks=4", "--output_path", str(tmp_path), "--log_samples"]
    before = list(sys.argv)
    assert cli.run_cli([*command, *rest, "--device", "cpu"]) == 0
    assert sys.argv == before
    (path,) = tmp_path.rglob("results_*.json")
    results = json.loads(path.read_text())
    said = results["config"]["kvscope"]
    assert (said["method"], said["sequences"]) == ("recency", 2)
    assert results["config"]["model_args"]["method"] == "recency:recency_tokens=64"
    assert len([*tmp_path.rglob("samples_*.jsonl")]) == 1
    captured = capsys.readouterr()
    assert "kvscope_niah_single_1" in captured.out
    assert f"{said['share_of_dense']:.1%} of dense" in captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "{folder}"], "Say which tasks"),
        (["--model", "{folder}", "--tasks", "kvscope_niah_single_1", "--model_args", "a=b"], "is for kvscope to give"),
        (["--model", "no-such-model", "--tasks", "kvscope_niah_single_1"], "There is no model 'no-such-model'"),
        (["--model", "{folder}", "-m", "quset", "--tasks", "kvscope_niah_single_1"], "Did you mean 'quest'"),
        (["-m", "dense", "-m", "recency", "--tasks", "kvscope_niah_single_1"], "one method a call, and 2 are given"),
    ],
)
def test_bad_input_is_one_sentence(
    folder: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run_cli(["lm-eval", *(each.format(folder=folder) for each in arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert said in error[-1]


def test_data_out_of_reach_is_a_fault_of_the_machine(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable() -> None:
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub")

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", unreachable)
    assert cli.run_cli(["lm-eval", "--model", folder, "--tasks", "arc_easy"]) == 3
    assert capsys.readouterr().err.startswith("kvscope: lm-eval: Couldn't reach 'allenai/ai2_arc' on the Hub. Bring")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--samples", '{"kvscope_niah_single_1": [99]}'], "lm-eval: Elements of --samples should be"),
        (["--config", "{folder}/no.yaml"], "lm-eval: Config file not found"),
        (["--metadata", '{"length": 512}'], "has no 'length' in --metadata: write 'length_tokens'"),
        (["--metadata", '{"length_tokens": [512, 1024]}'], "length_tokens of --metadata is [512, 1024], expected one"),
        (["--metadata", '{"length_tokens": 512, "samples": "few"}'], "samples of --metadata is 'few'"),
        (["--output_path", "/proc/nowhere"], "--output_path: nothing can be written to '/proc/nowhere'"),
        (["--output_path=/proc/nowhere/results.json"], "--output_path: nothing can be written to '/proc/nowhere'"),
    ],
)
def test_bad_arguments_of_lm_eval_are_one_sentence(
    folder: str,
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    command = ["lm-eval", "--model", folder, "--no-self-check", "--device", "cpu", "--tasks", "kvscope_niah_single_1"]
    given = [each.replace("{folder}", folder) for each in arguments]
    if "--metadata" not in given:
        given += ["--metadata", json.dumps({"length_tokens": 512, "samples": 1})]
    assert cli.run_cli([*command, *given]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_fault_of_our_own_is_not_lm_eval_s(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
    monkeypatch.setattr("kvscope.harness.lm_harness.model.load_model", lambda *a, **k: None)
    command = ["lm-eval", "--model", folder, "--tasks", "kvscope_niah_single_1"]
    assert cli.run_cli([*command, "--metadata", '{"length_tokens": 512, "samples": 1}']) == 70
