"""DeepSeek-V4 through the ordinary commands: plan, rows of both passes, reasons, bad input."""

import pandas as pd
import pytest
from compressed_tiny import random_model, tiny_config
from safetensors.torch import save_file
from sessions import captured_here

from kvscope.errors import EnvironmentProblem, UsageError
from kvscope.harness.backends.deepseek_v4.backend import DeepseekV4
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.sweep import run
from kvscope.methods.compressed_bytes import stock_shape
from kvscope.methods.lsa.compressed import CompressedIndexer

OVER_TOKENS = ["sliding_window", "quest", "moba", "msa", "dsa:indexer=oracle"]
SYNTHETIC = "lsa:selection=synthetic,budget_fraction=0.3,tau=4"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with the reference model's tokenizer, as users have models on disk."""
    from transformers import AutoTokenizer

    where = tmp_path_factory.mktemp("models") / "tiny-v4"
    tokenizer = AutoTokenizer.from_pretrained(str(REFERENCE_MODEL_FOLDER))
    random_model(
        vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    ).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return str(where)


def config(folder, methods, **values):
    defaults = {
        "model": folder,
        "methods": methods,
        "tasks": ["niah_single_1"],
        "lengths_tokens": [512],
        "samples": 2,
        "max_new_tokens": 6,
        "footprint": False,
        "device": "cpu",
    }
    return make_config({**defaults, **values})


