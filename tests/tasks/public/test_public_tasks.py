"""Public benchmarks from small files of their schema: prompts, cuts, scores, and the first fault by its record."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from tiny import MakeConfig
from tokenizer_kinds import KINDS

import kvscope
from kvscope import cli
from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.harness.passes.plan import make_plan
from kvscope.tasks.public import fetched
from kvscope.tasks.registry import create_task

CHOICE = {
    "_id": "66f36490821e116aacb2cc22",
    "domain": "Single-Document QA",
    "sub_domain": "Literary",
    "difficulty": "easy",
    "length": "short",
    "question": "Who keeps the light? ",
    "choice_A": "Ada",
    "choice_B": "Ben",
    "choice_C": "Cleo",
    "choice_D": "Dan",
    "answer": "B",
    "context": " ".join(f"Line {k} of the keeper's book says that the sea was calm." for k in range(60)),
}
CHATS = {
    "question_id": "e47becba",
    "question_type": "single-session-user",
    "question": "What degree did I graduate with?",
    "answer": "Business Administration",
    "question_date": "2023/05/30 (Tue) 23:40",
    "haystack_dates": ["2023/05/20 (Sat) 02:21", "2023/05/21 (Sun) 10:00"],
    "haystack_session_ids": ["sharegpt_1", "answer_1"],
    "haystack_sessions": [
        [{"role": "user", "content": "How is the weather?"}, {"role": "assistant", "content": "Calm."}],
        [
            {"role": "user", "content": "I graduated in Business Administration.", "has_answer": True},
            {"role": "assistant", "content": "Congratulations."},
        ],
    ],
    "answer_session_ids": ["answer_1"],
}
SAID = [
    {"role": "user", "content": "Write a poem about tapirs"},
    {"role": "assistant", "content": "Tapirs sleep by day."},
    {"role": "user", "content": "Write a poem about tapirs"},
    {"role": "assistant", "content": "Tapirs swim by night."},
    {"role": "user", "content": "Prepend aYooSG8CQg to the 2nd (1 indexed) poem about tapirs."},
]
REPEAT = {
    "prompt": json.dumps(SAID),
    "answer": "aYooSG8CQgTapirs swim by night.",
    "random_string_to_prepend": "aYooSG8CQg",
    "n_needles": 2,
    "desired_msg_index": 3,
    "total_messages": 5,
    "n_chars": 200,
}


def write(path: Path, *records: Any) -> str:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(list(records)), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(list(records)))
    return str(path)


def make(name: str, data: str, **options: Any) -> Any:
    return create_task({"name": name, "data": data, **options})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return KINDS["qwen"]()


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_a_choice_is_asked_in_lm_evals_words(ending: str, tmp_path: Path, tokenizer: Any) -> None:
    listed = {key: value for key, value in CHOICE.items() if not key.startswith("choice_")}
    listed |= {"choices": ["Ada", "Ben", "Cleo", "Dan"], "difficulty": "hard"}
    tasks = [make("longbench_v2", write(tmp_path / f"{at}.{ending}", each)) for at, each in enumerate((CHOICE, listed))]
    first, second = (task.build(tokenizer, length_tokens=4096, sample=0, seed=0) for task in tasks)
    assert first.text == second.text
    assert (first.question_type, second.question_type) == ("easy", "hard")
    assert "Who keeps the light?\nChoices:\n(A) Ada\n(B) Ben\n(C) Cleo\n(D) Dan" in first.text
    assert list(first.ids) == tokenizer(first.text)["input_ids"]
    assert (first.truncated_tokens, first.targets) == (0, ("B",))
    question = tokenizer.decode(first.ids[first.question_start :])
    assert "Who keeps the light?" in question
    assert "the sea was calm" not in question


@pytest.mark.parametrize("kind", ["qwen", "llama-2", "gemma"])
def test_a_longer_prompt_loses_its_middle(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind]()
    task = make("longbench_v2", write(tmp_path / "data.json", CHOICE), new_tokens=8)
    whole = task.build(tokenizer, length_tokens=8192, sample=0, seed=0)
    length_tokens = task.min_length_tokens(tokenizer) + 100
    assert length_tokens < len(whole.ids)
    cut = task.build(tokenizer, length_tokens=length_tokens, sample=0, seed=0)
    assert length_tokens - 8 - 4 <= len(cut.ids) <= length_tokens - 8
    assert cut.truncated_tokens == len(whole.ids) - len(cut.ids)
    assert list(cut.ids) == tokenizer(cut.text)["input_ids"]
    # As much of its beginning as of its end, which is the question and all choices.
    same = next(at for at, (a, b) in enumerate(zip(whole.ids, cut.ids, strict=False)) if a != b)
    assert abs(same - len(cut.ids) // 2) <= 4
    assert cut.text.split("</text>")[1] == whole.text.split("</text>")[1]
    assert cut.text.split("</text>")[0].rstrip().endswith("Line 59 of the keeper's book says that the sea was calm.")


@pytest.mark.parametrize(
    ("output", "score"),
    [
        ("The correct answer is (B).", 1.0),
        ("B", 1.0),
        (" (B) Ben", 1.0),
        ("I think.\nThe correct answer is: B", 1.0),
        ("The correct answer is (A), not (B)", 0.0),
        ("**The correct answer is** (B)", 1.0),
        ("The correct answer is **(B)**", 1.0),
        ("A close look shows that the correct answer is (B).", 1.0),
        ("A man with a beard, so\nB.", 1.0),
        ("Ben", 0.0),
        ("Because of B", 0.0),
        ("", 0.0),
    ],
)
def test_a_choice_counts_by_the_letter_it_names(output: str, score: float, tmp_path: Path, tokenizer: Any) -> None:
    task = make("longbench_v2", write(tmp_path / "data.json", CHOICE))
    assert task.score(task.build(tokenizer, length_tokens=4096, sample=0, seed=0), output) == score


def test_chats_have_their_dates_and_tell_where_the_answer_is(tmp_path: Path, tokenizer: Any) -> None:
    rubric = {
        **CHATS,
        "question_id": "b",
        "question_type": "single-session-preference",
        "answer": "They would like ...",
    }
    declined = {**CHATS, "question_id": "c_abs", "answer": "You did not say."}
    counted = {**CHATS, "question_id": "d", "question_type": "multi-session", "answer": 3}
    task = make("longmemeval_s", write(tmp_path / "s.json", CHATS, rubric, declined, counted))
    assert (task.n_samples, task.question_types) == (2, ("multi-session", "single-session-user"))
    made, other = (task.build(tokenizer, length_tokens=4096, sample=at, seed=0) for at in (0, 1))
    assert "Chat of 2023/05/21 (Sun) 10:00\nUser: I graduated in Business Administration.\n" in made.text
    [(start, end)] = made.evidence_spans
    assert tokenizer.decode(made.ids[start:end]).strip().startswith("Chat of 2023/05/21")
    assert made.depth == pytest.approx(0.5, abs=0.3)
    assert task.score(made, "It was Business Administration") == pytest.approx(2 * 2 / 6)
    assert (other.targets, task.score(other, "3")) == (("3",), 1.0)
    with pytest.raises(UsageError, match=r"Question 1 of longmemeval_s has .* use a larger --length"):
        task.build(tokenizer, length_tokens=160, sample=0, seed=0)


def test_a_message_may_say_nothing(tmp_path: Path, tokenizer: Any) -> None:
    silent = {"role": "assistant", "content": ""}
    chats = {**CHATS, "haystack_sessions": [[silent], *CHATS["haystack_sessions"][1:]]}  # type: ignore[index]
    repeat = {**REPEAT, "prompt": json.dumps([silent, *SAID])}
    for name, record in (("longmemeval_s", chats), ("mrcr", repeat)):
        task = make(name, write(tmp_path / f"{name}.json", record))
        assert "Assistant: \n" in task.build(tokenizer, length_tokens=4096, sample=0, seed=0).text


def test_a_reply_is_repeated_and_scored_as_the_dataset_says(tmp_path: Path, tokenizer: Any) -> None:
    longer = {**REPEAT, "n_needles": 4, "n_chars": 900}
    path = write(tmp_path / "2needle.parquet", REPEAT, longer)
    task = make("mrcr", path)
    assert (task.n_samples, task.question_types) == (2, ("2_needles", "4_needles"))
    assert make("mrcr", path, needles=4).n_samples == make("mrcr", path, most_chars=200).n_samples == 1
    made = task.build(tokenizer, length_tokens=4096, sample=0, seed=0)
    assert made.text.endswith("poem about tapirs.\n\nAssistant:")
    [(start, end)] = made.evidence_spans
    assert "Tapirs swim by night." in tokenizer.decode(made.ids[start:end])
    assert task.score(made, " aYooSG8CQgTapirs swim by night.") == 1.0
    assert task.score(made, "Tapirs swim by night.") == 0.0
    assert 0.5 < task.score(made, "aYooSG8CQgTapirs sleep by day.") < 1.0
    with pytest.raises(UsageError, match="No conversation of mrcr has needles=8"):
        make("mrcr", path, needles=8)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("longbench_v2", json.dumps([CHOICE, {**CHOICE, "answer": "E"}]), "Record 2 of .*answer"),
        ("longbench_v2", json.dumps([{k: v for k, v in CHOICE.items() if k != "choice_C"}]), "choice_C is missing"),
        ("longbench_v2", json.dumps([{**CHOICE, "context": ""}]), "Record 1 of .*context"),
        ("longbench_v2", "[1, 2", "is not JSON"),
        ("longbench_v2", json.dumps(CHOICE) + "\nno\n", "Line 2 of .* is not JSON"),
        ("longbench_v2", "[]", "holds no question"),
        ("longmemeval_s", json.dumps([{**CHATS, "haystack_dates": ["2023"]}]), "differ in length"),
        ("longmemeval_s", json.dumps([{**CHATS, "question_id": "x_abs"}]), "without a judge"),
        ("mrcr", json.dumps([{**REPEAT, "prompt": "[{]"}]), "prompt is no JSON list of messages"),
        ("mrcr", json.dumps([{**REPEAT, "prompt": "[]"}]), "Record 1 of .*prompt"),
        ("mrcr", json.dumps([{**REPEAT, "prompt": SAID[:-1]}]), "the last message of prompt is not the user's"),
        ("mrcr", json.dumps([{**REPEAT, "random_string_to_prepend": "x"}]), "does not begin with random_string_to_"),
        ("longbench_v2", json.dumps([CHOICE, CHOICE]), "Records 1 and 2 of longbench_v2 are one question, '66f3"),
        ("longmemeval_s", json.dumps([CHATS, CHATS]), "Records 1 and 2 of longmemeval_s are one question"),
        ("longmemeval_s", json.dumps([{**CHATS, "question_type": "preference"}]), "question_type: Input should be "),
        ("longmemeval_s", json.dumps([{**CHATS, "answer": None}]), "benchmark: answer: Input should be a valid string"),
        ("longmemeval_s", json.dumps([{**CHATS, "answer": True}]), "benchmark: answer: Input should be a valid string"),
        (
            "longmemeval_s",
            json.dumps([{**CHATS, "answer": ["a"]}]),
            "benchmark: answer: Input should be a valid string",
        ),
    ],
)
def test_the_first_fault_is_told_by_its_place(name: str, text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=said) as raised:
        make(name, str(path))
    assert "\n" not in str(raised.value)


def test_what_is_no_file_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="There is no file"):
        make("mrcr", str(tmp_path / "gone.parquet"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match="is no Parquet file"):
        make("mrcr", str(tmp_path / "bad.parquet"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"`kvscope tasks fetch mrcr` brings it, or give a file as mrcr:data=FILE"):
        create_task("mrcr")


def test_a_run_counts_what_was_cut(small: MakeConfig, tmp_path: Path) -> None:
    path = write(tmp_path / "data.json", CHOICE, {**CHOICE, "_id": "2", "context": "The keeper is Ben."})
    run = kvscope.run(small(tasks=[f"longbench_v2:data={path},new_tokens=8"], lengths_tokens=[768]), progress=False)
    assert set(run.samples["status"]) == {"ok"}
    cut = run.samples.groupby("sample")["truncated_tokens"].first().tolist()
    assert cut[0] > 0
    assert cut[1] == 0


def test_fetching_brings_the_files_that_the_task_then_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    listed = ["README.md", "2needle/2needle_0.parquet", "4needle/4needle_0.parquet"]

    def download(dataset: str, file: str, *, repo_type: str, local_dir: Path, revision: None) -> None:
        assert (dataset, repo_type) == ("openai/mrcr", "dataset")
        (local_dir / file).parent.mkdir(parents=True)
        write(local_dir / file, {**REPEAT, "n_needles": int(file[0])})

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, dataset, repo_type, revision: listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert cli.run_cli(["tasks", "fetch", "mrcr"]) == 0
    assert "task     mrcr: 2 prompts, --task mrcr" in capsys.readouterr().out
    assert create_task("mrcr").question_types == ("2_needles", "4_needles")


def test_without_a_network_fetching_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def fails(*args: Any, **kwargs: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fails)
    with pytest.raises(EnvironmentProblem, match=r"Network is unreachable.*data=FILE"):
        fetched.fetch("longbench_v2")
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda self, dataset, repo_type, revision: ["README.md"]
    )
    with pytest.raises(EnvironmentProblem, match=r"has no file data\.json any more"):
        fetched.fetch("longbench_v2")
    with pytest.raises(UsageError, match="Did you mean 'mrcr'"):
        fetched.fetch("mrrc")


def test_a_prompt_too_long_is_refused_by_the_plan_wherever_it_stands(small: MakeConfig, tmp_path: Path) -> None:
    dense = [{**SAID[1], "content": "1234567890!@#$%^&*" * 28}, *SAID]  # few characters, many tokens
    plain = [{**SAID[1], "content": "the word " * 60}, *SAID]
    records = [{**REPEAT, "prompt": json.dumps(plain), "n_chars": 9000}] * 40 + [
        {**REPEAT, "prompt": json.dumps(dense)}
    ]
    data = write(tmp_path / "data.jsonl", *records)
    with pytest.raises(UsageError, match=r"Question 41 of mrcr has .* use a larger --length"):
        make_plan(small(tasks=[f"mrcr:data={data},new_tokens=8"], lengths_tokens=[300], samples=41))


@pytest.mark.parametrize("form", ["BOM", "BOM of lines", "CRLF", "blank lines", "gzip", "xz", "Parquet", "PARQUET"])
def test_files_as_they_are_found(form: str, tmp_path: Path) -> None:
    """A download without its ending, an editor's BOM, and a compressed file are the same questions."""
    record = {key: value for key, value in CHOICE.items() if key != "_id"}
    listed, line = json.dumps([record, record]).encode(), json.dumps(record).encode()
    path = tmp_path / ("data.PARQUET" if form == "PARQUET" else "data")
    if form.lower() == "parquet":
        parquet.write_table(pa.Table.from_pylist([record, record]), path)
    else:
        path.write_bytes(
            {
                "BOM": b"\xef\xbb\xbf" + listed,
                "BOM of lines": b"\xef\xbb\xbf" + line + b"\n" + line,
                "CRLF": line + b"\r\n" + line + b"\r\n",
                "blank lines": b"\n" + line + b"\n\n" + line + b"\n \n",
                "gzip": gzip.compress(listed),
                "xz": lzma.compress(line + b"\n" + line),
            }[form]
        )
    assert make("longbench_v2", str(path)).n_samples == 2


