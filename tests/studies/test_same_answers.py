"""Two servers that answer alike, unlike, or not even like themselves, and a model of ours against a server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_server import Stub, needle, no_pauses, reference_tokenizer, stub_server

import kvscope
from kvscope import cli
from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.harness.studies.same_answers import SameAnswers, first_difference, same_answers

ASKED = {
    "tokenizer": "reference",
    "tasks": ["niah_single_1"],
    "lengths_tokens": [320],
    "samples": 8,
    "max_new_tokens": 24,
    "request_tries": 1,
}


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Stub, Stub]]:
    no_pauses(monkeypatch)
    with stub_server() as a, stub_server() as b:
        yield a, b


def asked(a: Stub, b: Stub, **more: Any) -> SameAnswers:
    return same_answers(a.url, b.url, values={**ASKED, **more}, progress=False)


def test_two_servers_that_answer_alike(pair: tuple[Stub, Stub]) -> None:
    found = asked(*pair)
    assert (found.verdict, found.n_compared, found.n_prompts, found.compared) == ("same", 8, 8, "whole texts")
    assert (found.same.mean, found.noise.mean, found.accuracy.difference.mean) == (1.0, 1.0, 0.0)
    assert found.sentence == "same: all 8 answers of B are those of A"


def test_a_difference_behind_the_stop_string_is_seen(pair: tuple[Stub, Stub]) -> None:
    """The scored answers are equal: an engine that goes wrong later is told by the rest of the text."""
    a, b = pair
    b.answer = lambda text, asked: needle(text).replace("grass", "snow")
    found = asked(a, b)
    assert found.verdict == "different"
    assert (found.same.mean, found.noise.mean) == (0.0, 1.0)
    assert (found.accuracy_a, found.accuracy_b, found.accuracy.discordant) == (1.0, 1.0, 0)
    assert found.agreement.p_value == pytest.approx(2 * 0.5**8)
    ids = reference_tokenizer()(f" {1234567}.\nThe", add_special_tokens=False)["input_ids"]
    first = found.differing[0]
    assert first.first_token == len(ids)
    assert (first.a.strip(), first.b.strip(), first.a_repeats) == ("grass is green.", "snow is green.", True)


def test_wrong_answers_cost_accuracy(pair: tuple[Stub, Stub]) -> None:
    a, b = pair
    b.answer = lambda text, asked: " no idea" if needle(text)[7] in "13579" else needle(text)
    found = asked(a, b, samples=12)
    wrong = len(found.differing)
    assert 6 <= wrong < 12
    assert found.accuracy.lost == wrong
    assert found.accuracy_b == pytest.approx(1 - wrong / 12)
    assert found.verdict == "different"


def test_a_server_that_differs_from_itself_is_the_yardstick(pair: tuple[Stub, Stub]) -> None:
    """Both put another word on every asking: B changes all answers, and so does A."""
    for stub in pair:
        stub.answer = lambda text, asked, stub=stub: f"{needle(text)} {asked} {id(stub)}"  # type: ignore[misc]
    found = asked(*pair)
    assert (found.same.mean, found.noise.mean) == (0.0, 0.0)
    assert found.verdict == "inconclusive"
    assert "B changes 8 of 8 answers, A itself 8" in found.sentence


def test_few_differences_are_inconclusive(pair: tuple[Stub, Stub]) -> None:
    a, b = pair
    changed: list[str] = []

    def answer(text: str, asked: int) -> str:
        if "special magic number" in text and len(changed) < 2:
            changed.append(text)
        return f"{needle(text)} Indeed." if text in changed else needle(text)

    b.answer = answer
    found = asked(a, b)
    assert (found.verdict, len(found.differing)) == ("inconclusive", 2)
    assert found.sentence.startswith("inconclusive: B changes 2 of 8 answers, A itself 0; 2 prompts tell the two apart")


def test_a_model_of_ours_and_a_server(pair: tuple[Stub, Stub], tiny_model: str, tmp_path: Path) -> None:
    """The stub says what the model said, and more behind the stop string, where the model ends."""
    values = {**ASKED, "tokenizer": tiny_model, "samples": 2, "max_new_tokens": 6, "chat_template": "none"}
    own = {key: value for key, value in values.items() if key not in ("tokenizer", "request_tries")}
    run = kvscope.run(
        {**own, "model": tiny_model, "methods": ["dense"], "footprint": False, "device": "cpu",
         "out": str(tmp_path / "own")}, progress=False,
    )  # fmt: skip
    said = dict(zip(run.samples["prompt_sha256"], run.samples["output"], strict=True))
    from kvscope.tasks.base import text_sha256

    a, _ = pair
    a.token_ids = False
    a.answer = lambda text, asked: f"{said.get(text_sha256(text), '')}\nmore"
    found = same_answers(tiny_model, a.url, values={**values, "device": "cpu"}, progress=False)
    assert found.compared == "answers up to the stop string"
    assert (found.noise.mean, found.n_compared) == (1.0, 2)
    assert found.verdict == "same", found.text()


def test_the_command_keeps_rows_and_continues(
    pair: tuple[Stub, Stub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = pair
    b.answer = lambda text, asked: needle(text).replace("grass", "snow")
    b.dies_after = 10
    out = tmp_path / "both"
    command = ["same-answers", a.url, b.url, "--tokenizer", "reference", "-t", "niah_single_1", "-l", "320", "-n", "8",
               "--max-new-tokens", "24", "--out", str(out)]  # fmt: skip
    assert cli.run_cli(command) == EnvironmentProblem.exit_code
    rows = (out / "b" / "samples.jsonl").read_bytes()
    assert len(rows.splitlines()) == 3
    b.dies_after = None
    n_sent = len(a.requests)
    capsys.readouterr()
    assert cli.run_cli([*command, "--json", "--quiet"]) == cli.EXIT_CELLS_FAILED
    assert len(a.requests) == n_sent + 2 * 7, "A is probed again, and not asked again"
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "same_answers.json").read_text())
    assert printed["verdict"] == "different"
    assert len(printed["differing"]) == 8
    assert (out / "b" / "samples.jsonl").read_bytes().startswith(rows)
    assert cli.run_cli([*command, "--quiet"]) == cli.EXIT_CELLS_FAILED
    text = capsys.readouterr().out
    assert "same     0.0 % [0.0, 32.4] of B's answers are A's; of A's own, asked again, 100.0 %" in text
    assert "different: B changes 8 of 8 answers, A itself 0 (p = 0.0078, exact McNemar)" in text
    assert "and 3 more" in text


def test_prompts_that_one_does_not_answer_are_left_out(pair: tuple[Stub, Stub]) -> None:
    a, b = pair
    b.cut_from = 250
    with pytest.raises(UsageError, match=r"No prompt was answered in all three runs: request: the server counts 250"):
        asked(a, b)


@pytest.mark.parametrize("differs", [False, True])
def test_a_server_that_fails_on_some_prompts_is_not_the_same(
    pair: tuple[Stub, Stub], differs: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that it does answer may be the easy ones; what differs all the same is told."""
    a, b = pair
    real, n_asked = b.post, [0]

    def post(path: str, body: dict[str, Any]) -> Any:
        n_asked[0] += 1
        return (400, {}, json.dumps({"error": "no"})) if n_asked[0] in (8, 10) else real(path, body)

    b.post = post  # type: ignore[method-assign]
    if differs:
        b.answer = lambda text, asked: " no idea"
    command = ["same-answers", a.url, b.url, "--tokenizer", "reference", "-t", "niah_single_1", "-l", "320", "-n", "9",
               "--max-new-tokens", "24", "--quiet", "--out", str(tmp_path / "both")]  # fmt: skip
    assert cli.run_cli(command) == cli.EXIT_CELLS_FAILED
    last = capsys.readouterr().out.strip().splitlines()[-1]
    if differs:
        assert last.startswith("different: B changes 7 of 7 answers, A itself 0")
    else:
        assert last == (
            "inconclusive: 2 of 9 prompts were not answered in all three runs; of the others B changes 0 of 7 answers, "
            "A itself 0"
        )
    b.answer = lambda text, asked: needle(text)
    if not differs:
        assert cli.run_cli(command) == 0, "they are sent again"
        assert capsys.readouterr().out.strip().splitlines()[-1] == "same: all 9 answers of B are those of A"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"a": "reference", "b": "reference"}, "Neither of the two is a server's URL"),
        ({"tokenizer": None}, "say which the servers' model has"),
        ({"served_model_a": "other"}, "has no model 'other'"),
        ({"a": "reference", "served_model_a": "x"}, "'reference' is no server, so it has no name there"),
    ],
)
def test_bad_input(pair: tuple[Stub, Stub], change: dict[str, Any], said: str) -> None:
    a, b = (change.pop(name, stub.url) for name, stub in zip("ab", pair, strict=True))
    names = {key: change.pop(key, None) for key in ("served_model_a", "served_model_b")}
    with pytest.raises(UsageError, match=said):
        same_answers(a, b, **names, values={**ASKED, **change}, progress=False)
    assert pair[0].requests == pair[1].requests == []


def test_the_first_token_that_differs() -> None:
    tokenizer = reference_tokenizer()
    assert first_difference(tokenizer, "The grass is green", "The grass is blue")[1:] == (" green", " blue")
    n_tokens, a, b = first_difference(tokenizer, "The grass is", "The grass is green")
    assert (n_tokens, a, b) == (len(tokenizer("The grass is", add_special_tokens=False)["input_ids"]), "", " green")
