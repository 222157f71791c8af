"""Over compressed entries: a document holds what the stock model does, and an indexer learns from it alone."""

import math
from dataclasses import replace

import pytest
import torch
from compressed_tiny import random_model
from safetensors.torch import load_file

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.indexers.collection.collect import CollectConfig, collect
from kvscope.harness.indexers.collection.reading import Collection
from kvscope.harness.indexers.lsa.calibrate import CalibrateConfig, calibrate
from kvscope.harness.indexers.lsa.evaluate import evaluate
from kvscope.harness.indexers.lsa.measuring import EvalConfig, measuring_options
from kvscope.harness.indexers.lsa.objective import example, refresh_logits
from kvscope.harness.indexers.lsa.train import train
from kvscope.harness.indexers.lsa.train_config import TrainConfig
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.sweep import run
from kvscope.methods.fp8_keys import dequantize
from kvscope.methods.indexer_files import WEIGHTS_FILE
from kvscope.methods.lsa.compressed import CompressedIndexer, stored_keys
from kvscope.methods.lsa.indexer_files import load_indexer, read_indexer_config
from kvscope.tasks import needle

pytestmark = pytest.mark.usefixtures("no_figure")
PAPER = {"voters": "index", "top_p": 0.6, "votes": 1, "least_mass": 0.001}
OURS = {"voters": "layer", "top_p": 0.9, "votes": 1, "least_mass": 0.01}


@pytest.fixture(scope="module", autouse=True)
def short_answers():
    """A model of random weights says as much as it may: 32 tokens are as good as 128."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(needle, "NEW_TOKENS", 32)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with the reference model's tokenizer, all of whose entries its top-k takes."""
    from transformers import AutoTokenizer

    where = tmp_path_factory.mktemp("models") / "tiny-v4"
    tokenizer = AutoTokenizer.from_pretrained(str(REFERENCE_MODEL_FOLDER))
    random_model(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        index_topk=1024,
    ).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return str(where)


def asked(folder, **changes):
    values = {"model": folder, "tasks": ("niah_single_1",), "lengths_tokens": (512,), "samples": 8, "seed": 1000,
              "least_mass": 0.0001, "device": "cpu", "shard_documents": 4}  # fmt: skip
    return CollectConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    return collect(asked(folder), tmp_path_factory.mktemp("data") / "entries", progress=Progress())