@pytest.mark.parametrize("packed", [gzip.compress(b"[]" * 400), lzma.compress(b"[]" * 400)], ids=["gzip", "xz"])
def test_a_compressed_file_that_was_cut(packed: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(packed[:-9])
    with pytest.raises(UsageError, match="is no whole compressed file"):
        make("mrcr", str(tmp_path / "data.json"))


def test_a_number_is_an_answer(tmp_path: Path) -> None:
    task = make("longmemeval_s", write(tmp_path / "data.json", {**CHATS, "answer": 3.5}))
    assert task.targets_of(task._questions[0]) == ("3.5",)


def test_a_benchmark_that_was_fetched_in_part_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three files would be another benchmark under the same name."""
    import huggingface_hub

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    listed, out_of_reach = ["2needle_0.parquet", "4needle_0.parquet"], ["4needle_0.parquet"]

    def download(dataset: str, file: str, *, repo_type: str, local_dir: Path, revision: None) -> None:
        if file in out_of_reach:
            raise OSError("the line is down")
        local_dir.mkdir(parents=True, exist_ok=True)
        write(local_dir / file, {**REPEAT, "n_needles": int(file[0])})

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, dataset, repo_type, revision: listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(EnvironmentProblem, match="the line is down"):
        fetched.fetch("mrcr")
    with pytest.raises(UsageError, match=r"is not here whole: `kvscope tasks fetch mrcr` brings it"):
        create_task("mrcr")
    out_of_reach.clear()
    fetched.fetch("mrcr")
    assert create_task("mrcr").n_samples == 2
    (fetched.fetched_folder("mrcr") / "2needle_0.parquet").unlink()
    with pytest.raises(UsageError, match="is not here whole"):
        create_task("mrcr")


@pytest.mark.parametrize(("name", "record"), [("longbench_v2", CHOICE), ("longmemeval_s", CHATS), ("mrcr", REPEAT)])
def test_a_footprint_has_exactly_the_length_it_names(name: str, record: Any, tmp_path: Path, tokenizer: Any) -> None:
    """A benchmark's prompt may be shorter: its beginning then stands there again, and its question last."""
    task = make(name, write(tmp_path / "data.json", record), new_tokens=8)
    shortest = len(task.build(tokenizer, length_tokens=8192, sample=0, seed=0).ids)
    for prompt_tokens in (shortest, shortest + 1, 3 * shortest, 8000):
        ids, question_start = task.fill(tokenizer, prompt_tokens=prompt_tokens, seed=0)
        made = task.build(tokenizer, length_tokens=prompt_tokens + 8, sample=0, seed=0)
        assert len(ids) == prompt_tokens
        assert ids[: made.question_start] == made.ids[: made.question_start]
        assert ids[question_start:] == made.ids[made.question_start :]


def test_a_long_prompt_that_is_not_asked_is_no_reason_to_refuse(small: MakeConfig, tmp_path: Path) -> None:
    longer = {**REPEAT, "prompt": json.dumps([{**SAID[1], "content": "the word " * 900}, *SAID])}
    data = write(tmp_path / "data.jsonl", REPEAT, longer)
    spec = f"mrcr:data={data},new_tokens=8"
    assert make_plan(small(tasks=[spec], lengths_tokens=[300], samples=1)).cells
    with pytest.raises(UsageError, match="Length 300 is too short for task 'mrcr'"):
        make_plan(small(tasks=[spec], lengths_tokens=[300], samples=2))
