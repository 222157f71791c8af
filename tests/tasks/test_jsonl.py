"""jsonl: prompts of a file, as they are; the first fault by its line."""

import bz2
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvscope.errors import UsageError
from kvscope.tasks.answers import contains_any_score, exact_score, f1_score
from kvscope.tasks.base import Task
from kvscope.tasks.registry import create_task

GOOD = {"prompt": "One plus one is", "answers": ["2", "two"]}
ASKED = {"context": "Ada lives in Rome.", "question": "Where? In", "answers": "Rome", "id": 1, "metric": "f1"}


class Letters:
    """A tokenizer of one token a letter, after a first one of its own."""

    name_or_path = "letters"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, texts: list[str], *, add_special_tokens: bool = True) -> dict[str, list[list[int]]]:
        self.calls += 1
        return {"input_ids": [[0] * add_special_tokens + [ord(letter) for letter in text] for text in texts]}

    def decode(self, token_ids: Any, **kwargs: Any) -> str:
        return "".join(chr(each) for each in token_ids[1:])


def write(path: Path, *lines: Any) -> Path:
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(texts) + b"\n")
    return path


def make(path: Path, **options: Any) -> Task:
    return create_task({"name": "jsonl", "data": str(path), **options})


def test_prompts_are_the_files_in_its_order(tmp_path: Path) -> None:
    task = make(write(tmp_path / "my questions.jsonl", GOOD, ASKED))
    assert (task.name, task.n_samples, task.question_types) == ("jsonl:my_questions", 2, ("string_match_all", "f1"))
    first, second = (task.build(Letters(), length_tokens=200, sample=index, seed=5) for index in (0, 1))
    assert first.text == GOOD["prompt"]
    assert first.question_start == len(first.ids) - 1
    assert second.text == "Ada lives in Rome.\n\nWhere? In"
    assert Letters().decode((0, *second.ids[second.question_start :])) == "Where? In"
    assert (second.length_tokens, second.targets, second.question_type) == (200, ("Rome",), "f1")
    assert (task.score(first, "It is two, or 2"), task.score(second, "in rome")) == (1.0, pytest.approx(2 / 3))


