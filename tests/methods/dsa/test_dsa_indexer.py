"""The lightning indexer under the method: its score, its keys, its bytes, and which model it may be used on."""

import json
from dataclasses import replace

import pytest
import torch
from calls import attention_call
from dsa_tools import random_indexer
from sequences import prefilled
from sessions import Single
from tiny_models import loaded_model, prompt_ids

from kvscope.errors import UsageError
from kvscope.harness.engine.decode import decode
from kvscope.harness.indexers.dsa.train import CARD_FILE, card_text
from kvscope.harness.passes.facts import describe_model
from kvscope.methods.dsa import indexer_files
from kvscope.methods.dsa.lightning import Lightning, LightningConfig, default_sizes, lightning_scores
from kvscope.methods.fp8_keys import dequantize, quantize, unpack
from kvscope.methods.registry import create_method

CONFIG = LightningConfig(model="tiny", model_revision="r1", layers=(1, 3), hidden_size=24, heads=3, key_dim=5)
N_TOKENS = 150


@torch.inference_mode()
def test_the_score_is_the_formula():
    """Against plain fp64 loops: norm, queries, layer-normed keys, relu, head weights."""
    torch.manual_seed(1)
    layer = Lightning(CONFIG).layer(3)
    for parameter in layer.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    hidden = torch.randn(7, 24)
    q_XIE, weight_XI = layer.queries(hidden[-2:])
    found = lightning_scores(q_XIE, layer.keys(hidden), weight_XI)
    weights = {name: value.double() for name, value in layer.state_dict().items()}

    def normed(x):
        return x / (x.square().mean() + torch.finfo(torch.float32).eps).sqrt() * weights["norm.weight"]

    for row, query_state in enumerate(hidden[-2:].double()):
        x = normed(query_state)
        queries = (weights["q.weight"] @ x).view(3, 5)
        head_weights = weights["weights.weight"] @ x + weights["weights.bias"]
        for token, state in enumerate(hidden.double()):
            key = weights["k.weight"] @ normed(state)
            key = (key - key.mean()) / (key.var(unbiased=False) + 1e-5).sqrt()
            key = key * weights["k_norm.weight"] + weights["k_norm.bias"]
            expected = sum(
                float(head_weights[head]) * max(0.0, float(queries[head] @ key) / 5**0.5) / 3**0.5 for head in range(3)
            )
            assert float(found[row, token]) == pytest.approx(expected, abs=1e-5)


def test_bytes_of_weights_and_keys_are_those_of_the_tensors():
    layer = Lightning(CONFIG).layer(1)
    assert CONFIG.layer_weight_bytes == sum(p.numel() * p.element_size() for p in layer.parameters())
    assert CONFIG.token_key_bytes == 5 + 4
    n_bytes, n_flops = CONFIG.scan_reads(100)
    assert n_bytes == 100 * 9 + CONFIG.layer_weight_bytes
    assert n_flops == 2 * (24 * (15 + 5 + 3) + 100 * 3 * 6)


def test_sizes_follow_the_model():
    assert default_sizes(6, 64) == (6, 32), "the reference model"
    assert default_sizes(128, 256) == (64, 128), "DeepSeek's own, at most"
    assert default_sizes(2, 8) == (2, 8)


@pytest.mark.parametrize("model", ["llama", "afmoe"])
def test_keys_of_decoded_tokens_are_those_a_prefill_would_have_collected(model, tmp_path):
    loaded = loaded_model(model)
    spec = {"name": "dsa", "indexer": str(random_indexer(tmp_path / "indexer", loaded.shape)), "budget_tokens": 4096}
    method, ids = create_method(spec), prompt_ids(N_TOKENS)
    prompt, longer = (prefilled(loaded, part, [spec], chunk_tokens=64) for part in (ids[:-30], ids))
    with Single(loaded, method, prompt, reserve_tokens=5) as session:  # 25 tokens more than was reserved
        for token in ids[-30:]:
            session.step(token)
        store = session.sequence._store
        for layer in loaded.shape.layers:
            keys, scale = unpack(longer.metadata[method._keys_name()][layer])
            expected = dequantize(keys, scale)
            found = dequantize(store._keys[layer], store._scales[layer])[:N_TOKENS]
            # Dense here, so both saw equal states but for roundings, which fp8 may turn into one step.
            assert (found - expected).abs().max() < 0.1 * expected.abs().max()
            assert (found - expected).abs().mean() < 1e-3


