"""RULER's question answering from small files of SQuAD's and HotpotQA's form: prompts, lengths, scores, faults."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import MakeConfig
from tokenizer_kinds import KINDS

import kvscope
from kvscope import cli
from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.harness.passes.plan import make_plan
from kvscope.tasks.public import fetched, ruler_qa
from kvscope.tasks.public.lm_eval_files import lm_eval_text
from kvscope.tasks.public.ruler_qa_data import hotpot, squad
from kvscope.tasks.registry import create_task

THINGS = ("lamp", "anchor", "kettle", "ladder", "mirror", "basket", "violin", "saddle")
TOWNS = ("Aberly", "Brinton", "Calder", "Dunmore", "Elswick", "Farley", "Garston", "Holt")
NAMES = ("ruler_qa_squad", "ruler_qa_hotpot")


def paragraph(article: int, k: int) -> dict[str, Any]:
    town, thing = TOWNS[article], THINGS[k]
    context = f"The {thing} of {town} was made in {1700 + 10 * article + k}. " + f"Many saw the {thing} there. " * (
        k % 4
    )
    if k == 2:
        context += " Its maker signed it {so}, as {0} does."
    made = {"text": str(1700 + 10 * article + k), "answer_start": 0}
    asked = {
        "id": f"{article}-{k}",
        "question": f"When was the {thing} of {town} made?" + " " * (k == 5),  # some end so in SQuAD, too
        "answers": [made, {"text": f"in {made['text']}", "answer_start": 0}, made],
        "is_impossible": False,
    }
    never = {"id": f"{article}-{k}-x", "question": f"Who sold the {thing}?", "answers": [], "is_impossible": True}
    return {"context": context.strip(), "qas": [asked, never] if k % 2 else [never, asked]}


def squad_values() -> dict[str, Any]:
    articles = [{"title": TOWNS[a], "paragraphs": [paragraph(a, k) for k in range(8)]} for a in range(8)]
    return {"version": "v2.0", "data": articles}


def hotpot_record(at: int) -> dict[str, Any]:
    """A question with three documents of its own; two of them hold what it needs."""
    thing, first, second = THINGS[at], TOWNS[at], TOWNS[(at + 3) % 8]
    return {
        "_id": f"5a8b{at}",
        "question": f"Is the {thing} of {first} older than {second}?",
        "answer": "yes" if at % 2 else f"The {thing}",
        "type": "comparison",
        "level": "hard",
        "supporting_facts": [[f"{thing} of {first}", 0], [second, 1]],
        "context": [
            [second, [f"{second} is a town.", f" It is {at + 2} centuries old.", ""]],
            [f"Street of {thing}s", [f"A street where {thing}s are sold."]],
            [f"{thing} of {first}", [f"The {thing} is very old.", f" It stands in {first}, by the sea."]],
        ],
    }


def hotpot_values() -> list[dict[str, Any]]:
    return [hotpot_record(at) for at in range(8)]


VALUES: dict[str, Callable[[], Any]] = {"ruler_qa_squad": squad_values, "ruler_qa_hotpot": hotpot_values}


def write(folder: Path, name: str, values: Any = None) -> str:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(VALUES[name]() if values is None else values))
    return str(path)


def make(folder: Path, name: str, values: Any = None, **options: Any) -> Any:
    return create_task({"name": name, "data": write(folder, name, values), **options})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return KINDS["qwen"]()


def documents_of(text: str) -> list[str]:
    """Return a prompt's documents in their order, and check that they are numbered from 1."""
    body = text.split("given documents.\n\n", 2)[1].split("\n\nAnswer the question")[0]
    found = [re.fullmatch(r"Document (\d+):\n(.*)", part, re.DOTALL) for part in body.split("\n\n")]
    assert [int(each[1]) for each in found if each] == list(range(1, len(found) + 1))
    return [each[2] for each in found if each]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length_tokens", [512, 1024, 16384])