def test_short_and_long_forms_are_one_task(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", GOOD)
    short, long = create_task(f"jsonl:{path},metric=f1"), create_task(f"jsonl:metric=f1,data={path}")
    assert short.question_types == long.question_types == ("f1",)
    comma = write(tmp_path / "a,b.jsonl", GOOD)
    assert create_task(f'jsonl:"{comma}",label=commas').name == "jsonl:commas"


def test_a_length_holds_the_longest_prompt_or_is_refused(tmp_path: Path) -> None:
    task = make(write(tmp_path / "q.jsonl", GOOD, {"prompt": "x" * 99, "answers": "y"}), new_tokens=10)
    assert task.min_length_tokens(Letters()) == 110
    assert task.least_length_tokens(Letters(), samples=1) < 100, "the long one is not asked"
    assert len(task.build(Letters(), length_tokens=110, sample=1, seed=0).ids) == 100
    with pytest.raises(UsageError, match=r"Line 2 of jsonl:q has 100 tokens"):
        task.build(Letters(), length_tokens=109, sample=1, seed=0)


def test_prompts_are_encoded_once(tmp_path: Path) -> None:
    task, letters = make(write(tmp_path / "q.jsonl", *([GOOD] * 70))), Letters()
    task.min_length_tokens(letters)
    made = [task.build(letters, length_tokens=90, sample=index, seed=0).ids for index in (0, 69)]
    assert letters.calls == 2
    assert made[0] == made[1] == (0, *map(ord, GOOD["prompt"]))


def test_what_ends_an_answer_is_chosen(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, {**GOOD, "answers": "a\nb"})
    for stop, expected in (("line", [("\n",), ()]), ("none", [(), ()])):
        task = make(path, stop=stop)
        assert [task.build(Letters(), length_tokens=90, sample=at, seed=0).stop for at in (0, 1)] == expected


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_a_compressed_file_is_the_file(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    plain = write(tmp_path / "my.questions.jsonl", GOOD, ASKED)
    packed = tmp_path / f"my.questions.jsonl{'.gz' if pack is gzip.compress else '.xz'}"
    packed.write_bytes(pack(plain.read_bytes()))
    tasks = [make(path) for path in (plain, packed)]
    assert len({task.data_sha256 for task in tasks}) == len({task.name for task in tasks}) == 1
    built = [task.build(Letters(), length_tokens=200, sample=1, seed=0) for task in tasks]
    assert built[0] == built[1]
    for damaged in (packed.read_bytes()[:-9], packed.read_bytes()[:40] + b"x" * 40, b"no such thing", b"\x1f\x8b"):
        packed.write_bytes(damaged)
        with pytest.raises(UsageError, match=rf"is no whole \{packed.suffix} file \(.+\): bring it here again"):
            make(packed)


def test_a_packed_file_of_another_name_is_told_so(tmp_path: Path) -> None:
    plain = write(tmp_path / "mine.jsonl", GOOD, ASKED).read_bytes()
    for pack in (gzip.compress, lzma.compress, bz2.compress):
        path = write(tmp_path / f"{pack.__module__}.jsonl", GOOD)
        path.write_bytes(pack(plain))
        with pytest.raises(UsageError, match=r"begins as a packed file does: unpack it"):
            make(path)
    path = tmp_path / "MINE.JSONL.GZ"
    path.write_bytes(gzip.compress(plain))
    assert make(path).name == "jsonl:MINE"


def test_memory_prompts_have_exactly_the_length(tmp_path: Path) -> None:
    task = make(write(tmp_path / "q.jsonl", GOOD))
    ids, question_start = task.fill(Letters(), prompt_tokens=50, seed=0)
    assert (len(ids), question_start) == (50, 49)
    assert ids[: len(GOOD["prompt"])] == ids[len(GOOD["prompt"]) + 1 :][: len(GOOD["prompt"])]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"", "is empty"),
        (b"   ", "is empty"),
        (b"{", "is not JSON: Expecting property name"),
        (b"[" * 100_000, "is not JSON: too deep or large"),
        (b"9" * 5000, "is not JSON: too deep or large"),
        (b'{"prompt": "\xff"}', "is not UTF-8 text (byte 13)"),
        (b'{"prompt": "a", "prompt": "b", "answers": "c"}', "has the key 'prompt' twice"),
        ([1], "is [1], expected a JSON object"),
        ({"answers": "a"}, "lacks 'prompt', or 'context' and 'question'"),
        ({"question": "q", "answers": "a"}, "lacks 'context'"),
        ({"context": "c", "answers": "a"}, "lacks 'prompt', or 'context' and 'question'"),
        ({**ASKED, "id": 9, "prompt": "p"}, "has 'prompt' beside 'context' or 'question'"),
        ({"prompt": "p"}, "lacks 'answers'"),
        ({**GOOD, "answers": []}, "has no answer in 'answers'"),
        ({**GOOD, "answers": [""]}, "has an empty 'answers'"),
        ({**GOOD, "answers": 5}, "has 5 as 'answers', expected text"),
        ({**GOOD, "answers": ["a", None]}, "has None as 'answers', expected text"),
        ({**GOOD, "prompt": 5}, "has 5 as 'prompt', expected text"),
        ({**GOOD, "prompt": " \n"}, "has an empty 'prompt'"),
        ({**GOOD, "prompt": "\ud800"}, "has half a character"),
        ({**GOOD, "metric": "f2"}, "has the metric 'f2', expected one of string_match_all, "),
        ({**GOOD, "answer": "a"}, "which means nothing here (put it under 'meta'). Did you mean 'answers'?"),
        ({**GOOD, "id": True}, "has the id True, expected text or a whole number"),
        ({**GOOD, "id": "1"}, "has the id '1' of line 1 again"),
    ],
)
def test_the_first_fault_is_told_by_its_line(tmp_path: Path, line: Any, fault: str) -> None:
    path = write(tmp_path / "q.jsonl", ASKED, line, b"{")
    with pytest.raises(UsageError) as caught:
        make(path)
    text = str(caught.value)
    assert text.startswith(f"Line 2 of '{path}' ")
    assert fault in text
    assert "\n" not in text
    assert "?." not in text
    assert len(text) < 400


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "none.jsonl").touch()
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    for name, fault in (
        ("gone", "There is no file"),
        ("pipe", "is not a regular file"),
        (".", "is not a regular file"),
        ("none.jsonl", "holds no prompt"),
        ("bom.jsonl", "Line 1 of .* begins with a byte order mark"),
    ):
        with pytest.raises(UsageError, match=fault):
            make(tmp_path / name)


def test_a_line_that_is_too_long_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvscope.tasks.jsonl_file.MOST_LINE_BYTES", 1024**2)
    path = write(tmp_path / "q.jsonl", GOOD, {**GOOD, "meta": "x" * 2 * 1024**2})
    with pytest.raises(UsageError, match=r"Line 2 of .* is longer than 1 MiB"):
        make(path)


@pytest.mark.parametrize(
    ("spec", "fault"),
    [
        ("jsonl", "Task jsonl needs data: write jsonl:data="),
        ("jsonl:{file},metric=bleu", "option 'metric' expects 'string_match_all', "),
        ("jsonl:{file},new_tokens=0", "new_tokens must be at least 1, got 0"),
        ("jsonl:{file},samples=3", "has no option 'samples'"),
    ],
)
def test_options_that_are_none_are_refused(tmp_path: Path, spec: str, fault: str) -> None:
    path = write(tmp_path / "q.jsonl", GOOD)
    with pytest.raises(UsageError) as caught:
        create_task(spec.format(file=path))
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("score", "targets", "output", "value"),
    [
        (contains_any_score, ("Rome", "Paris"), "in paris.", 1.0),
        (contains_any_score, ("Rome",), "Milan", 0.0),
        (exact_score, ("The Rome",), " rome. ", 1.0),
        (exact_score, ("Rome",), "in Rome", 0.0),
        (f1_score, ("a b c d", "x"), "b c", pytest.approx(4 / 5)),
        (f1_score, ("x",), "", 0.0),
    ],
)
def test_metrics(score: Any, targets: tuple[str, ...], output: str, value: float) -> None:
    assert score(targets, output) == value
