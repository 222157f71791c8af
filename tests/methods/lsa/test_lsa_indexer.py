"""The indexer: its score against the formula, fp8 keys, keys without rotation, folders and what they refuse."""

import json
from dataclasses import replace

import pytest
import torch
from lsa_tools import prefilled, random_indexer, run_steps
from tiny_models import build_stock, loaded_model, prompt_ids

from kvscope.errors import UsageError
from kvscope.harness.engine.models import wrap_model
from kvscope.harness.engine.prefill import prefill
from kvscope.methods.fp8_keys import dequantize, pack, quantize, unpack
from kvscope.methods.kernels.select.kernel import empty_selection
from kvscope.methods.lsa.collectors import ChunkKeys
from kvscope.methods.lsa.indexer import Indexer, IndexerConfig, chunk_features, logit
from kvscope.methods.lsa.indexer_config import default_sizes
from kvscope.methods.lsa.indexer_files import indexer_hash, load_indexer, read_indexer_config
from kvscope.methods.lsa.rule import Rule
from kvscope.methods.registry import create_method

CONFIG = IndexerConfig(
    model="tiny", model_revision="r1", layers=(1, 3), chunk_tokens=16, tau=64, hidden_size=24, key_features=12, heads=3,
    key_dim=5, rank=7, encoder_width=9,
)  # fmt: skip


@torch.inference_mode()
@pytest.mark.parametrize("encoder", ["mean", "stats", "pooled"])
def test_the_score_is_the_formula(encoder):
    """Against plain fp64 loops: low rank, norm, heads, relu, head weights, maximum over layers."""
    indexer = Indexer.untrained(replace(CONFIG, encoder=encoder), seed=3)
    torch.manual_seed(0)
    hidden, tokens = 10 * torch.randn(2, 2, 24), torch.randn(2, 6, 16, 12)
    kind = "tokens" if encoder == "pooled" else "stats"
    keys = [indexer.layer(layer).memory(chunk_features(tokens[i], kind)) for i, layer in enumerate((1, 3))]
    found = indexer.logits(hidden, keys)
    wide = Indexer(indexer.config).double()
    wide.load_state_dict({name: value.double() for name, value in indexer.state_dict().items()})

    def rms(x, weight):
        return x / (x.pow(2).mean() + torch.finfo(torch.float32).eps).sqrt() * weight

    for query in range(2):
        for chunk in range(6):
            scores = []
            for i, layer in enumerate((1, 3)):
                part = wide.layer(layer)
                x = rms(hidden[query, i].double(), part.query.norm_in.weight)
                q = (part.query.up.weight @ rms(part.query.down.weight @ x, part.query.norm.weight)).view(3, 5)
                w = (part.query.weights.weight @ x + part.query.weights.bias) / (3**0.5 * 5**0.5)
                k = keys[i][chunk].double()
                scores.append(float(part.bias) + sum(float(w[h]) * max(0.0, float(q[h] @ k)) for h in range(3)))
            assert float(found[query, chunk]) == pytest.approx(float(max(scores)), abs=1e-5)


def test_scoring_in_blocks_changes_nothing(monkeypatch):
    indexer = Indexer.untrained(CONFIG, seed=0)
    torch.manual_seed(0)
    hidden, keys = torch.randn(2, 2, 24), [torch.randn(50, 5) for _ in range(2)]
    whole = indexer.logits(hidden, keys)
    monkeypatch.setattr("kvscope.methods.lsa.indexer._BLOCK_PRODUCTS", 40)
    torch.testing.assert_close(indexer.logits(hidden, keys), whole)


def test_fp8_keys_keep_three_bits_of_mantissa_and_survive_packing():
    torch.manual_seed(0)
    keys = torch.randn(40, 32) * torch.logspace(-6, 6, 40)[:, None]
    keys[7] = 0
    stored, scale = quantize(keys)
    assert stored.dtype == torch.float8_e4m3fn
    error = (dequantize(stored, scale) - keys).abs()
    assert (error <= keys.abs() / 16 + scale[:, None] * 2**-9).all(), "half a unit of 3 bits, or the smallest subnormal"
    packed = pack(stored, scale)
    assert packed.dtype == torch.uint8
    assert packed.shape == (40, 36)
    again, scale_again = unpack(packed)
    assert torch.equal(again.view(torch.uint8), stored.view(torch.uint8))
    assert torch.equal(scale_again, scale)
    assert torch.isfinite(dequantize(stored, scale)).all()