def test_a_document_holds_keys_states_and_what_the_model_attended_to(folder, data):
    """Fed again with stock attention weights, the stock model gives the masses that were stored."""
    collection = Collection(data)
    info, document = collection.info, collection.load(0)
    assert (info.features, info.chunk_tokens, info.state_tokens, info.layers) == ("entries", 4, 1, (1, 4))
    # Two CSA layers of entries of 32 and keys of 16, two HCA layers of one entry for 32 tokens, fp32.
    assert (info.kv_bytes_per_token, info.kept_bytes_per_token) == (2 * 48 * 4 // 4 + 8, 8)
    n = document.info.prompt_tokens // 4
    assert document.features.shape == (2, n, 16)
    assert document.hidden.shape == (1 + document.info.n_steps, 2, 64)
    assert document.angles.shape == (1 + document.info.n_steps, 2, 8)
    loaded = load_model(folder, device="cpu")
    from kvscope.tasks.registry import create_task

    ids = create_task("niah_single_1").build(loaded.tokenizer, length_tokens=512, sample=0, seed=1000).ids
    stock = random_model(**{name: getattr(loaded.model.config, name) for name in ("vocab_size", "index_topk")})
    scores = {}
    handles = [
        stock.model.layers[layer].self_attn.compressor.indexer.scorer.register_forward_hook(
            lambda module, args, out, layer=layer: scores.__setitem__(layer, out)
        )
        for layer in info.layers
    ]
    with torch.inference_mode():
        out = stock(torch.tensor([ids]), output_attentions=True, use_cache=False)
    for handle in handles:
        handle.remove()
    expected = [out.attentions[layer][0, :, -1, len(ids) :][:, :n].mean(0) for layer in info.layers]
    expected += [torch.softmax(scores[layer][0, -1, :n], 0) for layer in info.layers]
    rows = slice(int(document.indptr[0]), int(document.indptr[1]))
    voters = [0, 1, 2 + 2 * 4, 2 + 2 * 4 + 1]  # two layers, four heads of each, then the native indexers
    for voter, mass_n in zip(voters, expected, strict=True):
        mine = torch.zeros(n)
        of_voter = document.voters[rows] == voter
        mine[document.indices[rows][of_voter].long()] = document.values[rows][of_voter].float()
        torch.testing.assert_close(mine, torch.where(mass_n >= 1e-4, mass_n, 0.0), atol=2e-4, rtol=1e-2)


def test_the_native_indexer_beside_the_shards_scores_as_the_model_does(folder, data):
    """Its choice of the next step is that of the model's own indexer, but for the rounding of keys to fp8."""
    document = Collection(data).load(0)
    native = CompressedIndexer.of(load_indexer(data / "native"))
    loaded = load_model(folder, device="cpu")
    for at, layer in enumerate((1, 4)):
        attention = loaded.model.model.layers[layer].self_attn
        state = document.hidden[1, at].float()[None, None]
        with torch.inference_mode():
            low = attention.q_a_norm(attention.q_a_proj(state))
            position = torch.tensor([[document.info.prompt_tokens]])
            cos, sin = loaded.model.model.rotary_emb(state, position_ids=position, layer_type="compress")
            from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

            indexer = attention.compressor.indexer
            q = indexer.q_b_proj(low).view(1, 1, -1, indexer.head_dim).transpose(1, 2)
            q = apply_rotary_pos_emb(q, cos, sin).transpose(1, 2)
            expected = indexer.scorer(q, document.features[at].float()[None], state)[0, 0]
        keys = dequantize(*stored_keys(document.features[at]))
        cos_P, sin_P = document.angles[1]
        mine = native.layers[layer].logits(state[0], cos_P[None], sin_P[None], keys)[0]
        torch.testing.assert_close(mine, expected, atol=0.06 * float(expected.abs().max()), rtol=0.05)
        assert torch.corrcoef(torch.stack([mine, expected]))[0, 1] > 0.995


@pytest.fixture(scope="module")
def indexer(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("indexers") / "trained"
    config = TrainConfig(tau=4, recency_tokens=64, **OURS, negatives=3, epochs=8, lr=3e-3, held_out=0.25, patience=99,
                         device="cpu", keep="loss")  # fmt: skip
    return out, train([data], out, config, note=lambda text: None)


def test_an_indexer_learns_from_shards_alone(data, indexer):
    folder, best = indexer
    config = read_indexer_config(folder)
    assert (config.encoder, config.lookback_tokens, config.neighbours, config.tau) == ("compressed_key", 1, 0, 4)
    assert set(load_file(folder / WEIGHTS_FILE)) == {
        f"layers.{layer}.{name}" for layer in (1, 4) for name in ("w_dq", "norm", "w_iuq", "w_w", "bias")
    }
    begun = load_indexer(data / "native")
    trained = load_indexer(folder)
    assert float(trained.layer(1).bias.detach()) < -0.5, "few entries pass from the start on"
    assert not torch.equal(begun.layer(1).w_iuq, trained.layer(1).w_iuq)
    assert best["epoch"] > 1, "an epoch of training is better on held-out documents than what came before it"


def test_what_trains_scores_as_what_decodes(data, indexer):
    folder, _ = indexer
    options = measuring_options(read_indexer_config(folder), EvalConfig(**OURS, recency_tokens=64))
    collection, trained = Collection(data), load_indexer(folder)
    found = example((collection, 0), options)
    rows = found.document.refresh_rows(4)
    with torch.inference_mode():
        scored = refresh_logits(trained, found, rows, 1)
        decoding = CompressedIndexer.of(trained)
        keys = {
            layer: stored_keys(found.document.features[at][found.first : found.last]) for at, layer in enumerate((1, 4))
        }
        for at, row in enumerate(rows.tolist()):
            states = {layer: found.document.hidden[row, place] for place, layer in enumerate((1, 4))}
            expected = decoding.logits(states, *found.document.angles[row], keys)
            torch.testing.assert_close(scored[at], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("labels", [PAPER, OURS])
def test_both_rules_label_and_the_threshold_is_set(data, indexer, tmp_path, labels):
    folder, _ = indexer
    measure = EvalConfig(**labels, recency_tokens=64)
    found = calibrate([data], str(folder), tmp_path / "set", CalibrateConfig(target_kept=0.6, measure=measure),
                      device="cpu")  # fmt: skip
    assert 0.4 < found["after"]["kept"] <= 0.6
    rows = evaluate([data], str(tmp_path / "set"), tmp_path / "recall", measure, device="cpu")
    at_half = next(
        row for row in rows if (row["policy"], row["setting"], row["value"]) == ("indexer", "threshold", 0.5)
    )
    assert at_half["kept_bytes_fraction"] == pytest.approx(found["after"]["kept"], abs=1e-4)
    assert at_half["refreshes_needing"] > 0


def test_votes_of_native_indexers_follow_the_papers_rule(data):
    collection = Collection(data)
    rule = collection.info.rule(voters="index", top_p=0.6, least_mass=1e-4)
    document = collection.load(0)
    votes = document.votes(rule, collection.info)
    first = slice(int(document.indptr[0]), int(document.indptr[1]))
    expected = torch.zeros(votes.shape[1], dtype=torch.int32)
    for voter in (10, 11):
        mine = document.voters[first] == voter
        values, order = document.values[first][mine].double().sort(descending=True, stable=True)
        decoded = document.rest[0, voter].double()  # takes part in the ranking
        taken = values.cumsum(0) - values + torch.where(decoded > values, decoded, 0.0) < 0.6
        expected[document.indices[first][mine][order][taken].long()] += 1
    assert torch.equal(votes[0], expected)
    assert 0 < int((expected >= 2).sum()) < int((expected >= 1).sum())


def test_a_trained_folder_runs_as_a_method_with_its_own_tau_and_cap(folder, indexer, data, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    place, _ = indexer
    capped = CalibrateConfig(target_kept=0.6, cap_fraction=0.5, measure=EvalConfig(**OURS, recency_tokens=64))
    calibrate([data], str(place), tmp_path / "set", capped, device="cpu")
    spec = f"lsa:indexer={tmp_path / 'set'},recency_tokens=64"
    methods = [
        "dense",
        spec,
        f"{spec},policy=pages,page_tokens=32,pages=4",
        f"{spec},refresh=stale1",
        f"{spec},threshold=0.99,least_fraction=0.6",
    ]
    config = make_config(
        {"model": folder, "methods": methods, "tasks": ["niah_single_1"], "lengths_tokens": [512], "samples": 2,
         "max_new_tokens": 12, "footprint": False, "device": "cpu"}
    )  # fmt: skip
    plan = make_plan(config)
    lsa = plan.methods[1]
    assert lsa.effective_config(512, plan.facts.shape)["tau"] == 4
    kept = read_indexer_config(tmp_path / "set").kept_fraction
    # Of 128 entries sinks and window have 17; the cap leaves room for 47 others.
    assert lsa.n_kept(512) == 17 + min(47, math.ceil(kept * 111)) < 128
    assert plan.methods[4].n_kept(512) == 64, "filled up to what the cap leaves"
    shown = run(config, out=tmp_path / "run", progress=False)
    assert (shown.samples["status"] == "ok").all()
    for row in shown.samples[shown.samples["method"] == "lsa"].to_dict("records"):
        residency = row["residency"]
        assert residency["indexer"].startswith("set@")
        assert residency["indexer_tau"] == 4
        assert len(residency["resident_tokens"]) == 3
        assert row["host_kv_bytes"] > 0
        if "least" in row["method_label"]:
            assert min(residency["resident_tokens"]) > 0.5 * residency["prompt_tokens"] - 8
        if "pages" not in row["method_label"]:
            assert max(residency["resident_tokens"]) <= 0.5 * residency["prompt_tokens"] + 4
        else:
            assert residency["resident_tokens"][0] < 0.6 * residency["prompt_tokens"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chunk_tokens": 16}, "a chunk of model 'tiny-v4' is one of its entries of 4 tokens"),
        ({"token_samples": 8}, "keeps compressed entries, no tokens"),
        ({"layers": (2,)}, "Layers 2 of model 'tiny-v4' cannot be indexed"),
    ],
)
def test_options_of_tokens_are_refused(folder, tmp_path, changes, words):
    with pytest.raises(UsageError, match=words):
        collect(asked(folder, **changes), tmp_path / "data", progress=Progress())


def test_what_lends_is_refused_in_training(data, tmp_path):
    with pytest.raises(UsageError, match="have one key each and lend nothing"):
        train([data], tmp_path / "out", TrainConfig(neighbours=2, device="cpu"), note=lambda text: None)


def test_voters_that_were_not_recorded_are_refused(data):
    info = Collection(data).info
    rule = replace(info, features="tokens")
    with pytest.raises(UsageError, match="voters=index asks the native indexers"):
        rule.rule(voters="index")


def test_the_commands_make_one_end_to_end(folder, tmp_path, capsys):
    """collect, train and eval as a user types them."""
    data, out = tmp_path / "data", tmp_path / "indexer"
    arguments = ["lsa", "collect", "--model", folder, "--task", "niah_single_1", "--length", "512", "-n", "3", "--seed",
                 "1001", "--device", "cpu", "--least-mass", "0.001", "--out", str(data), "--quiet"]  # fmt: skip
    assert cli.app(arguments, standalone_mode=False) in (0, None)
    train_ = ["lsa", "train", "--data", str(data), "--out", str(out), "--voters", "index", "--top-p", "0.6", "--epochs",
              "1", "--keep", "loss", "--device", "cpu", "--quiet", "--held-out", "0.4"]  # fmt: skip
    assert cli.app(train_, standalone_mode=False) in (0, None)
    assert read_indexer_config(out).encoder == "compressed_key"
    capsys.readouterr()


@pytest.mark.parametrize("warm", [True, False])
def test_fewer_layers_begin_at_theirs_of_the_models_own(data, tmp_path, warm):
    config = TrainConfig(layers=(4,), warm_start=warm, recency_tokens=64, **OURS, epochs=1, lr=1e-9, held_out=0.25,
                         keep="loss", device="cpu")  # fmt: skip
    train([data], tmp_path / "out", config, note=lambda text: None)
    assert read_indexer_config(tmp_path / "out").layers == (4,)
    native, found = load_indexer(data / "native"), load_indexer(tmp_path / "out")
    assert torch.allclose(native.layer(4).w_iuq, found.layer(4).w_iuq, atol=1e-4) is warm
