"""Answers in the terminal: which prompts are chosen, what is said of each, and texts that are built again."""

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic_rows import Rows, make_rows

from kvscope.cli import run_cli
from kvscope.harness.engine.loading import load_config, load_tokenizer
from kvscope.harness.engine.names import resolve_model
from kvscope.reports.samples import marked
from kvscope.results.run_schema import RunPart
from kvscope.results.store import RunStore
from kvscope.tasks.measured import Places
from kvscope.tasks.registry import create_task

TASK = "niah_single_1"
LENGTH = 1024


def stored(folder: Path, rows: Rows) -> str:
    with RunStore.create(folder, rows[2]) as store:
        store.begin()
        for row in rows[0]:
            store.append_sample(row)
    return str(folder)


def rows_of(scores: dict[str, list[float | None]]) -> Rows:
    """A run of one task and length with these scores; None is an answer that ran out of memory."""
    n = len(next(iter(scores.values())))
    rows, _, info = make_rows(list(scores), tasks=(TASK,), lengths=(LENGTH,), samples=n, footprint_lengths=())
    none = {"status": "oom", "reason": "no memory", "output": None, "score": None}
    made = []
    for row in rows:
        score = scores[row.method][row.sample]
        made.append(row.model_copy(update=none if score is None else {"score": score}))
    return made, [], info


@pytest.fixture
def run(tmp_path: Path) -> str:
    return stored(tmp_path, rows_of({"dense": [1, 1, 0, 1], "recency": [0, 1, 0, None], "random": [0.5, 1, 1, 1]}))


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ([], [0, 1, 2, 3]),
        (["--failed"], [0, 2, 3]),
        (["--failed", "-m", "random"], [0]),
        (["--differs-from", "dense"], [0, 2, 3]),
        (["--differs-from", "dense", "-m", "recency"], [0, 3]),
        (["--differs-from", "dense", "--failed", "-m", "random"], [0]),
        (["--task", TASK, "--length", "1k", "--limit", "2"], [0, 1]),
    ],
)
def test_prompts_are_chosen(
    run: str, options: list[str], samples: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(["samples", run, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [prompt["sample"] for prompt in found["prompts"]] == samples
    assert run_cli(["samples", run, *options]) == 0
    assert f"{len(samples)} of {found['n_found']} prompts are shown." in capsys.readouterr().out


def test_the_text_says_targets_answers_and_scores(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["samples", run, "--differs-from", "dense", "-m", "recency"]) == 0
    first, second, _ = capsys.readouterr().out.split("\n\n")
    lines = [line.split() for line in first.splitlines()]
    assert lines[1] == ["targets", '"1000000"']
    assert [line[:2] for line in lines[2:]] == [["dense", "1"], ["recency", "0"]]
    assert second.splitlines()[-1].split() == ["recency", "oom", "no", "memory"]
    assert run_cli(["samples", run, "-m", "dense", "--failed", "--differs-from", "dense"]) == 0
    assert capsys.readouterr().out == "No prompt of the run is like that.\n"


def test_what_a_model_wrote_does_not_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of({"dense": [1.0]})
    hostile = rows[0][0].model_copy(update={"output": "a\x1b[2J\nb", "targets": ("\u202ex",)})
    assert run_cli(["samples", stored(tmp_path, ([hostile], [], rows[2]))]) == 0
    out = capsys.readouterr().out
    assert r'"a\x1b[2J\nb"' in out
    assert r'"\u202ex"' in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-m", "recencie"], "has no method 'recencie'. Did you mean 'recency'?"),
        (["--differs-from", "quest"], "has no method 'quest'"),
        (["-t", "vt"], "has no task 'vt'"),
        (["-l", "2k"], "has no length '2K'"),
        (["-l", "many"], "'many' is not a length"),
        (["--prompt"], "sample 0, cannot be shown: its row has hash"),
        (["--prompt", "--model", "preset:llama-3.1-8b"], "has no tokenizer"),
    ],
)
def test_bad_input_is_one_sentence(
    run: str, options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(["samples", run, *options]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err


def test_texts_are_built_again_in_a_merged_run_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer("reference", resolve_model("reference")[0], load_config("reference"))
    task = create_task(TASK)
    prompts = [task.build(tokenizer, length_tokens=LENGTH, sample=n, seed=seed) for seed in (5, 6) for n in (0, 1)]
    rows, _, info = rows_of({"dense": [1.0, 1.0, 1.0, 1.0]})
    made = [
        row.model_copy(update={"prompt_sha256": prompt.prompt_sha256, "seed": prompt.seed, "targets": prompt.targets})
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    part = RunPart(tasks=(TASK,), lengths_tokens=(LENGTH,), samples=4, seeds=(5, 6))
    folder = stored(tmp_path, (made, [], info.model_copy(update={"parts": (part,)})))
    assert run_cli(["samples", folder, "--prompt", "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["prompts"]
    assert [prompt["text"] for prompt in found] == [prompt.text for prompt in prompts]
    for prompt in found:
        ((start, end),) = prompt["evidence"]
        assert prompt["targets"][0] in prompt["text"][start:end]
    assert run_cli(["samples", folder, "--prompt", "--limit", "1"]) == 0
    out = capsys.readouterr().out
    assert prompts[0].targets[0] in out[out.index(">>>") : out.index("<<<")]


def test_marks_stand_around_the_evidence_and_gaps_are_counted() -> None:
    text = "".join(chr(ord("a") + place % 26) for place in range(2000))
    shown = marked(text, [(1000, 1010), (1010, 1020)])
    assert f">>>{text[1000:1010]}<<<>>>{text[1010:1020]}<<<" in shown
    assert shown.startswith(text[:160])
    assert shown.endswith(text[-160:])
    assert shown.count("characters]") == 2
    assert marked("short", [(0, 5)]) == ">>>short<<<"


class Spelling:
    """A tokenizer in Python: a token a word, and no offsets."""

    is_fast = False

    def decode(self, ids: list[int], **_: Any) -> str:
        return ["one", " two", " three"][ids[0]]


def test_characters_of_tokens_without_offsets() -> None:
    text = "one  two three"
    places = Places(Spelling(), text, (0, 1, 2))  # type: ignore[arg-type]
    assert [text[slice(*places.characters(at, at + 1))] for at in range(3)] == ["one", "two", "three"]