def test_tokens_read_are_the_best_by_score_and_forks_do_not_meet(tmp_path):
    loaded = loaded_model("llama")
    spec = {"name": "dsa", "indexer": str(random_indexer(tmp_path / "indexer", loaded.shape)), "budget_tokens": 9}
    method, shape = create_method(spec), loaded.shape
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), [spec])
    method.require(shape)
    layer, draws = shape.layers[-1], torch.Generator().manual_seed(3)
    indexer = method._source.module(torch.device("cpu")).layer(layer)
    keys = dequantize(*unpack(prompt.metadata[method._keys_name()][layer]))
    sequence, other = (method.open(prompt, "cpu", reserve_tokens=4) for _ in range(2))
    k_HTD, v_HTD = (prompt.pages[layer][:, :, i].transpose(0, 1).flatten(1, 2)[:, :N_TOKENS] for i in (0, 1))
    for _ in range(4):
        hidden = 3 * torch.randn(1, shape.hidden_size, generator=draws)
        q = torch.randn(1, shape.n_q_heads, 1, shape.head_dim, generator=draws)
        k, v = (torch.randn(1, shape.n_kv_heads, 1, shape.head_dim, generator=draws) for _ in range(2))
        sequence.observe(layer, hidden)
        out = sequence.attend(layer, attention_call(q, k, v, scale=0.25))
        score = lightning_scores(*_query(indexer, hidden, keys))[0]
        best = [*score.topk(8).indices.tolist(), len(keys)]
        k_HTD, v_HTD = torch.cat([k_HTD, k[0]], 1), torch.cat([v_HTD, v[0]], 1)
        q_HGD = q.view(shape.n_kv_heads, -1, shape.head_dim)
        expected = torch.softmax(0.25 * q_HGD @ k_HTD[:, best].transpose(1, 2), -1) @ v_HTD[:, best]
        torch.testing.assert_close(out.view_as(expected), expected, atol=2e-6, rtol=0)
        keys = torch.cat([keys, dequantize(*_stored(indexer, hidden))])
    assert (sequence._store._lengths[layer], other._store._lengths[layer]) == (N_TOKENS + 4, N_TOKENS)
    assert not other._store._keys[layer][N_TOKENS:].float().any()


def _query(indexer, hidden, keys):
    q_XIE, weight_XI = indexer.queries(hidden)
    return q_XIE, keys, weight_XI


def _stored(indexer, hidden):
    return quantize(indexer.keys(hidden))


