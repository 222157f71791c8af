"""Documents in a model's chat template: what is fed, what collection and indexer record, what a run says of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lsa_tools import random_indexer
from tiny import MakeConfig, save_tiny_model

from kvscope.errors import UsageError
from kvscope.harness.engine.chat import chat_tokenizer
from kvscope.harness.engine.models import load_model
from kvscope.harness.indexers.collection import make_document
from kvscope.harness.indexers.collection.collect import CollectConfig, collect
from kvscope.harness.indexers.collection.places import data_record
from kvscope.harness.indexers.collection.reading import Collection, open_collections
from kvscope.harness.indexers.lsa.fit import fit
from kvscope.harness.indexers.lsa.fit_config import FitConfig, FitState
from kvscope.harness.indexers.lsa.gate import gate
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.progress import Progress
from kvscope.methods.indexer_files import trained_prompts
from kvscope.tasks import needle

TEMPLATE = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' [assistant]' }}{% endfor %}"


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a model whose tokenizer brings a template."""
    folder = tmp_path_factory.mktemp("models") / "instruct"
    save_tiny_model(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


@pytest.fixture
def config(instruct: str, monkeypatch: pytest.MonkeyPatch) -> CollectConfig:
    monkeypatch.setattr(needle, "NEW_TOKENS", 6)  # a random model never ends an answer
    return CollectConfig(
        model=instruct, tasks=("niah_single_1",), lengths_tokens=(320,), samples=1, seed=77, top_p=0.6,
        least_mass=0.0, device="cpu",
    )  # fmt: skip


def collected(config: CollectConfig, folder: Path) -> Path:
    return collect(config, folder, progress=Progress())


def test_documents_are_turns_and_nothing_but_the_model_ends_them(
    config: CollectConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(config.model, device="cpu")
    fed: list[list[int]] = []
    stops: list[Any] = []
    prefill, end = make_document.prefill, make_document.AnswerEnd

    def keeping(loaded: Any, ids: Any, **options: Any) -> Any:
        fed.append(list(ids))
        return prefill(loaded, ids, **options)

    def ending(loaded: Any, *, stop_strings: Any) -> Any:
        stops.append(stop_strings)
        return end(loaded, stop_strings=stop_strings)

    monkeypatch.setattr(make_document, "prefill", keeping)
    monkeypatch.setattr(make_document, "AnswerEnd", ending)
    for name, choice in (("chat", "auto"), ("plain", "none")):
        collect(replace(config, chat_template=choice), tmp_path / name, progress=Progress(), loaded=loaded)
    chat, plain = (loaded.tokenizer.decode(ids) for ids in fed)
    assert chat.startswith("[user] ")
    assert "[user]" not in plain
    assert stops[0] == ()
    assert stops[1]
    assert [len(ids) + 1 + needle.NEW_TOKENS for ids in fed] == [320, 320], "the template is inside the length"


def test_a_collection_is_of_one_template_and_says_which(config: CollectConfig, tmp_path: Path) -> None:
    chat = Collection(collected(config, tmp_path / "chat"))
    plain = Collection(collected(replace(config, chat_template="none"), tmp_path / "plain"))
    tokenizer = chat_tokenizer(load_model(config.model, device="cpu").tokenizer, "auto")
    assert tokenizer is not None
    assert (chat.info.chat_template, plain.info.chat_template) == (tokenizer.sha256, None)
    assert data_record([chat])[0]["chat_template"] == tokenizer.sha256
    assert plain.id == replace(plain.info).id
    with pytest.raises(UsageError, match="holds another collection: chat_template is sha256"):
        collected(replace(config, chat_template="none"), tmp_path / "chat")
    with pytest.raises(UsageError, match="cannot be mixed: chat_template"):
        open_collections([tmp_path / "chat", tmp_path / "plain"])


def test_a_manifest_from_before_there_was_a_choice_goes_on(config: CollectConfig, tmp_path: Path) -> None:
    plain = replace(config, chat_template="none")
    folder = collected(plain, tmp_path / "data")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["collection"]["chat_template"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    assert Collection(collected(plain, folder)).info.chat_template is None
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == before


def test_the_gate_asks_as_the_collection_did(config: CollectConfig, tmp_path: Path) -> None:
    folder = collected(config, tmp_path / "chat")
    assert gate([folder], model=config.model, device="cpu").rows[0]["n"] == 1
    other = tmp_path / "other.jinja"
    other.write_text(TEMPLATE.replace("[user]", "<user>").replace("'['", "'<'"))
    foreign = collected(replace(config, chat_template=str(other)), tmp_path / "foreign")
    with pytest.raises(UsageError, match="another chat template than that of 'instruct'"):
        gate([foreign], model=config.model, device="cpu")


@pytest.mark.parametrize(
    ("trained", "choice", "said"),
    [
        (
            {"data": [{"id": "a", "chat_template": None}]},
            "auto",
            "was trained on plain texts, and this run asks prompts",
        ),
        ({"data": [{"id": "older"}]}, "auto", "was trained on plain texts"),
        (
            {"start": {"trained": {"data": [{"chat_template": "sha256:77"}]}}},
            "none",
            "in the chat template 'sha256:77'",
        ),
        ({"data": [{"chat_template": None}]}, "none", None),
        ({}, "auto", None),
        ({"data": [7], "start": 5}, "auto", None),
    ],
)
def test_a_run_says_where_its_prompts_are_not_the_indexers(
    small: MakeConfig, instruct: str, tmp_path: Path, trained: dict[str, Any], choice: str, said: str | None
) -> None:
    folder = Path(random_indexer(tmp_path / "indexer", load_model(instruct, device="cpu").shape, seed=3))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "trained": trained}))
    plan = make_plan(small(model=instruct, methods=["dense", f"lsa:indexer={folder}"], chat_template=choice))
    found = [text for text in plan.warnings if "was trained on" in text]
    assert len(found) == (0 if said is None else 1)
    assert said is None or said in found[0]


def test_the_run_of_the_same_template_is_silent() -> None:
    assert trained_prompts({"data": [{"chat_template": "sha256:0123456789abcdef"}]}) == (
        "prompts in the chat template 'sha256:0123456789ab'"
    )


def test_a_fit_goes_on_with_the_template_it_was_begun_with(instruct: str, tmp_path: Path) -> None:
    config = FitConfig(model=instruct, minutes=1, device="cpu")
    state = FitState(config.identity, probe={"lengths_tokens": [320], "s_per_token": 1.0})  # before there was a choice
    (tmp_path / "fit").mkdir()
    state.save(tmp_path / "fit")
    with pytest.raises(UsageError, match=r"was begun with plain texts, and prompts in the chat template .* asked for"):
        fit(config, tmp_path / "fit", note=lambda text: None)