def test_sizes_follow_the_width():
    assert default_sizes(384) == (8, 32, 64)
    assert default_sizes(4096) == (128, 128, 2048), "the paper's"


def test_a_threshold_needs_no_sigmoid_and_a_budget_breaks_ties_in_order():
    scores = torch.tensor([0.0, 2.0, -1.0, 0.0, 2.0, -3.0])
    assert Rule(threshold=0.5).of_logits(scores).tolist() == [0, 1, 3, 4]
    assert Rule(threshold=0.7).of_logits(scores).tolist() == [1, 4]
    assert float(torch.sigmoid(torch.tensor(logit(0.7)))) == pytest.approx(0.7)
    assert Rule(threshold=0.5, n_most=4).of_logits(scores).tolist() == [0, 1, 3, 4], "no more than are allowed"
    assert Rule(threshold=0.5, n_most=3).of_logits(scores).tolist() == [0, 1, 4]
    assert Rule(threshold=0.7, n_most=3).of_logits(scores).tolist() == [1, 4], "a cap adds nothing"
    assert Rule(threshold=0.5, n_most=0).of_logits(scores).tolist() == []
    assert Rule(n_chunks=3).of_logits(scores).tolist() == [0, 1, 4]
    assert Rule(n_chunks=0).of_logits(scores).tolist() == []
    assert Rule(n_chunks=6).of_logits(scores).tolist() == list(range(6))
    mass = torch.tensor([0.1, 0.4, 0.05, 0.25])
    assert Rule(threshold=0.8).of_mass(mass, torch.tensor(0.2)).tolist() == [1, 3]
    assert Rule(threshold=0.8, n_most=1).of_mass(mass, torch.tensor(0.2)).tolist() == [1]
    assert Rule(threshold=0.1).of_mass(mass, torch.tensor(0.2)).tolist() == [], "what stays is enough"
    assert Rule(n_chunks=2).of_mass(mass, torch.tensor(0.2)).tolist() == [1, 3]


@pytest.mark.parametrize(("family", "options"), [("llama", {}), ("gpt_oss", {}), ("glm4", {}), ("smollm3", {})])
def test_collected_keys_carry_no_position(family, options):
    """The same tokens after a longer prefix give the same layer-0 keys; scaled, partial, interleaved rotations too."""
    stock = build_stock(family, **options)
    loaded = wrap_model(stock, None, name=family, page_tokens=16)
    layer = loaded.shape.layers[0]
    if layer:  # a window or a past would mix into the states of later layers
        loaded = wrap_model(build_stock(family, layer_types=["full_attention"] * 4), None, page_tokens=16)
        layer = 0

    def keys(ids):
        collector = ChunkKeys("keys", layer, chunk_tokens=16, encode=lambda layer, k: k)
        prefill(loaded, ids, collectors=[collector], chunk_tokens=48)
        return collector.finish()

    text = prompt_ids(64, seed=3)
    plain, moved = keys(text), keys([*prompt_ids(96, seed=5), *text])
    torch.testing.assert_close(moved[6:], plain, atol=1e-4, rtol=1e-4)
    collector = ChunkKeys("keys", layer, chunk_tokens=16, encode=lambda layer, k: k)
    collector.unrotated_keys = False
    prefill(loaded, [*prompt_ids(96, seed=5), *text], collectors=[collector], chunk_tokens=48)
    rotated = collector.finish()
    if loaded.rotations[layer] is not None:
        assert (rotated[6:] - plain).abs().max() > 0.1, "with rotation they differ, or this shows nothing"


