"""Segments and lending: scores against a plain loop, training against decoding, evicting against masking, bytes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lsa_tools import prefilled, random_indexer, run_steps
from masked import masking
from planted import planted_collection
from sessions import Single
from tiny_models import loaded_model, prompt_ids

from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.indexers.collection.collect import CollectConfig, collect, make_tasks
from kvscope.harness.indexers.collection.reading import Collection
from kvscope.harness.indexers.lsa.objective import (
    document_loss,
    draw_negatives,
    example,
    focal_loss,
    near,
    row_logits,
    shift_to_recall,
)
from kvscope.harness.indexers.lsa.train import indexer_config
from kvscope.harness.indexers.lsa.train_config import TrainConfig
from kvscope.harness.indexers.lsa.warm_start import warm_start
from kvscope.harness.passes.progress import Progress
from kvscope.methods.fp8_keys import dequantize, quantize
from kvscope.methods.lsa.collectors import ChunkKeys
from kvscope.methods.lsa.indexer import Indexer, IndexerConfig
from kvscope.methods.lsa.indexer_files import load_indexer
from kvscope.methods.lsa.method import Lsa
from kvscope.methods.lsa.options import LsaConfig
from kvscope.methods.registry import create_method

MANY = {"chunk_tokens": 12, "segment_tokens": 4, "neighbours": 2, "lookback_tokens": 3}
SHAPES = [MANY, {"chunk_tokens": 16, "segment_tokens": 2}, {"chunk_tokens": 16, "neighbours": 3}]


def make(**changes):
    """A small indexer that lends at a price of its own for each distance."""
    values = {
        "model": "tiny", "model_revision": "r1", "layers": (1, 3), "chunk_tokens": 16, "tau": 1, "hidden_size": 24,
        "key_features": 12, "heads": 2, "key_dim": 6, "rank": 6, "encoder_width": 5,
    }  # fmt: skip
    indexer = Indexer.untrained(IndexerConfig(**{**values, **changes}), seed=1)
    return priced(indexer)


def priced(indexer):
    if indexer.config.neighbours:
        with torch.no_grad():
            indexer.lent.copy_(torch.linspace(-0.02, 0.01, len(indexer.lent)))
    return indexer


def plain_scores(logits, *, per_chunk, lent):
    """The formula, one segment after another; -infinity lends nothing."""
    reach, n = len(lent) // 2, len(logits)
    prices = dict(zip([d for d in range(-reach, reach + 1) if d], lent, strict=True))
    best = [
        max([logits[s], *(logits[s + d] + price for d, price in prices.items() if 0 <= s + d < n)]) for s in range(n)
    ]
    return [max(best[start : start + per_chunk]) for start in range(0, n, per_chunk)]


@settings(max_examples=60, deadline=None)
@given(
    per_chunk=st.sampled_from([1, 2, 4, 8]),
    n_chunks=st.integers(1, 6),
    reach=st.integers(0, 9),
    absent=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_chunk_scores_as_a_plain_loop_says(per_chunk, n_chunks, reach, absent, seed):
    indexer = make(segment_tokens=16 // per_chunk, neighbours=reach)
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn((3, per_chunk * n_chunks), generator=draws)
    if absent:
        logits[:, torch.rand(logits.shape[1], generator=draws) < 0.3] = -math.inf
    lent = []
    if reach:
        with torch.no_grad():
            indexer.lent.copy_(torch.randn(2 * reach, generator=draws))
        lent = indexer.lent.tolist()
    found = indexer.chunk_scores(logits)
    assert found.shape == (3, n_chunks)
    for row, scores in zip(logits, found, strict=True):
        assert scores.tolist() == pytest.approx(plain_scores(row.tolist(), per_chunk=per_chunk, lent=lent), abs=1e-6)


def test_the_papers_indexer_has_no_weight_more_and_scores_as_before():
    indexer = make()
    assert "lent" not in dict(indexer.named_parameters())
    logits = torch.randn(2, 7)
    assert indexer.chunk_scores(logits) is logits
    assert make(neighbours=2).weight_bytes == indexer.weight_bytes + 4 * 4


# -- training


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return planted_collection(tmp_path_factory.mktemp("planted") / "data", documents=12, features="tokens")


def config_of(**values):
    return TrainConfig(tau=1, recency_tokens=128, lookback=2, device="cpu", negatives=1, **values)


@pytest.mark.parametrize("neighbours", [0, 1, 4, 7, 200])
@pytest.mark.parametrize("segment_tokens", [None, 4, 16])
def test_the_loss_is_that_of_all_chunks_scored(tokens, segment_tokens, neighbours):
    """Training scores some chunks; what the others would have lent must not be missing, nor their gradient."""
    config = config_of(segment_tokens=segment_tokens, neighbours=neighbours)
    collection = Collection(tokens)
    indexer = priced(Indexer.untrained(indexer_config(collection.info, config), seed=2))
    found = example((collection, 0), config)
    loss = document_loss(indexer, found, config, torch.Generator().manual_seed(5))
    golden = found.positives
    chosen = golden | draw_negatives(golden, config, torch.Generator().manual_seed(5))
    chunks = torch.arange(found.first, found.last)
    logits = row_logits(indexer, found, torch.arange(len(golden)), 2, chunks=chunks)
    whole = focal_loss(logits, golden, chosen, gamma=config.gamma)
    assert not chosen.any(0).all(), "every chunk is chosen: this shows nothing"
    torch.testing.assert_close(loss, whole)
    if neighbours:
        own = make(segment_tokens=segment_tokens)
        assert (logits - own.chunk_scores(row_own(indexer, found, chunks))).abs().max() > 1e-3, "nothing was lent"
    names = [name for name, _ in indexer.named_parameters()]
    for name, mine, theirs in zip(
        names, torch.autograd.grad(loss, [*indexer.parameters()]),
        torch.autograd.grad(whole, [*indexer.parameters()]), strict=True,
    ):  # fmt: skip
        assert torch.isfinite(mine).all()
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def row_own(indexer, found, chunks):
    from kvscope.harness.indexers.lsa.objective import own_logits

    return own_logits(indexer, found, torch.arange(len(found.positives)), 2, chunks=chunks)


@pytest.mark.parametrize("reach", [0, 1, 3, 50])
def test_near_is_within_reach(reach):
    mask = torch.zeros(23, dtype=torch.bool)
    mask[[0, 9, 22]] = True
    assert near(mask, reach).tolist() == [any(abs(i - j) <= reach for j in (0, 9, 22)) for i in range(23)]


@pytest.mark.parametrize("shape", [{}, {"neighbours": 3}, {"segment_tokens": 4, "neighbours": 3}])
def test_a_warm_start_lets_one_chunk_in_twenty_pass_and_calibration_sets_the_recall(tokens, shape):
    config = config_of(**shape)
    places = [(Collection(tokens), index) for index in range(12)]
    indexer = Indexer.untrained(indexer_config(places[0][0].info, config), seed=2)
    warm_start(indexer, places, config)

    def scores():
        for place in places:
            found = example(place, config)
            chunks = torch.arange(found.first, found.last)
            yield row_logits(indexer, found, torch.arange(6), 2, chunks=chunks), found.positives

    assert float((torch.cat([logits for logits, _ in scores()]) >= 0).float().mean()) == pytest.approx(0.05, abs=0.01)
    shift_to_recall(indexer, places, config, target_recall=0.7)
    kept = torch.cat([logits[golden] >= 0 for logits, golden in scores()])
    assert float(kept.float().mean()) == pytest.approx(0.7, abs=0.03)


# -- decoding


def opened(loaded, prompt, method):
    return method.open(prompt, loaded.device)._selector


@pytest.mark.parametrize("shape", SHAPES)
def test_decoding_chooses_by_the_formula(tmp_path, shape):
    """From the keys on: segments of candidate chunks alone, fp8, best state and layer, lending, best segment."""
    loaded = loaded_model("smollm3")
    folder = random_indexer(tmp_path / "indexer", loaded.shape, **shape)
    method = create_method({"name": "lsa", "indexer": str(folder), "budget_fraction": 0.4, "recency_tokens": 20})
    prompt = prefilled(loaded, prompt_ids(203), method, chunk_tokens=64)
    indexer, layout = load_indexer(folder), method.layout(203)
    size = shape.get("segment_tokens", shape["chunk_tokens"])
    per_chunk = shape["chunk_tokens"] // size
    selector = opened(loaded, prompt, method)
    total = None
    for row, layer in enumerate(loaded.shape.layers):
        collector = ChunkKeys("keys", layer, chunk_tokens=size, encode=lambda layer, k: k)
        prefill(loaded, prompt_ids(203), collectors=[collector], chunk_tokens=48)
        segments = collector.finish()[layout.first * per_chunk : layout.last * per_chunk]
        key = dequantize(*quantize(indexer.layer(layer).memory(segments)))
        logits = indexer.layer(layer).logits(selector._states_WLM[:, row], key).amax(0)
        total = logits if total is None else torch.maximum(total, logits)
    lent = indexer.lent.tolist() if "neighbours" in shape else []
    expected = torch.tensor(plain_scores(total.tolist(), per_chunk=per_chunk, lent=lent))
    torch.testing.assert_close(selector.logits().amax(0), expected, atol=1e-4, rtol=1e-4)
    n_chosen = layout.budgeted_chunks(int(0.4 * 203))
    assert 0 < n_chosen < layout.n_candidates
    assert selector.choose().tolist() == sorted(expected.argsort(descending=True)[:n_chosen].tolist())


def test_training_scores_what_decoding_scores(tiny_model, tmp_path, monkeypatch):
    """A collection in chunks of 16 seen in chunks of 48, against the selector at opening."""
    for module in ("make_document", "recorder"):  # bf16 would differ by more than scores of random weights do
        monkeypatch.setattr(f"kvscope.harness.indexers.collection.{module}.STORED_DTYPE", torch.float32)
    config = CollectConfig(model=tiny_model, tasks=("niah_single_1",), lengths_tokens=(512,), samples=1, seed=3,
                           chunk_tokens=16, least_mass=0.0, device="cpu")  # fmt: skip
    collection = Collection(collect(config, tmp_path / "data", progress=Progress()), chunk_tokens=48)
    loaded = load_model(tiny_model, device="cpu")
    folder = random_indexer(
        tmp_path / "indexer", loaded.shape, chunk_tokens=48, segment_tokens=8, neighbours=2, lookback_tokens=4
    )
    (task,) = make_tasks(("niah_single_1",))
    ids = task.build(loaded.tokenizer, length_tokens=512, sample=0, seed=3).ids[:-1]
    method = Lsa(LsaConfig(indexer=str(folder), recency_tokens=64))
    by_decoding = opened(loaded, prefilled(loaded, ids, method), method).logits()[0]
    found = example((collection, 0), TrainConfig(recency_tokens=64, lookback=4))
    chunks = torch.arange(found.first, found.last)
    by_training = row_logits(load_indexer(folder), found, torch.tensor([0]), 4, chunks=chunks)[0]
    assert by_training.shape == by_decoding.shape == (method.layout(len(ids)).n_candidates,)
    torch.testing.assert_close(by_training, by_decoding, atol=0.05 * float(by_decoding.std()), rtol=0)


@pytest.mark.parametrize("refresh", ["sync", "stale1"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llama", "smollm3"])
def test_evicting_equals_masking_and_slots_equal_both(tmp_path, family, shape, refresh):
    loaded = loaded_model(family)
    folder = random_indexer(tmp_path / "indexer", loaded.shape, **shape)
    method = create_method({"name": "lsa", "indexer": str(folder), "budget_fraction": 0.5, "tau": 2,
                            "recency_tokens": 20, "refresh": refresh})  # fmt: skip
    prompt = prefilled(loaded, prompt_ids(203), method, chunk_tokens=64, seed=4)
    tokens = prompt_ids(10, seed=8)
    evicted, record, footprint = run_steps(loaded, method, prompt, tokens)
    masked, masked_record, _ = run_steps(loaded, masking(method), prompt, tokens)
    torch.testing.assert_close(evicted, masked, atol=1e-5, rtol=0)
    assert record == masked_record
    dense, _, _ = run_steps(loaded, create_method("dense"), prompt, tokens)
    assert (evicted - dense).abs().max() > 1e-3, "something was left out, or this shows nothing"
    if refresh == "sync":
        assert footprint == method.predict(loaded.shape, 203, 10)
    fixed, fixed_record, _ = run_steps(loaded, method, prompt, tokens, decode_graph="uncaptured")
    torch.testing.assert_close(fixed, evicted, atol=1e-5, rtol=0)
    assert fixed_record == record


@pytest.mark.parametrize("rule", [{"budget_fraction": 0.5}, {"threshold": 0.5}])
def test_slots_refreshed_by_kernels_hold_what_torch_chooses(tmp_path, monkeypatch, rule):
    """The kernels in Triton's interpreter; on a GPU the same in ``test_lsa_gpu``."""
    loaded = loaded_model("llama")
    folder = random_indexer(tmp_path / "indexer", loaded.shape, key_dim=16, **MANY)
    method = create_method({"name": "lsa", "indexer": str(folder), "tau": 2, "recency_tokens": 20, **rule})
    prompt = prefilled(loaded, prompt_ids(203), method)
    tokens = prompt_ids(8, seed=8)
    by_torch, record, _ = run_steps(loaded, method, prompt, tokens)
    monkeypatch.setattr("kvscope.methods.lsa.indexer_selection.unsupported_scores", lambda *args, **options: [])
    with Single(loaded, method, prompt, reserve_tokens=8, decode_graph="uncaptured") as session:
        by_kernels = torch.stack([session.step(token) for token in tokens])
        assert "triton: indexer_score" in session.sequence._selector.backends()[0]
        assert session.sequence.residency() == record
    torch.testing.assert_close(by_kernels, by_torch, atol=1e-5, rtol=0)
    assert any(record.recalled_bytes), "nothing moved: this shows nothing"


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_those_of_the_tensors(tmp_path, shape):
    loaded = loaded_model("llama")
    folder = random_indexer(tmp_path / "indexer", loaded.shape, **shape)
    method = create_method({"name": "lsa", "indexer": str(folder), "budget_fraction": 0.5, "recency_tokens": 20})
    prompt = prefilled(loaded, prompt_ids(203), method)
    selector, n_layers = opened(loaded, prompt, method), len(loaded.shape.layers)
    per_chunk = shape["chunk_tokens"] // shape.get("segment_tokens", shape["chunk_tokens"])
    n_keys = method.layout(203).n_candidates * per_chunk
    assert selector._keys_LsE.shape == (n_layers, n_keys, 8)
    states = (shape.get("lookback_tokens", 1) + 1) * n_layers * loaded.shape.hidden_size * 4
    predicted = method.predict(loaded.shape, 203)
    assert selector.metadata_bytes == predicted.metadata_bytes == n_layers * n_keys * (8 + 4) + states
    held = sum(
        t.numel() * t.element_size()
        for t in (selector._keys_LsE, selector._scale_Ls, selector._states_WLM, selector._incoming_LM)
    )
    assert selector.metadata_bytes == held
    single = create_method({"name": "lsa", "indexer": str(random_indexer(
        tmp_path / "single", loaded.shape, **{**shape, "segment_tokens": None, "neighbours": 0}
    )), "budget_fraction": 0.5, "recency_tokens": 20})  # fmt: skip
    extra_reads = n_layers * (n_keys - n_keys // per_chunk) * (8 + 4) + 8 * shape.get("neighbours", 0)
    other = opened(loaded, prefilled(loaded, prompt_ids(203), single), single)
    assert selector.refresh_bytes == other.refresh_bytes + extra_reads
    assert selector.refresh_flops > other.refresh_flops


@pytest.mark.parametrize("n_tokens", [0, 3, 5, 11, 12, 13, 23, 24])
def test_prompts_around_one_chunk_and_one_segment(tmp_path, n_tokens):
    loaded = loaded_model("smollm3")
    folder = random_indexer(tmp_path / "indexer", loaded.shape, **MANY)
    method = create_method({"name": "lsa", "indexer": str(folder), "tau": 2, "threshold": 0.5, "sink_tokens": 0,
                            "recency_tokens": 0})  # fmt: skip
    prompt = prefilled(loaded, prompt_ids(n_tokens), method)
    tokens = prompt_ids(5, seed=8)
    evicted, record, _ = run_steps(loaded, method, prompt, tokens)
    masked, masked_record, _ = run_steps(loaded, masking(method), prompt, tokens)
    torch.testing.assert_close(evicted, masked, atol=1e-5, rtol=0)
    assert record == masked_record
    assert method.layout(n_tokens).n_candidates == n_tokens // 12