def test_a_prompt_is_what_lm_eval_makes_of_the_same_documents(
    name: str, length_tokens: int, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.utils import maybe_delimit
    from lm_eval.tasks.ruler import qa_utils

    monkeypatch.setattr(
        qa_utils, "random", SimpleNamespace(Random=lambda seed: SimpleNamespace(shuffle=lambda x: None))
    )
    values = VALUES[name]()
    monkeypatch.setattr(qa_utils, "download_json", lambda url: values)
    read = qa_utils.read_squad if name == "ruler_qa_squad" else qa_utils.read_hotpotqa
    qas, docs = read.__wrapped__()
    task = make(tmp_path, name)
    assert (task.n_samples, list(task._documents)) == (len(qas), docs)
    for sample in (0, 5):
        made = task.build(tokenizer, length_tokens=length_tokens, sample=sample, seed=3)
        placed = documents_of(made.text)
        text, answers = qa_utils.generate_input_output(sample, len(placed), qas=qas, docs=placed)
        assert made.text == maybe_delimit(text, "Answer:")
        assert list(made.targets) == answers
        assert not made.text.endswith("  Answer:")
        own = [docs[index] for index in qas[sample]["context"]]
        assert set(own) <= set(placed)
        assert made.stop == ()


@pytest.mark.parametrize("name", NAMES)
def test_as_many_documents_as_lm_eval_places(
    name: str, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all documents have one length, the draw does not matter: the counts are lm-eval's at every length."""
    from lm_eval.tasks.ruler import qa_utils

    values = VALUES[name]()
    if name == "ruler_qa_squad":
        for article in values["data"]:
            for k, each in enumerate(article["paragraphs"]):
                each["context"] = f"{article['title']} {THINGS[k]}" + " and so on" * 12
    task = make(tmp_path, name, values)
    monkeypatch.setattr(qa_utils, "download_json", lambda url: values)
    read = qa_utils.read_squad if name == "ruler_qa_squad" else qa_utils.read_hotpotqa
    qas, docs = read.__wrapped__()
    seen = set()
    for length_tokens in (300, 600, 950, 1300, 2300, 9000):
        theirs = qa_utils.generate_samples(tokenizer, docs, qas, length_tokens, num_samples=6)
        for sample in range(6):
            made = task.build(tokenizer, length_tokens=length_tokens, sample=sample, seed=0)
            count = len(documents_of(made.text))
            assert count == theirs[sample]["input"].count("Document ")
            seen.add(count)
    assert len(seen) >= 3


@pytest.mark.parametrize("kind", ["qwen", "llama-2", "gemma"])
@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_is_over_its_length_and_nothing_is_cut(name: str, kind: str, tmp_path: Path) -> None:
    tokenizer, task = KINDS[kind](), make(tmp_path, name)
    least_tokens = task.min_length_tokens(tokenizer)
    counts = []
    for length_tokens in (least_tokens, 700, 1000, 1500, 3000):
        for sample in range(4):
            made = task.build(tokenizer, length_tokens=length_tokens, sample=sample, seed=1)
            assert len(made.ids) + 32 <= length_tokens
            assert list(made.ids) == tokenizer(made.text)["input_ids"]
            assert made.truncated_tokens == 0
            placed = documents_of(made.text)
            assert len(set(placed)) == len(placed)
            assert set(placed) <= set(task._documents)
            counts.append(len(placed))
    for sample in range(task.n_samples):
        task.build(tokenizer, length_tokens=least_tokens, sample=sample, seed=1)
    assert min(counts) == len(task._questions[0].own)
    assert max(counts) > 10
    assert min(counts) < max(counts)


def test_the_evidence_is_the_documents_that_answer(tmp_path: Path, tokenizer: Any) -> None:
    made = make(tmp_path, "ruler_qa_squad").build(tokenizer, length_tokens=1024, sample=9, seed=0)
    [(start, end)] = made.evidence_spans
    assert "The anchor of Brinton was made in 1711." in tokenizer.decode(made.ids[start:end])
    assert tokenizer.decode(made.ids[made.question_start :]).strip().endswith("Answer:")
    assert "Document" not in tokenizer.decode(made.ids[made.question_start :])
    made = make(tmp_path, "ruler_qa_hotpot").build(tokenizer, length_tokens=512, sample=1, seed=0)
    found = " ".join(tokenizer.decode(made.ids[start:end]) for start, end in made.evidence_spans)
    assert len(made.evidence_spans) == 2
    assert "It stands in Brinton" in found
    assert "3 centuries" in found
    bare = [{key: value for key, value in each.items() if key != "supporting_facts"} for each in hotpot_values()]
    unknown = make(tmp_path, "ruler_qa_hotpot", bare).build(tokenizer, length_tokens=512, sample=1, seed=0)
    assert (unknown.text, unknown.evidence_spans, unknown.depth) == (made.text, (), None)


def test_documents_of_the_article_come_first(tmp_path: Path, tokenizer: Any) -> None:
    """As in RULER: those about something else come when the article's are all there."""
    task = make(tmp_path, "ruler_qa_squad")
    for length_tokens in (420, 1024, 16384):
        placed = documents_of(task.build(tokenizer, length_tokens=length_tokens, sample=0, seed=0).text)
        mine = [each for each in placed if "Aberly" in each]
        assert len(mine) == min(8, len(placed))
    assert len(placed) == 64


def test_a_seed_and_a_sample_say_which_documents_and_where(tmp_path: Path, tokenizer: Any) -> None:
    def texts(task: Any, seed: int, order: range) -> dict[int, str]:
        return {at: task.build(tokenizer, length_tokens=800, sample=at, seed=seed).text for at in order}

    task = make(tmp_path, "ruler_qa_hotpot")
    first = texts(task, 0, range(4))
    assert texts(make(tmp_path, "ruler_qa_hotpot"), 0, range(3, -1, -1)) == first
    assert all(text != first[at] for at, text in texts(task, 1, range(4)).items())
    squads = make(tmp_path, "ruler_qa_squad")
    places = {
        documents_of(squads.build(tokenizer, length_tokens=800, sample=0, seed=seed).text).index(
            squads._documents[squads._questions[0].own[0]]
        )
        for seed in range(8)
    }
    assert len(places) > 3, "lm-eval's one place for every prompt"


@pytest.mark.parametrize(
    ("output", "score"),
    [(" 1711", 1.0), ("It was in 1711.", 1.0), ("IN 1711", 1.0), ("1712", 0.0), ("", 0.0), ("\n1711", 1.0)],
)
def test_the_best_wording_counts(output: str, score: float, tmp_path: Path, tokenizer: Any) -> None:
    """lm-eval averages: one of three accepted wordings is a third there."""
    from lm_eval.tasks.ruler.common_utils import string_match_part

    task = make(tmp_path, "ruler_qa_squad")
    made = task.build(tokenizer, length_tokens=800, sample=9, seed=0)
    assert made.targets == ("1711", "in 1711", "1711")
    assert task.score(made, output) == score
    averaged = string_match_part([output], [list(made.targets)])
    assert (averaged > 0) == (score == 1.0)
    if output == " 1711":
        assert averaged == pytest.approx(2 / 3)


def broken(name: str, change: Callable[[Any], Any]) -> Any:
    values = VALUES[name]()
    change(values)
    return values


def squad_part(values: Any) -> Any:
    return values["data"][2]["paragraphs"][1]


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        (NAMES[0], {"version": "v2.0"}, "has no list 'data' of records"),
        (NAMES[0], {"data": []}, "holds no article"),
        (NAMES[0], {"data": [{"title": "a"}]}, "Record 1 of .* is no article of this benchmark: paragraphs: Field req"),
        (NAMES[0], broken(NAMES[0], lambda v: squad_part(v).pop("context")), r"Record 3 of .*paragraphs\.1\.context"),
        (
            NAMES[0],
            broken(NAMES[0], lambda v: squad_part(v).update(context="")),
            r"Record 3 of .*paragraphs\.1\.context",
        ),
        (
            NAMES[0],
            broken(NAMES[0], lambda v: squad_part(v)["qas"][0].update(answers=[])),
            r"Record 3 of .*paragraphs\.1\.qas\.0: answers is empty, and is_impossible is not true",
        ),
        (
            NAMES[0],
            broken(NAMES[0], lambda v: squad_part(v)["qas"][0].update(answers=[{"text": " "}])),
            r"Record 3 of .*white space alone",
        ),
        (
            NAMES[0],
            broken(NAMES[0], lambda v: squad_part(v)["qas"][0].pop("question")),
            "Record 3 of .*question: Field",
        ),
        (
            NAMES[0],
            broken(NAMES[0], lambda v: squad_part(v)["qas"][0].update(id="0-1")),
            "Records 1 and 3 of ruler_qa_squad ask one question, '0-1'",
        ),
        (
            NAMES[0],
            {"data": [{"paragraphs": [{"context": "c", "qas": []}]}]},
            "The data of ruler_qa_squad has no question with an answer",
        ),
        (NAMES[1], [], "holds no question"),
        (NAMES[1], broken(NAMES[1], lambda v: v[4].pop("context")), "Record 5 of .*context: Field required"),
        (NAMES[1], broken(NAMES[1], lambda v: v[4].update(context=[])), "Record 5 of .*context"),
        (NAMES[1], broken(NAMES[1], lambda v: v[4]["context"].append(["t", "s"])), r"Record 5 of .*context\.3\.1"),
        (NAMES[1], broken(NAMES[1], lambda v: v[4].update(answer=" ")), "Record 5 of .*white space alone"),
        (NAMES[1], broken(NAMES[1], lambda v: v.append(v[4])), "Records 5 and 9 of ruler_qa_hotpot are one question"),
        (NAMES[1], broken(NAMES[1], lambda v: v[0].update(supporting_facts=["t"])), "Record 1 of .*supporting_facts"),
    ],
)
def test_the_first_fault_is_told_by_its_record(name: str, values: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said) as raised:
        make(tmp_path, name, values)
    assert "\n" not in str(raised.value)