@pytest.mark.parametrize("chunk_tokens", [5, 16, 24, 100])
def test_chunks_do_not_depend_on_prefill_chunks(chunk_tokens):
    loaded = loaded_model("smollm3")
    found = []
    for prefill_tokens in (16, 64, 208):
        collector = ChunkKeys("keys", 3, chunk_tokens=chunk_tokens, encode=lambda layer, k: k)
        prefill(loaded, prompt_ids(200), collectors=[collector], chunk_tokens=prefill_tokens)
        found.append(collector.finish())
    assert found[0].shape[:2] == (200 // chunk_tokens, chunk_tokens)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-5)


def test_a_folder_round_trip(tmp_path):
    shape = loaded_model("smollm3").shape
    folder = random_indexer(tmp_path / "one", shape, kept_fraction=0.25, trained={"documents": 3})
    indexer = load_indexer(folder)
    assert indexer.config == read_indexer_config(folder)
    again = Indexer.untrained(indexer.config, seed=0)
    for name, value in again.state_dict().items():
        assert torch.equal(value, indexer.state_dict()[name])
    assert indexer_hash(folder) != indexer_hash(random_indexer(tmp_path / "two", shape, seed=1))


def test_an_untrained_indexer_leaves_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    Indexer.untrained(CONFIG, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "spec", "message"),
    [
        ({"model": "other", "model_revision": "sha256:77"}, {}, "trained for model 'other' (sha256:77), this model is"),
        ({"layers": (0, 9)}, {}, "it reads layers 0, 9, and of these kvscope does not manage 9"),
        ({}, {"chunk_tokens": 32}, "trained for chunks of 16 tokens, chunk_tokens=32 was asked for"),
        ({"hidden_size": 99}, {}, "takes hidden states of 99 and keys of 32, this model has 64 and 32"),
    ],
)
def test_an_indexer_of_another_model_layer_or_chunk_size_is_refused(tmp_path, changes, spec, message):
    shape = loaded_model("llama").shape
    folder = random_indexer(tmp_path / "indexer", shape, **changes)
    method = create_method({"name": "lsa", "indexer": str(folder), **spec})
    with pytest.raises(UsageError) as caught:
        method.require(shape)
    assert message in str(caught.value)
    assert "kvscope lsa fit" in str(caught.value)
    assert message in method.unsupported(shape, "cpu")[0]


def test_another_tau_is_allowed_and_on_the_record(tmp_path):
    from lsa_tools import prefilled, run_steps

    loaded = loaded_model("llama")
    folder = random_indexer(tmp_path / "mine", loaded.shape, tau=32)
    method = create_method({"name": "lsa", "indexer": str(folder), "tau": 4})
    prompt = prefilled(loaded, prompt_ids(200), method)
    _, record, footprint = run_steps(loaded, method, prompt, prompt_ids(3))
    assert (record.tau, record.indexer_tau) == (4, 32)
    assert record.indexer == f"mine@{indexer_hash(folder)}"
    assert record.indexer_bytes == load_indexer(folder).weight_bytes
    n_candidates = method.layout(200).n_candidates
    n_layers, states_bytes = len(loaded.shape.layers), len(loaded.shape.layers) * 64 * 4
    assert footprint.metadata_bytes == n_candidates * n_layers * (8 + 4) + 2 * states_bytes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no indexer: config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), "is not an indexer's configuration"),
        (lambda folder: _edit(folder, format=9), "has format 9, this kvscope knows 1"),
        (lambda folder: _edit(folder, novel=1), "unknown keys novel"),
        (lambda folder: _edit(folder, tau=0), "tau must be positive"),
        (lambda folder: _edit(folder, rank=9), "does not fit its config.json"),
        (lambda folder: _edit(folder, segment_tokens=5), "segment_tokens must divide 16, got 5"),
        (lambda folder: _edit(folder, neighbours=-1), "neighbours must be 0 or more, got -1"),
        (lambda folder: _edit(folder, neighbours=2), "does not fit its config.json"),
        (lambda folder: (folder / "indexer.safetensors").unlink(), "cannot be read"),
        (lambda folder: _truncate(folder / "indexer.safetensors"), "cannot be read"),
    ],
)
def test_damaged_folders_get_one_clear_sentence(tmp_path, damage, message):
    shape = loaded_model("llama").shape
    folder = random_indexer(tmp_path / "indexer", shape)
    damage(folder)
    method = create_method({"name": "lsa", "indexer": str(folder)})
    with pytest.raises(UsageError) as caught:
        use(method, shape)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def use(method, shape):
    """What a run does with an indexer before its first prompt, and at that."""
    method.require(shape)
    method._source.module(torch.device("cpu"))


