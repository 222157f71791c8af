"""The tasks under the stock lm-eval: same prompts, same score."""

from typing import Any

import pytest
from stub_server import reference_tokenizer
from tiny import save_tiny_model

from kvscope.errors import UsageError
from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.tasks.answers import answer_of
from kvscope.tasks.lm_harness import FOLDER, build, process_long_qa, process_results
from kvscope.tasks.needle import SPECS
from kvscope.tasks.public.fetched import SOURCES
from kvscope.tasks.registry import create_task, task_names


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return str(folder)


def test_every_task_without_data_has_a_file() -> None:
    offline = {name for name in task_names() if name not in SPECS or SPECS[name].haystack != "essay"} - {
        "jsonl",
        *SOURCES,
    }
    assert {path.stem for path in FOLDER.glob("*.yaml")} == offline


def test_long_qa_is_scored_as_kvscope_run_scores_it(model_folder: str) -> None:
    doc = build(kvscope_task="long_qa", length_tokens=1024, samples=1, seed=3, pretrained=model_folder)["test"][0]
    assert process_long_qa(doc, [" " + ", ".join(doc["targets"])]) == {"score": 1.0}
    assert process_long_qa(doc, [" no"]) == {"score": 0.0}


@pytest.mark.parametrize("name", ["long_qa", "long_qa_no_context", "long_qa_mrcr"])
def test_the_answer_room_of_a_file_is_the_task_s(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    if "generation_kwargs" not in text:  # taken from the file it includes
        text = (FOLDER / "_long_qa_template").read_text(encoding="utf-8")
    assert f"  max_gen_toks: {create_task(name).max_new_tokens}\n" in text


@pytest.mark.parametrize("name", ["vt", "cwe", "fwe"])
def test_answers_get_the_task_s_own_room(name: str) -> None:
    raw = (FOLDER / f"{name}.yaml").read_text()
    assert f"max_gen_toks: {create_task(name).max_new_tokens}\n" in raw
    assert "until: []" in raw


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_answers_are_scored_as_kvscope_run_scores_them(name: str) -> None:
    """lm-eval cuts nothing off: it would cut a new line before an answer, too, and leave nothing of it."""
    from lm_eval.models.utils import postprocess_generated_text
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(FOLDER / f"{name}.yaml", resolve_func=True)
    task, folder = create_task(name), str(REFERENCE_MODEL_FOLDER)
    doc = build(kvscope_task=name, length_tokens=2048, samples=1, seed=5, pretrained=folder)["test"][0]
    own = task.build(reference_tokenizer(), length_tokens=2048, sample=0, seed=5)
    assert doc["text"] == own.text
    targets = list(own.targets)
    for said in (", ".join(targets), f"\n\n{targets[0]}", f" {targets[0]}.\nmore {targets[-1]}", targets[0][:-1], ""):
        left = postprocess_generated_text(said, config["generation_kwargs"]["until"], None)
        [found] = config["process_results"](doc, [left]).values()
        assert found == task.score(own, answer_of(said, own.stop)), said


def test_documents_are_the_prompts_of_kvscope_run(model_folder: str) -> None:
    from transformers import AutoTokenizer

    docs = build(kvscope_task="niah_multiquery", length_tokens=1024, samples=2, seed=3, pretrained=model_folder)["test"]
    own = create_task("niah_multiquery").build(
        AutoTokenizer.from_pretrained(model_folder), length_tokens=1024, sample=1, seed=3
    )
    assert docs[1]["prompt_sha256"] == own.prompt_sha256
    assert process_results(docs[1], [", ".join(own.targets)]) == {"recall": 1.0}
    assert process_results(docs[1], [own.targets[0]]) == {"recall": 0.25}


def test_without_a_tokenizer_it_says_what_to_pass() -> None:
    with pytest.raises(UsageError, match="pretrained= in --model_args"):
        build(kvscope_task="niah_single_1")


def test_a_name_that_is_no_tokenizer_is_refused_before_the_hub_is_asked() -> None:
    with pytest.raises(UsageError, match="There is no folder 'reference' with a tokenizer: give tokenizer=FOLDER"):
        build(kvscope_task="niah_single_1", pretrained="reference")


def test_metadata_as_text_and_with_units(model_folder: str) -> None:
    docs = build(kvscope_task="vt", length_tokens="1k", samples="1", seed="3", pretrained=model_folder)["test"]
    assert [doc["length_tokens"] for doc in docs] == [1024]
    with pytest.raises(UsageError, match="samples of --metadata is 0"):
        build(kvscope_task="vt", samples=0, pretrained=model_folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["niah_single_1", "vt", "long_qa"])
def test_stock_lm_eval_runs_them(model_folder: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager
    from torch.utils import collect_env

    # It would ask pip for every package.
    monkeypatch.setattr(collect_env, "get_pretty_env_info", lambda: "this machine")

    metadata = {"length_tokens": 1024, "samples": 2, "seed": 1, "pretrained": model_folder}
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False, metadata=metadata)
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": model_folder, "add_bos_token": True, "device": "cpu"},
        tasks=[f"kvscope_{name}"],
        task_manager=manager,
        gen_kwargs="max_gen_toks=4",
        bootstrap_iters=0,
    )
    metric = "score,none" if name == "long_qa" else "recall,none"
    assert results["results"][f"kvscope_{name}"][metric] == 0.0
    assert len(results["samples"][f"kvscope_{name}"]) == 2
