"""list and show: every name, every option, from the code itself."""

import dataclasses
import json
import re

import pytest

from kvscope import cli
from kvscope.harness.engine import names as model_names
from kvscope.harness.info import catalog_entries
from kvscope.harness.info.catalog import list_text, show_text
from kvscope.harness.info.catalog_entries import documented
from kvscope.methods.dsa import indexer_files as dsa_files
from kvscope.methods.lsa import indexer_files as lsa_files
from kvscope.methods.registry import create_method, method_class, method_names
from kvscope.tasks.registry import task_names


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.run_cli(arguments) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", ["methods", "tasks", "models"])
def test_lists_name_everything_once_and_agree_with_json(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"methods": method_names(), "tasks": task_names(), "models": list(model_names.known_models())}[kind]
    lines = output(capsys, "list", kind).splitlines()
    if kind == "methods":
        assert lines.pop(0).split()[:3] == ["method", "training", "saves"]
    assert [line.split()[0] for line in lines] == names
    assert all(len(line.split()) > 1 for line in lines)
    assert [entry["name"] for entry in json.loads(output(capsys, "list", kind, "--json"))] == names


@pytest.mark.parametrize("name", method_names())
def test_a_method_shows_what_stays_what_it_costs_and_every_option(name: str) -> None:
    text, cls = show_text(name), method_class(name)
    unwrapped = " ".join(text.split())
    for clause in (cls.stays, cls.reads, cls.saves, cls.cost, cls.source):
        assert clause in unwrapped
    assert max(map(len, text.splitlines())) <= 130
    for field in dataclasses.fields(cls.Config):
        default = "none" if field.default is None else str(field.default).lower()
        line = next(line for line in text.splitlines() if line.strip().startswith(f"{field.name} ("))
        assert f"default {default})" in line


@pytest.mark.parametrize("name", method_names())
def test_every_option_of_a_method_is_explained(name: str) -> None:
    for option in catalog_entries.method_options(method_class(name)):
        assert len(option["meaning"]) > 10, option["name"]


def test_what_is_shown_is_there_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    method, task, model = (json.loads(output(capsys, "show", name, "--json")) for name in ("lsa", "vt", "reference"))
    assert [each["kind"] for each in (method, task, model)] == ["method", "task", "model"]
    (listed,) = (entry for entry in catalog_entries.entries("methods") if entry["name"] == "lsa")
    assert method == {"kind": "method", **json.loads(json.dumps(listed))}
    assert f"{model['kv_bytes_per_token']:,} bytes a token in {model['dtype']}" in show_text("reference")
    assert task["description"] in show_text("vt")
    assert cli.run_cli(["show", "lza", "--json"]) == 2


def test_automatic_values_are_shown_by_length() -> None:
    lines = show_text("moba").splitlines()
    at = next(index for index, line in enumerate(lines) if "by prompt length" in line)
    assert lines[at + 1].split() == ["1K", "block_tokens=32,", "blocks_read=4,", "budget_tokens=128"]
    assert lines[at + 3].split() == ["32K", "block_tokens=512,", "blocks_read=4,", "budget_tokens=2048"]
    assert "by prompt length" not in show_text("dense")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("dense", ("no", "nothing", "-", "arXiv 1706.03762")),
        ("snapkv", ("no", "bytes", "once", "arXiv 2404.14469")),
        ("h2o", ("no", "bytes", "while decoding", "arXiv 2306.14048")),
        ("sliding_window", ("no", "bytes", "while decoding", "arXiv 2309.17453")),
        ("moba", ("the model", "reads", "while decoding", "arXiv 2502.13189")),
        ("lsa", ("an indexer", "bytes, to host memory", "while decoding", "arXiv 2606.09079")),
    ],
)
def test_the_list_says_what_a_method_needs_and_saves(name: str, words: tuple[str, ...]) -> None:
    line = next(line for line in list_text("methods").splitlines() if line.startswith(f"{name} "))
    assert tuple(re.split(r"\s{2,}", line)[1:5]) == words
    shown = " ".join(show_text(name).split())
    assert f"needs training {words[0]}" in shown
    assert ("chosen anew while decoding" in shown) == (words[2] == "while decoding")


def test_trained_indexers_that_come_along_are_named() -> None:
    for name, files in (("lsa", lsa_files.FILES), ("dsa", dsa_files.FILES)):
        text = " ".join(show_text(name).split())
        for shipped in files.shipped_names():
            config = files.read_config(files.folder(shipped))
            assert f"{shipped} (model {config.model}" in text
    for shipped in lsa_files.FILES.shipped_names():
        values = lsa_files.FILES.read_config(lsa_files.FILES.folder(shipped))
        chosen = f"{shipped} (model {values.model}: chunks of {values.chunk_tokens}, tau {values.tau})"
        assert chosen in " ".join(show_text("lsa").split())
    assert "trained indexers" not in show_text("quest")


def test_what_the_indexer_decides_is_not_told_as_a_number() -> None:
    shown = catalog_entries.method_entry("lsa")["automatic"]["8K"]
    assert (shown["tau"], shown["chunk_tokens"]) == ("the indexer's or 64", "the indexer's or 64")
    given = create_method("lsa:tau=8,chunk_tokens=16").effective_config(8192)
    assert (given["tau"], given["chunk_tokens"]) == (8, 16)
    drawn = create_method("lsa:selection=synthetic,budget_tokens=512").effective_config(8192)
    assert (drawn["tau"], drawn["chunk_tokens"]) == (64, 64)


@pytest.mark.parametrize("name", method_names())
def test_json_defaults_make_the_default_method(name: str) -> None:
    options = {option["name"]: option["default"] for option in catalog_entries.method_entry(name)["options"]}
    assert create_method({"name": name, **options}).label == name


@pytest.mark.parametrize("name", task_names())
def test_a_task_shows_what_it_asks_for_and_its_source(name: str) -> None:
    text = show_text(name)
    entry = catalog_entries.task_entry(name)
    assert entry["description"] in text
    assert entry["source"] in text
    assert len(entry["source"]) > 5


def test_a_model_shows_its_shape(tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_names, "known_models", lambda: {tiny_model: "a tiny one", "/gone": "not here"})
    text = show_text(tiny_model)
    assert "a tiny one" in text
    assert "256 bytes a token in float32" in text
    assert "4,096 tokens at most" in text
    assert "shape      not known here: There is no model folder '/gone'" in show_text("/gone")


def test_docstring_sections_are_read_with_their_continuations() -> None:
    class Options:
        """Something.

        Attributes:
            one: the first,
                and more of it.
            two, three: the ``others``.

        Raises:
            four: is no option.
        """

    assert documented(Options) == {"one": "the first, and more of it.", "two": "the others.", "three": "the others."}