def test_what_is_no_json_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dev.json"
    path.write_text('{"data": [')
    for name in NAMES:
        with pytest.raises(UsageError, match="is not JSON"):
            create_task({"name": name, "data": str(path)})
    assert cli.run_cli(["plan", "--model", "reference", "-m", "dense", "-t", f"ruler_qa_squad:data={path}"]) == 2
    assert "is not JSON" in capsys.readouterr().err


def test_files_as_they_are_found(tmp_path: Path) -> None:
    """A data set on many lines, packed, or without the object around it, is the same questions."""
    values = squad_values()
    plain = squad("s", write(tmp_path, "ruler_qa_squad"))
    (tmp_path / "lines").write_text(json.dumps(values, indent=1))
    (tmp_path / "packed").write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(values).encode()))
    (tmp_path / "list").write_text(json.dumps(values["data"]))
    for form in ("lines", "packed", "list"):
        found = squad("s", str(tmp_path / form))
        assert (found.questions, found.documents) == (plain.questions, plain.documents)
    assert len(plain.questions) == 64
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in hotpot_values()))
    assert hotpot("h", str(tmp_path / "rows.jsonl")).questions == hotpot("h", write(tmp_path, NAMES[1])).questions


def test_a_length_too_short_for_its_documents_is_refused_by_the_plan(small: MakeConfig, tmp_path: Path) -> None:
    values = hotpot_values()
    values[5]["context"][0][1].append(" It is a very long town." * 80)
    spec = f"ruler_qa_hotpot:data={write(tmp_path, 'ruler_qa_hotpot', values)},new_tokens=8"
    with pytest.raises(UsageError, match="Length 512 is too short for task 'ruler_qa_hotpot'"):
        make_plan(small(tasks=[spec], lengths_tokens=[512], samples=6))
    # Those that are asked decide, not all of the file.
    make_plan(small(tasks=[spec], lengths_tokens=[512], samples=5))
    task = create_task(spec)
    with pytest.raises(
        UsageError, match=r"Question 6 of ruler_qa_hotpot with its own documents alone has .* larger --len"
    ):
        task.build(KINDS["qwen"](), length_tokens=400, sample=5, seed=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_asks_and_scores(name: str, small: MakeConfig, tmp_path: Path) -> None:
    data = write(tmp_path, name)
    config = small(tasks=[f"{name}:data={data},new_tokens=8"], lengths_tokens=[512, 1024])
    assert not any("same at every --length" in said for said in make_plan(config).warnings)
    run = kvscope.run(config, progress=False)
    assert set(run.samples["status"]) == {"ok"}
    assert (run.samples["prompt_tokens"] + 8 <= run.samples["length_tokens"]).all()
    by_length = run.samples.groupby("length_tokens")["prompt_tokens"].mean()
    assert by_length[512] < by_length[1024]
    assert set(run.samples["truncated_tokens"]) == {0}


def test_the_prompt_of_the_memory_passes_has_exactly_its_length(tmp_path: Path, tokenizer: Any) -> None:
    for name in NAMES:
        task = make(tmp_path, name)
        for prompt_tokens in (300, 1000, 9000):
            ids, question_start = task.fill(tokenizer, prompt_tokens=prompt_tokens, seed=0)
            assert len(ids) == prompt_tokens
            assert tokenizer.decode(ids[question_start:]).strip().endswith("Answer:")


def test_without_lm_evals_words_there_is_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ruler_qa, "lm_eval_constants", lambda file: {"CONFIG": {"template": "{query}"}})
    ruler_qa._wording.cache_clear()
    task = make(tmp_path, "ruler_qa_squad")
    with pytest.raises(EnvironmentProblem, match="has no prompt of its task ruler_qa_squad"):
        task.parts(task._questions[0])
    ruler_qa._wording.cache_clear()