def test_the_sweep_gives_rows_as_for_any_model(folder, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    trained = f"lsa:indexer={weights},tau=4"
    methods = ["dense", "recency", "random", SYNTHETIC, trained, *OVER_TOKENS]
    shown = run(config(folder, methods), out=tmp_path / "run", progress=False)
    rows = shown.samples.set_index(["method_label", "sample"])
    assert len(rows) == 20
    ok = shown.samples[shown.samples["status"] == "ok"]
    assert len(ok) == 10
    assert set(shown.samples[shown.samples["status"] != "ok"]["status"]) == {"unsupported"}
    assert all("keeps one entry for 4 of them" in rows.loc[(name, 0), "reason"] for name in OVER_TOKENS)
    for row in ok.to_dict("records"):
        assert sum(row["kv_bytes_by_kind"].values()) > 0
        assert row["noop"] == (row["method"] == "dense")
        assert row["resident_kv_bytes"] <= row["dense_kv_bytes"]
    dense = rows.loc[("dense", 0)]
    cache = stock_shape(tiny_config(), element_bytes=4)
    steps = dense["decode_tokens"]
    assert dense["kv_bytes_by_kind"] == cache.by_kind(dense["prompt_tokens"] - 1 + steps, during_step=True)
    chosen = ok[ok["method"] == "lsa"]
    assert set(chosen["selection"]) == {"synthetic", "trained"}
    assert all(row["residency"]["indexer_bytes"] > 0 for row in chosen.to_dict("records"))
    assert chosen.iloc[1]["residency"]["indexer"].startswith("query.safetensors@")
    assert (chosen["host_kv_bytes"] > 0).all()
    assert (chosen["metadata_bytes"] > 0).all()


def test_captured_steps_give_the_answers_of_eager_ones(folder, weights, tmp_path, monkeypatch):
    """A stand-in captures; a row says how its steps ran, and what a captured one holds and reads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    captures = captured_here(monkeypatch)
    methods = ["dense", SYNTHETIC, f"lsa:indexer={weights},tau=4,recency_tokens=64"]
    frames = []
    for graph in (False, True):
        shown = run(config(folder, methods, accuracy_graph=graph), out=tmp_path / str(graph), progress=False)
        frames.append(shown.samples.set_index(["method_label", "sample"]).sort_index())
    eager, captured = frames
    assert set(captured["step_backend"]) == {"cuda graph"}
    assert len(captures) >= 6
    same = ["status", "output", "score", "decode_tokens", "metadata_bytes", "host_kv_bytes", "residency"]
    pd.testing.assert_frame_equal(captured[same], eager[same])
    more = captured["resident_kv_bytes"] / eager["resident_kv_bytes"]
    assert more.between(0.99, 1.5).all()  # a threshold has room to spare
    assert (captured["bytes_read_per_step"] < eager["bytes_read_per_step"]).all()  # the native top-k alone


def test_the_footprint_pass_measures_it_in_a_fresh_process(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = {"footprint": True, "footprint_lengths_tokens": [512], "footprint_decode_tokens": 8, "samples": 1}
    shown = run(config(folder, [SYNTHETIC], **options), out=tmp_path / "run", progress=False)
    row = shown.footprint.iloc[0]
    assert row["status"] == "ok"
    assert row["verdict"] == "not_measured"
    assert "stock deepseek_v4 classes" in row["backend"]
    assert row["resident_kv_bytes"] == pytest.approx(row["predicted_kv_bytes"], abs=1)
    assert row["metadata_bytes"] == row["predicted_metadata_bytes"] > 0
    assert row["host_kv_bytes"] == row["predicted_host_bytes"] > 0
    assert row["resident_kv_bytes"] < 0.8 * row["dense_kv_bytes"]
    assert sum(row["kv_bytes_by_kind"].values()) >= row["resident_kv_bytes"]


@pytest.mark.parametrize("name", OVER_TOKENS)
def test_methods_over_single_tokens_give_their_reason_in_the_plan(folder, name):
    plan = make_plan(config(folder, ["dense", name]))
    assert plan.unsupported("dense", 512) is None
    assert "dense, recency, random, lsa run there" in plan.unsupported(name, 512)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("random:chunk_tokens=6", "chunk_tokens=6 is not a multiple of the 4 tokens of an entry"),
        (SYNTHETIC + ",chunk_tokens=64", "a chunk is an entry of 4 tokens"),
        ("lsa:indexer=attention", "indexer=attention is not available over compressed entries"),
        ("lsa:indexer=hindsight", "indexer=hindsight is not available over compressed entries"),
        ("lsa:indexer=oracle", "indexer=oracle is not available over compressed entries"),
    ],
)
def test_options_that_are_not_available_give_their_reason_in_the_plan(folder, spec, words):
    plan = make_plan(config(folder, [spec]))
    assert words in plan.unsupported(plan.methods[0].label, 512)


def test_lsa_without_an_indexer_is_refused_before_anything_runs(folder):
    with pytest.raises(UsageError, match="needs an indexer on deepseek_v4: pass indexer=FOLDER"):
        make_plan(config(folder, ["lsa"]))


def test_its_entries_are_not_filled_with_synthetic_values(folder):
    with pytest.raises(UsageError, match="has compressed entries, which are not filled with synthetic values"):
        make_plan(config(folder, ["dense"], footprint=True, kv="synthetic"))


@pytest.mark.parametrize(
    ("layers", "key_dim", "words"),
    [
        ((1, 2), 16, r"reads layers 2, .*compressed-sparse layers \(1, 4\)"),
        ((1,), 32, "hidden states of 64 and keys of 32, this model has 64 and 16"),
    ],
)
def test_an_indexer_of_another_model_is_refused(folder, tmp_path, layers, key_dim, words):
    made = CompressedIndexer.random(layers, hidden_size=64, rank=8, heads=2, key_dim=key_dim, seed=0)
    path = tmp_path / "other.safetensors"
    fields = {"wq_a": "w_dq_RM", "q_norm": "norm_R", "wq_b": "w_iuq_OR", "weights_proj": "w_w_IM"}
    save_file(
        {
            f"model.layers.{layer}.indexer.{name}.weight": getattr(matrices, field).contiguous()
            for layer, matrices in made.layers.items()
            for name, field in fields.items()
        },
        path,
    )
    with pytest.raises(UsageError, match=words):
        make_plan(config(folder, [f"lsa:indexer={path}"]))


def test_weights_say_nothing_of_tau_so_that_it_is_the_papers(folder, weights):
    plan = make_plan(config(folder, [f"lsa:indexer={weights}"]))
    assert plan.methods[0].effective_config(512, plan.facts.shape)["tau"] == 64


def test_such_a_file_is_refused_by_an_ordinary_model(weights):
    with pytest.raises(UsageError, match="a file of weights, as deepseek_v4 models take it"):
        make_plan(config("reference", [f"lsa:indexer={weights}"]))


def test_a_mirror_larger_than_the_host_is_refused_with_the_bytes(folder, monkeypatch):
    loaded = load_model(folder, device="cpu")
    monkeypatch.setattr("kvscope.harness.engine.prefill.free_host_bytes", lambda: 1000)
    # Two layers of entries of 32 and keys of 16 elements, 4 bytes each, for 200 tokens: 18.8 KiB.
    with pytest.raises(EnvironmentProblem, match=r"200 tokens .* need 18\.8 KiB and 1000 B"):
        prefill(loaded, [5] * 200)


def test_float16_is_refused(folder):
    with pytest.raises(UsageError, match="do not run in float16"):
        make_plan(config(folder, ["dense"], dtype="float16"))
    with pytest.raises(UsageError, match="do not run in float16"):
        load_model(folder, device="cpu", dtype="float16")


def test_a_model_without_sparse_layers_is_refused():
    with pytest.raises(UsageError, match="none of its layers is of type compressed_sparse_attention"):
        DeepseekV4().shape(tiny_config(layer_types=["sliding_attention"] * 6), element_bytes=4)


def test_the_released_bytes_are_marked_analytic():
    backend = DeepseekV4()
    flash = tiny_config(
        num_hidden_layers=43,
        head_dim=512,
        index_head_dim=128,
        layer_types=["sliding_attention"] * 2
        + ["compressed_sparse_attention", "heavily_compressed_attention"] * 20
        + ["compressed_sparse_attention"],
        mlp_layer_types=["moe"] * 43,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    )
    cache = backend.shape(flash, element_bytes=2).cache
    assert cache.entry_bytes + cache.key_bytes == 1280
    note = backend.note(backend.shape(flash, element_bytes=2), 512 * 1024)
    assert f"{1.88 * 1024:,.0f}"[:4] in note
    assert "analytic" in note
    assert backend.note(backend.shape(tiny_config(), element_bytes=2), 512) is None
