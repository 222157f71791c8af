"""lm-eval's RULER through ``kvscope run``: its own prompts, its own scores, and the table of them."""

import argparse
import json
import lzma
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from tiny import save_tiny_model
from transformers import AutoTokenizer

import kvscope

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "harness" / "reference_model" / "weights"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def _few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """RULER sorts every adjective with every noun on import, which takes a while: let there be few."""
    import wonderwords

    words = {f"{kind}{end}": [f"{kind}{at}" for at in range(90)] for kind in ("noun", "adjective") for end in ("", "s")}
    few = SimpleNamespace(_categories={**words, "verb": ["verb"], "verbs": ["verb"]})
    monkeypatch.setattr(wonderwords, "RandomWord", lambda: few)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in [name for name in sys.modules if name.startswith("lm_eval.tasks.ruler")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("_few_words")
def test_the_first_prompts_are_those_of_a_longer_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    import stock_ruler_prompts as module

    def lines(task: str, n: int) -> list[dict[str, Any]]:
        return list(module.stock_lines(task, 1024, n, tokenizer=str(REFERENCE)))

    few = {task: lines(task, 2) for task in ("niah_multikey_2", "ruler_vt")}
    draw = module._drawing_first
    monkeypatch.setattr(module, "_drawing_first", lambda n: draw(9))
    assert {task: lines(task, 2) for task in few} == few
    first, second = few["ruler_vt"]
    assert first["prompt"] != second["prompt"]
    assert first["prompt"].endswith("they are:")
    assert first["meta"]["max_new_tokens"] == 30
    assert all(len(line["answers"]) == 5 and line["meta"]["prompt_tokens"] <= 1024 for line in few["ruler_vt"])


def write_prompts(folder: Path, cells: Sequence[tuple[str, int]], *, prompt_tokens: int) -> None:
    """Two prompts a cell, as ``prompts`` writes them."""
    import stock_ruler_prompts as module

    folder.mkdir()
    for task, nominal_tokens in cells:
        meta = {
            "task": task,
            "nominal_tokens": nominal_tokens,
            "max_length": nominal_tokens,
            "max_new_tokens": 4,
            "prompt_tokens": prompt_tokens,
        }
        lines = [{"id": at, "prompt": "the fox", "answers": ["fox", "zzz"], "meta": meta} for at in range(2)]
        raw = "".join(json.dumps(line) + "\n" for line in lines).encode()
        (folder / module.file_name(task, nominal_tokens)).write_bytes(lzma.compress(raw))
    found = [module.describe(path) for path in sorted(folder.glob("*.xz"))]
    module.write_manifest(folder, REFERENCE, found)


def test_answers_get_the_stock_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import stock_ruler
    import stock_ruler_score as module

    model, prompts = tmp_path / "tiny", tmp_path / "prompts"
    save_tiny_model(model)
    n_tokens = len(AutoTokenizer.from_pretrained(model)("the fox")["input_ids"])
    write_prompts(prompts, [("niah_single_1", 1024), ("ruler_vt", 2048)], prompt_tokens=n_tokens)
    options = argparse.Namespace(
        prompts=prompts, out=tmp_path / "run", model=str(model), method=["dense", "recency"], samples=None,
        task=[], length=[], device="cpu", dtype=None, batch=None, jobs=None,
        time_limit_s=None,
    )  # fmt: skip
    stock_ruler.answer(options)
    run = kvscope.load_run(tmp_path / "run")
    assert sorted(set(run.samples["task"])) == ["jsonl:niah_single_1-1024", "jsonl:ruler_vt-2048"]
    assert set(run.samples["stop_reason"]) <= {"eos", "length"}
    turned = replace(run, samples=run.samples.sort_values("sample", ascending=False))  # rows come as answers end
    assert [each.prompt["id"] for each in module.answers(turned, prompts)] == [0] * 4 + [1] * 4
    monkeypatch.setattr(module, "stock_score", lambda line, text: float(line["id"]))
    found = module.score(run, prompts, label="tiny", command=["x"], failed=5)
    assert [(cell["task"], cell["nominal_tokens"], cell["method"], cell["n"]) for cell in found["cells"]] == [
        (task, length, method, 2)
        for task, length in (("niah_single_1", 1024), ("ruler_vt", 2048))
        for method in ("dense", "recency")
    ]
    first = found["cells"][0]
    assert (first["score_percent"], first["prompt_tokens"]) == (50.0, dict.fromkeys(("min", "mean", "max"), n_tokens))
    assert [each["sample"] for each in first["failed"]] == [0]
    assert first["ends"]["eos"] + first["ends"]["length"] == 2
    assert json.loads(json.dumps(found)) == found


def test_the_scorer_is_lm_evals() -> None:
    from stock_ruler_score import stock_score

    line = {"answers": ["fox", "Dog"], "meta": {"max_length": 1024}}
    assert [stock_score(line, text) for text in ("a FOX\x01", "fox dog", "")] == [0.5, 1.0, 0.0]


def test_the_first_prompts_are_cut_out(tmp_path: Path) -> None:
    import stock_ruler_prompts as module

    write_prompts(tmp_path / "two", [("ruler_vt", 2048)], prompt_tokens=3)
    module.cut(tmp_path / "two", tmp_path / "one", samples=1)
    name = module.file_name("ruler_vt", 2048)
    assert module.read_lines(tmp_path / "one" / name) == module.read_lines(tmp_path / "two" / name)[:1]
    two, one = (module.read_manifest(tmp_path / each) for each in ("two", "one"))
    assert (one["cells"][0]["n"], two["cells"][0]["n"]) == (1, 2)
    assert {**one, "cells": []} == {**two, "cells": []}
    with pytest.raises(SystemExit, match="has 2 prompts, and 3 are asked for"):
        module.cut(tmp_path / "two", tmp_path / "three", samples=3)


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    from stock_ruler_score import answers

    write_prompts(tmp_path / "prompts", [("ruler_vt", 2048)], prompt_tokens=9)
    row = {"task": "jsonl:ruler_vt-2048", "sample": 0, "method_label": "dense", "status": "ok", "prompt_tokens": 3,
           "prompt_sha256": "0", "resident_kv_bytes": 1, "metadata_bytes": 0, "dense_kv_bytes": 1}  # fmt: skip
    run: Any = SimpleNamespace(samples=pd.DataFrame([row]))
    with pytest.raises(SystemExit, match="dense has 3 tokens, and lm-eval counted 9"):
        list(answers(run, tmp_path / "prompts"))
    run.samples["prompt_tokens"] = 9
    with pytest.raises(SystemExit, match="prompt 0, dense is another prompt"):
        list(answers(run, tmp_path / "prompts"))
    run.samples["status"], run.samples["reason"] = "oom", "memory ended"
    with pytest.raises(SystemExit, match="is oom: memory ended"):
        list(answers(run, tmp_path / "prompts"))


def result(label: str, methods: Sequence[str], **more: Any) -> dict[str, Any]:
    cell = {
        "task": "niah_multikey_2", "nominal_tokens": 32768, "n": 50, "score_percent": 98.0,
        "interval_95_percent": [89.5, 99.6], "prompt_tokens": {"min": 31234, "mean": 31300.0, "max": 31456},
    }  # fmt: skip
    return {
        "label": label,
        "prompt_hashes": {"a": "1"},
        "cells": [{**cell, "method": each} for each in methods],
        **more,
    }


def test_a_table_fits_the_page() -> None:
    from stock_ruler_score import table

    assert table([result("x", ["dense"])]) == [
        "| task | length | tokens | n | dense |",
        "|---|---|---|---|---|",
        "| niah_multikey_2 | 32K | 31,234-31,456 | 50 | 98.0 [89.5, 99.6] |",
    ]
    wide = table([result("x", ["dense", "sliding_window", "quest", "snapkv", "lsa"])])
    assert wide[-1].endswith("| 50 | 98.0 | 98.0 | 98.0 | 98.0 | 98.0 |")
    assert max(map(len, wide)) <= 100
    with pytest.raises(SystemExit, match="characters wide"):
        table([result(f"a model with a long name {at}", ["sliding_window"]) for at in range(3)])


def test_models_stand_side_by_side_on_the_same_prompts_alone() -> None:
    from stock_ruler_score import table

    new = result("new", ["dense"])
    new["cells"] += [{**new["cells"][0], "task": "ruler_vt", "n": 100}]
    head, _, first, second = table([result("old", ["dense"]), new])
    assert head.endswith("| old dense | new dense |")
    assert first.endswith("| 98.0 [89.5, 99.6] | 98.0 [89.5, 99.6] |")
    assert second.endswith("| 100 | - | 98.0 [89.5, 99.6] |")
    with pytest.raises(SystemExit, match="new answered other prompts of a"):
        table([result("old", ["dense"]), {**new, "prompt_hashes": {"a": "2"}}])


def test_the_page_has_the_tables_of_the_file() -> None:
    from stock_ruler_score import read_result, table

    found = read_result(ROOT / "benchmarks" / "results" / "stock_ruler_methods_h200.json")
    page = (ROOT / "docs" / "stock-ruler.md").read_text(encoding="utf-8").splitlines()
    scores = table([found])
    assert page[page.index(scores[0]) :][: len(scores)] == scores
    methods = ("dense", "lsa", "quest", "sliding_window", "snapkv")
    for length in (1, 2, 4, 8, 16, 32):
        held = {
            method: [
                cell["held_percent_of_dense"]
                for cell in found["cells"]
                if cell["method"] == method and cell["nominal_tokens"] == 1024 * length
            ]
            for method in methods
        }
        assert {len(each) for each in held.values()} == {6}
        means = " | ".join(f"{sum(held[method]) / 6:.1f}" for method in methods)
        assert f"| {length}K | {means} |" in page