def _edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def test_no_indexer_names_the_way_to_one():
    shape = loaded_model("llama").shape
    with pytest.raises(UsageError) as caught:
        create_method("lsa:chunk_tokens=48").require(shape)
    for word in ("kvscope lsa fit", "selection=synthetic", "indexer=landmark", "48 tokens"):
        assert word in str(caught.value)
    with pytest.raises(UsageError, match="No trained indexer comes with kvscope for this model"):
        create_method("lsa").require(shape)
    with pytest.raises(UsageError, match="There is no indexer 'nowhere'"):
        create_method("lsa:indexer=nowhere").require(shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("threshold=0", "threshold must lie between 0 and 1"),
        ("threshold=1", "threshold must lie between 0 and 1"),
        ("threshold=nan", "option 'threshold' expects a number, got 'nan'"),
        ("tau=0", "tau must be 1 or more, got 0"),
        ("tau=-3", "tau must be 1 or more"),
        ("mode=all", "mode must be threshold or budget, got 'all'"),
        ("mode=budget", "mode=budget needs budget_tokens or budget_fraction"),
        ("mode=threshold,budget_tokens=5", "a budget belongs to mode=budget"),
        ("budget_tokens=5,budget_fraction=0.5", "not both"),
        ("budget_tokens=5,threshold=0.3", "a threshold or a budget, not both"),
        ("budget_tokens=-1", "budget_tokens must be 0 or more"),
        ("budget_fraction=1.5", "above 0 and at most 1"),
        ("chunk_tokens=0", "chunk_tokens must be 1 or more"),
        ("sink_tokens=-1", "sink_tokens must be 0 or more"),
        ("recency_tokens=-1", "recency_tokens must be 0 or more"),
        ("fallback_ratio=1", "fallback_ratio must lie between 0 and 1"),
        ("cap_tokens=0", "cap_tokens must be 1 or more, got 0"),
        ("cap_tokens=9,budget_tokens=5", "a budget is its own bound"),
        ("cap_tokens=9,fallback_ratio=0.5", "give cap_tokens or fallback_ratio"),
        ("cap_fraction=1.5", "cap_fraction must be above 0 and at most 1, got 1.5"),
        ("cap_fraction=0.1,budget_tokens=5", "cap_fraction bounds what a threshold keeps"),
        ("cap_fraction=0.1,fallback_ratio=0.5", "give cap_fraction or fallback_ratio"),
        ("least_tokens=-1", "least_tokens must be 0 or more, got -1"),
        ("least_fraction=-0.1", "least_fraction must be between 0 and 1, got -0.1"),
        ("least_fraction=7", "least_fraction must be between 0 and 1, got 7"),
        ("least_fraction=0.1,budget_tokens=5", "least_fraction fills up what a threshold keeps; a budget keeps"),
        ("least_tokens=9,budget_fraction=0.5", "least_tokens fills up what a threshold keeps"),
        ("refresh=late", "refresh must be sync or stale1, got 'late'"),
        ("selection=lucky", "selection must be trained or synthetic"),
        ("selection=synthetic", "selection=synthetic needs a budget"),
        ("selection=synthetic,budget_tokens=5,churn=1.5", "churn must be between 0 and 1"),
        ("churn=0.5", "churn belongs to selection=synthetic"),
        ("selection=synthetic,budget_tokens=5,indexer=attention", "indexer cannot be given"),
    ],
)
def test_bad_options_get_one_clear_sentence(options, message):
    with pytest.raises(UsageError) as caught:
        create_method(f"lsa:{options}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


CUT = {"segment_tokens": 2, "neighbours": 3}


@pytest.mark.parametrize("cut", [{}, {"segment_tokens": 1}, {"neighbours": 2}, CUT])
@pytest.mark.parametrize("rule", [{"budget_fraction": 0.5}, {"threshold": 0.5}, {"threshold": 0.4, "cap_tokens": 120}])
def test_the_kernels_choose_what_torch_chooses(tmp_path, rule, cut):
    """The kernel in Triton's interpreter here, on a GPU as it is."""
    loaded = loaded_model("smollm3")
    folder = random_indexer(tmp_path / "indexer", loaded.shape, chunk_tokens=4, key_dim=16, lookback_tokens=3, **cut)
    method = create_method({"name": "lsa", "indexer": str(folder), "recency_tokens": 20, **rule})
    prompt = prefilled(loaded, prompt_ids(402), method, chunk_tokens=64)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    selector = method.open(prompt, device)._selector
    selector.kernel_reasons = ["not here"]
    if "threshold" in rule:  # scores of random weights have no middle of their own
        _shift_to_the_median(selector)
    logits_n, chosen = selector.logits().amax(0), selector.choose()
    selector.kernel_reasons = []
    kernel_logits_Rn = selector.logits()
    assert kernel_logits_Rn.is_contiguous()
    assert kernel_logits_Rn.shape == (1 if cut else 3 * len(loaded.shape.layers), method.layout(402).n_candidates)
    spread = float(logits_n.std())
    torch.testing.assert_close(kernel_logits_Rn.amax(0), logits_n, atol=2e-3 * spread, rtol=1e-3)
    by_kernel = selector.choose()
    assert 0 < len(chosen) < len(logits_n)
    assert len(set(by_kernel.tolist()) ^ set(chosen.tolist())) <= 2, "rounding may move a chunk at the very edge"
    out = empty_selection(len(logits_n), len(logits_n), device)
    assert selector.choose_into(out) == len(by_kernel)
    assert out.chunks_K[: int(out.n)].tolist() == by_kernel.tolist()
    assert out.wanted_n.nonzero()[:, 0].tolist() == by_kernel.tolist()


@pytest.mark.parametrize("decode_graph", ["off", "uncaptured"])
def test_a_cap_keeps_the_best_of_what_a_threshold_asks_for(tmp_path, decode_graph):
    """From the option or from the indexer; never more tokens, at every refresh."""
    loaded = loaded_model("smollm3")
    plain = random_indexer(tmp_path / "plain", loaded.shape, chunk_tokens=4, lookback_tokens=3)
    capped = random_indexer(tmp_path / "capped", loaded.shape, chunk_tokens=4, lookback_tokens=3, cap_tokens=160)
    options = {"name": "lsa", "recency_tokens": 20, "tau": 2, "threshold": 0.001}
    tokens = prompt_ids(8, seed=8)

    def resident(indexer, **more):
        method = create_method({**options, "indexer": str(indexer), **more})
        prompt = prefilled(loaded, prompt_ids(402), method, chunk_tokens=64)
        logits, record, _ = run_steps(loaded, method, prompt, tokens, decode_graph=decode_graph)
        return method, logits, record.resident_tokens

    method, by_indexer, kept = resident(capped)
    assert method.effective_config(402, loaded.shape)["cap_tokens"] == 160
    most_tokens = 160
    assert most_tokens - 4 < max(kept) <= most_tokens
    _, by_option, same = resident(plain, cap_tokens=160)
    assert same == kept
    torch.testing.assert_close(by_option, by_indexer, atol=1e-6, rtol=0)
    method, _, more = resident(plain)
    assert method.effective_config(402, loaded.shape)["cap_tokens"] is None
    assert max(more) > most_tokens
    assert resident(capped, cap_tokens=402)[2] == more, "a cap beyond the prompt takes the indexer's cap away"
    assert resident(capped, fallback_ratio=0.9)[2] >= more, "what makes an interval whole is not cut"
    assert method.predict(loaded.shape, 402).kv_bytes > resident(capped)[0].predict(loaded.shape, 402).kv_bytes


@pytest.mark.parametrize(
    ("caps", "most_tokens"),
    [({"cap_tokens": 160, "cap_fraction": 0.25}, 160), ({"cap_tokens": 60, "cap_fraction": 0.25}, 100)],
)
def test_a_cap_grows_with_the_prompt_from_where_its_fraction_is_more(tmp_path, caps, most_tokens):
    """A quarter of 402 tokens is 100: more than 60, less than 160."""
    loaded = loaded_model("smollm3")
    folders = {name: tmp_path / name for name in ("plain", "capped")}
    random_indexer(folders["plain"], loaded.shape, chunk_tokens=4)
    random_indexer(folders["capped"], loaded.shape, chunk_tokens=4, **caps)
    by_option = create_method({"name": "lsa", "indexer": str(folders["plain"]), **caps})
    by_indexer = create_method({"name": "lsa", "indexer": str(folders["capped"])})
    for method in (by_option, by_indexer):
        layout = method.layout(402)
        assert method.rule(layout).n_most == layout.budgeted_chunks(most_tokens)
        assert method.effective_config(402, loaded.shape)["cap_tokens"] == most_tokens
        assert method.effective_config(4000, loaded.shape)["cap_tokens"] == 1000
    alone = create_method({"name": "lsa", "indexer": str(folders["capped"]), "cap_tokens": 60})
    assert alone.effective_config(4000, loaded.shape)["cap_tokens"] == 60, "an option takes the whole cap's place"


def _shift_to_the_median(selector):
    with torch.inference_mode():
        shift = selector.logits().amax(0).median()
        for layer in selector._layers:
            selector._indexer.layer(layer).bias.sub_(shift)