def test_fetching_squad_from_its_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import requests

    asked = []

    def get(address: str, *, timeout: float) -> Any:
        asked.append(address)
        return SimpleNamespace(content=json.dumps(squad_values()).encode(), raise_for_status=lambda: None)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=r"`kvscope tasks fetch ruler_qa_squad` brings it"):
        create_task("ruler_qa_squad")
    monkeypatch.setattr(requests, "get", get)
    assert cli.run_cli(["tasks", "fetch", "ruler_qa_squad"]) == 0
    assert "task     ruler_qa_squad: 64 prompts, --task ruler_qa_squad" in capsys.readouterr().out
    assert asked == ["https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json"]
    assert create_task("ruler_qa_squad").n_samples == 64


def test_fetching_hotpot_at_lm_evals_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    listed = ["README.md", "hotpot_dev_distractor_v1.json", "hotpot_train_v1.1.json"]

    def list_files(self: Any, dataset: str, *, repo_type: str, revision: str) -> list[str]:
        assert (dataset, repo_type) == ("namlh2004/hotpotqa", "dataset")
        return listed

    def download(dataset: str, file: str, *, repo_type: str, local_dir: Path, revision: str) -> None:
        assert revision in (lm_eval_text(ruler_qa._FILE) or "")
        local_dir.mkdir(parents=True)
        (local_dir / file).write_text(json.dumps(hotpot_values()))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert cli.run_cli(["tasks", "fetch", "ruler_qa_hotpot"]) == 0
    assert "task     ruler_qa_hotpot: 8 prompts" in capsys.readouterr().out


def test_a_site_out_of_reach_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    def fails(address: str, *, timeout: float) -> Any:
        raise requests.ConnectionError("Network is unreachable")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(requests, "get", fails)
    with pytest.raises(EnvironmentProblem, match=r"from https://rajpurkar.*Network is unreachable.*data=FILE"):
        fetched.fetch("ruler_qa_squad")
    gone = SimpleNamespace(content=b"", raise_for_status=lambda: fails("404", timeout=1))
    monkeypatch.setattr(requests, "get", lambda address, *, timeout: gone)
    with pytest.raises(EnvironmentProblem, match="cannot be fetched"):
        fetched.fetch("ruler_qa_squad")
    assert not list(tmp_path.rglob("*.json"))
