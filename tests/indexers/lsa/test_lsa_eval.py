"""``lsa eval``: the table against counting by hand, the references, the gate."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from planted import planted_collection

from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.collect import CollectConfig, collect
from kvscope.harness.indexers.collection.label_choice import LabelChoice
from kvscope.harness.indexers.collection.reading import Collection
from kvscope.harness.indexers.lsa.evaluate import evaluate
from kvscope.harness.indexers.lsa.gate import gate
from kvscope.harness.indexers.lsa.measuring import EvalConfig
from kvscope.harness.indexers.lsa.recall_tables import summary_text
from kvscope.harness.indexers.lsa.train import train
from kvscope.harness.indexers.lsa.train_config import TrainConfig
from kvscope.harness.indexers.tables import CSV_FILE
from kvscope.harness.passes.progress import Progress
from kvscope.methods.lsa.indexer import logit
from kvscope.methods.lsa.indexer_files import load_indexer

EVAL = EvalConfig(recency_tokens=128)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = TrainConfig(
        tau=1, epochs=8, lr=2e-2, recency_tokens=128, device="cpu", encoder="mean", target_recall=0.8, lookback=1
    )
    train([planted_collection(folder / "data")], folder / "indexer", config, note=lambda text: None)
    return folder / "indexer", planted_collection(folder / "test", documents=20, seed=5)


def find(rows, policy, setting, value, task="all"):
    (row,) = [r for r in rows if (r["task"], r["policy"], r["setting"], r["value"]) == (task, policy, setting, value)]
    return row


def test_the_table_is_what_counting_by_hand_gives(trained, tmp_path):
    indexer_folder, data = trained
    rows = evaluate([data], str(indexer_folder), tmp_path / "out", EVAL, device="cpu")
    collection, indexer = Collection(data), load_indexer(indexer_folder)
    kept = recall = by_threshold = n = 0.0
    for index in range(len(collection)):
        document = collection.load(index)
        keys = []
        for i, layer in enumerate((1, 3)):
            memory = indexer.layer(layer).memory(document.features[i])
            scale = memory.abs().amax(1, keepdim=True) / 448
            keys.append((memory / scale).to(torch.float8_e4m3fn).float() * scale)
        for step in range(6):
            golden = int(document.indices[step])  # one a step; chunks 1..31 are candidates of 40 (sink 1, window 8)
            state = document.hidden[3 + step].float()[None]
            score = indexer.logits(state, [key[1:32] for key in keys])[0]
            budget = (int(0.3 * 640) - 16 - 128) // 16
            best = set((score.argsort(dim=0, descending=True, stable=True)[:budget] + 1).tolist())
            kept += (16 + 128 + 16 * len(best)) / 640
            recall += golden in best
            by_threshold += bool(score[golden - 1] >= logit(0.5))
            n += 1
    row = find(rows, "indexer", "fraction", 0.3)
    assert row["recall"] == pytest.approx(recall / n, abs=1e-4)
    assert row["kept_fraction"] == pytest.approx(kept / n, abs=1e-4)
    key_bytes, state_bytes = 31 * 2 * (12 + 4), 2 * 2 * 24 * 4  # states scored with, and the running step's
    assert row["kept_bytes_fraction"] == pytest.approx(kept / n + (key_bytes + state_bytes) / (640 * 96), abs=1e-4)
    assert row["refreshes"] == row["refreshes_needing"] == n == 120
    assert find(rows, "indexer", "threshold", 0.5)["recall"] == pytest.approx(by_threshold / n, abs=1e-4)


def test_the_references_are_where_they_belong(trained, tmp_path):
    indexer_folder, data = trained
    rows = evaluate([data], str(indexer_folder), tmp_path / "out", EVAL, device="cpu")
    at = {policy: find(rows, policy, "fraction", 0.3) for policy in ("indexer", "oracle", "recency", "random")}
    assert at["oracle"]["recall"] == 1.0
    assert at["indexer"]["recall"] > 0.4
    assert at["random"]["recall"] == pytest.approx(3 / 31, abs=0.08)
    assert at["recency"]["recall"] < 0.25
    assert at["recency"]["kept_bytes_fraction"] == pytest.approx(at["recency"]["kept_fraction"], abs=1e-5)
    for policy in at:
        assert find(rows, policy, "fraction", 1.0)["recall"] == 1.0
        assert find(rows, policy, "fraction", 1.0)["kept_fraction"] == 1.0
        assert find(rows, policy, "fraction", 0.02)["recall"] == 0.0, "sinks and window alone are more"
    recalls = [find(rows, "indexer", "threshold", value)["recall"] for value in (0.1, 0.5, 0.9)]
    assert recalls == sorted(recalls, reverse=True)


def test_files_and_text(trained, tmp_path):
    indexer_folder, data = trained
    rows = evaluate([data], str(indexer_folder), tmp_path / "out", EVAL, device="cpu")
    with (tmp_path / "out" / CSV_FILE).open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows)
    assert float(written[0]["recall"]) == rows[0]["recall"]
    for name in ("recall.md", "recall.json", "recall.svg", "recall.png"):
        assert (tmp_path / "out" / name).stat().st_size > 500
    about = json.loads((tmp_path / "out" / "recall.json").read_text())["about"]
    assert about["indexer"].startswith("indexer@")
    assert (about["tau"], about["indexer_tau"], about["documents"]) == (1, 1, 20)
    text = summary_text(rows)
    for word in ("indexer", "oracle", "recency", "random", "threshold 0.5", "640"):
        assert word in text


def test_training_data_is_no_test_and_other_models_are_refused(trained, tmp_path):
    indexer_folder, data = trained
    lines = []
    evaluate([data.parent / "data"], str(indexer_folder), tmp_path / "out", EVAL, device="cpu", note=lines.append)
    assert "was trained on" in lines[0]
    other = planted_collection(tmp_path / "other", documents=2, model="ghoul", model_revision="sha256:zz")
    with pytest.raises(UsageError, match=r"differ in model: ghost \(sha256:none\) against ghoul \(sha256:zz\)"):
        evaluate([other], str(indexer_folder), tmp_path / "out", EVAL, device="cpu")
    wide = planted_collection(tmp_path / "wide", documents=2, chunk_tokens=32)
    with pytest.raises(UsageError, match="differ in chunk_tokens: 16 against 32"):
        evaluate([wide], str(indexer_folder), tmp_path / "out", EVAL, device="cpu")
    with pytest.raises(UsageError, match="No document is long enough for a candidate chunk"):
        evaluate([data], str(indexer_folder), tmp_path / "none", replace(EVAL, recency_tokens=10**6), device="cpu")
    assert not (tmp_path / "none").exists()
    for name in ("sink_tokens", "recency_tokens"):
        with pytest.raises(UsageError, match=f"{name} must be 0 or more, got -1"):
            evaluate([data], str(indexer_folder), tmp_path / "none", replace(EVAL, **{name: -1}), device="cpu")
    fewer = planted_collection(tmp_path / "fewer", documents=2, layers=(1,))
    with pytest.raises(UsageError, match="reads layers 1, 3, the collection holds 1"):
        evaluate([fewer], str(indexer_folder), tmp_path / "out", EVAL, device="cpu")


def test_the_gate_answers_twice_and_refuses_another_model(tiny_model, tmp_path):
    config = CollectConfig(
        model=tiny_model, tasks=("niah_single_1",), lengths_tokens=(512,), samples=2, seed=7, chunk_tokens=16,
        top_p=1.0, least_mass=0.0, device="cpu",
    )  # fmt: skip
    folder = collect(config, tmp_path / "data", progress=Progress())
    result = gate([folder], model=tiny_model, tau=1000, device="cpu")
    pooled = result.rows[0]
    assert (pooled["task"], pooled["n"], pooled["kept_fraction"]) == ("all", 2, 1.0), "top-p 1 labels every chunk"
    assert pooled["dense"] == pooled["restricted"]
    assert not result.passed, "labels that keep everything predict nothing"
    assert any("labels keep 100.0% of the prompts" in why for why in result.failures)
    none = gate([folder], model=tiny_model, device="cpu", tau=1000, choice=LabelChoice(votes=200))
    # 383 prompt tokens: a chunk of sinks, eight of window, and the incomplete one of 15.
    assert none.rows[0]["kept_fraction"] == pytest.approx((16 + 128 + 15) / 383, abs=1e-3)
    with pytest.raises(UsageError, match="The collection was made with model 'tiny'"):
        gate([folder], model="reference", device="cpu")