def test_rows_name_the_indexer_and_count_its_bytes(tmp_path):
    loaded = loaded_model("llama")
    folder = random_indexer(tmp_path / "mine", loaded.shape)
    spec = {"name": "dsa", "indexer": str(folder), "budget_tokens": 32}
    method, prompt = create_method(spec), prefilled(loaded, prompt_ids(N_TOKENS), [spec])
    result = decode(loaded, method, prompt, prompt_ids(1), max_new_tokens=3)
    n_layers = len(loaded.shape.layers)
    n_room = -(-(N_TOKENS + 3) // loaded.shape.page_tokens) * loaded.shape.page_tokens
    assert result.footprint_last.metadata_bytes == n_layers * n_room * (8 + 4)
    assert result.footprint_last == method.predict(loaded.shape, N_TOKENS, 3)
    assert method.selection == "trained"
    assert create_method("dsa:indexer=oracle").selection == "free"
    assert create_method("dsa:selection=synthetic").selection == "synthetic"
    assert method.effective_config(N_TOKENS, loaded.shape)["indexer"].startswith("mine@")
    other = create_method({**spec, "indexer": str(random_indexer(tmp_path / "other", loaded.shape, seed=1))})
    assert method._keys_name() != other._keys_name()
    with pytest.raises(ValueError, match="prefilled without this method's collectors"):
        other.require(loaded.shape) or other.open(prompt, "cpu")


def test_the_shipped_indexer_of_the_model_is_found(tmp_path, monkeypatch):
    shape, foreign = loaded_model("llama").shape, loaded_model("gemma3").shape
    random_indexer(tmp_path / "theirs", foreign, model_revision="sha256:theirs")
    random_indexer(tmp_path / "ours", shape)
    method = create_method("dsa")
    monkeypatch.setattr(method._source, "_files", _shipped_in(tmp_path))
    method.require(shape)
    assert method.effective_config(N_TOKENS, shape)["indexer"].startswith("ours@")
    assert method.effective_config(N_TOKENS)["indexer"].startswith("ours@"), "the model is known by now"


def _shipped_in(folder):
    return replace(indexer_files.FILES, shipped_folder=folder)


def test_no_indexer_names_the_way_to_one():
    shape = loaded_model("llama").shape
    with pytest.raises(UsageError) as caught:
        create_method("dsa").require(shape)
    for word in ("kvscope lsa collect --token-samples", "kvscope dsa train", "selection=synthetic", "indexer=oracle"):
        assert word in str(caught.value)
    assert create_method("dsa").unsupported(shape, "cpu") == [str(caught.value).rstrip(".")]
    with pytest.raises(UsageError, match="There is no indexer 'nowhere'"):
        create_method("dsa:indexer=nowhere").require(shape)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_revision": "sha256:else"},
            "trained for model 'tiny' (sha256:else), this model is of no known revision",
        ),
        ({"layers": (0, 1, 7)}, "it reads layers 0, 1, 7, and of these kvscope does not manage 7"),
        ({"layers": (0, 1)}, "it has layers 0, 1, and kvscope manages 0, 1, 2, 3 in this model"),
        ({"hidden_size": 32}, "it takes hidden states of 32, this model has 64"),
    ],
)
def test_an_indexer_of_another_model_is_refused_naming_both(tmp_path, changes, message):
    shape = loaded_model("llama").shape
    folder = random_indexer(tmp_path / "indexer", shape, **changes)
    with pytest.raises(UsageError) as caught:
        create_method({"name": "dsa", "indexer": str(folder)}).require(shape)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"kind": "lsa"}, "is one for lsa, dsa was asked for; give a folder that kvscope dsa train wrote"),
        ({"heads": 0}, "heads must be positive"),
        ({"key_dim": 9}, "does not fit its config.json"),
        ({"novel": 1}, "unknown keys novel"),
    ],
)
def test_damaged_folders_get_one_clear_sentence(tmp_path, damage, message):
    shape = loaded_model("llama").shape
    folder = random_indexer(tmp_path / "indexer", shape)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damage}))
    method = create_method({"name": "dsa", "indexer": str(folder)})
    with pytest.raises(UsageError) as caught:
        method.require(shape) or method._source.module(torch.device("cpu"))
    assert message in str(caught.value)
    with pytest.raises(UsageError):
        create_method({"name": "lsa", "indexer": str(folder)}).require(shape)


@pytest.mark.parametrize("name", indexer_files.FILES.shipped_names())
def test_a_shipped_indexer_loads_and_fits_its_model(name):
    """Retraining the reference model makes its indexer another model's: this is where that shows."""
    folder = indexer_files.FILES.folder(name)
    config = indexer_files.FILES.load(folder).config
    assert (folder / CARD_FILE).read_text(encoding="utf-8") == card_text(config), "the card is of another training"
    if config.model == "reference":
        assert indexer_files.mismatch(config, describe_model("reference").shape) is None
