"""Layer budgets, shared budgets and the other scores, each against its paper's formula."""

import pytest
import torch
from eviction_plain import best, expected_scores, heard, snapkv_scores, stock_attention
from tiny_models import loaded_model, prompt_ids

from kvscope.errors import UsageError
from kvscope.methods.eviction import collectors
from kvscope.methods.registry import create_method

N_TOKENS = 150


def keys_and_values(prompt, layer):
    """K and V of a prompt's layer, [H, N, D] each."""
    return (prompt.pages[layer][:, :, kind].transpose(0, 1).flatten(1, 2)[:, : prompt.n_tokens] for kind in (0, 1))


@pytest.mark.parametrize("n_layers", [1, 2, 4, 7, 32])
@pytest.mark.parametrize(("options", "n_tokens"), [
    ("budget_tokens=128", 4096), ("budget_tokens=133,beta=3", 4096), ("budget_fraction=0.7", 1000),
    ("budget_tokens=40,beta=1", 999), ("budget_tokens=32", 100), ("budget_tokens=500", 400),
])  # fmt: skip
def test_a_pyramid_has_the_mean_of_its_budget(n_layers, options, n_tokens):
    method = create_method(f"pyramidkv:{options}")
    layer_tokens = method.layer_tokens(n_tokens, n_layers)
    assert sum(layer_tokens) == n_layers * method.n_kept_tokens(n_tokens)
    assert layer_tokens == sorted(layer_tokens, reverse=True)
    assert max(layer_tokens) <= n_tokens
    assert min(layer_tokens) >= min(n_tokens, 32)


def test_a_pyramid_is_the_authors_line():
    """Their layers keep w + most - i * step of step (most - least) // (L - 1), here where that is whole."""
    method = create_method("pyramidkv:budget_tokens=232,window_tokens=32,beta=20")
    most, least = 2 * 200 - 10, 10
    expected = [32 + most - i * (most - least) // 4 for i in range(5)]
    assert method.layer_tokens(10_000, 5) == expected == [422, 327, 232, 137, 42]
    # The first layer cannot keep more than there is; the last makes up for it.
    assert method.layer_tokens(400, 5) == [400, 316, 232, 148, 64]


def test_pyramidkv_keeps_snapkvs_best_of_each_layers_budget():
    pyramid = create_method("pyramidkv:budget_tokens=60,window_tokens=10,beta=4")
    prompt = heard("llama", prompt_ids(N_TOKENS), [pyramid])
    kept = pyramid.kept(prompt)
    sizes = dict(zip(prompt.shape.layers, pyramid.layer_tokens(N_TOKENS, 4), strict=True))
    assert [kept[layer].shape[1] for layer in prompt.shape.layers] == [98, 73, 47, 22]
    for layer, n_kept in sizes.items():
        alone = create_method(f"snapkv:budget_tokens={n_kept},window_tokens=10").kept(prompt)
        assert torch.equal(kept[layer], alone[layer])


@pytest.mark.parametrize("model", ["llama", "gpt_oss"])
@pytest.mark.parametrize("safeguard", [0.0, 0.5, 1.0])
def test_adakv_shares_a_layers_budget_between_its_heads(model, safeguard):
    method = create_method(f"adakv:budget_tokens=60,window_tokens=10,safeguard={safeguard}")
    ids = prompt_ids(N_TOKENS)
    kept, attention = method.kept(heard(model, ids, [method])), stock_attention(model, ids)
    uneven = False
    for layer, heads in kept.items():
        rows = snapkv_scores(attention[layer], 2, window=10, kernel=5, pooling="avg")
        rows = [row + [float("inf")] * 10 for row in rows]
        safe = [set(best(row, max(10, int(safeguard * 60)))) for row in rows]
        flat = [float("inf") if token in safe[head] else score
                for head, row in enumerate(rows) for token, score in enumerate(row)]  # fmt: skip
        chosen = best(flat, 2 * 60)
        expected = [[place - head * N_TOKENS for place in chosen if place // N_TOKENS == head] for head in range(2)]
        assert [each.tolist() for each in heads] == expected, layer
        uneven |= len(heads[0]) != len(heads[1])
        assert sum(map(len, heads)) == 2 * 60
    assert uneven == (safeguard < 1)


OPTIONS = {"n_future": 20, "n_sinks": 4, "covariance": True, "value_norm": True, "epsilon": 0.0}


@pytest.mark.parametrize(("model", "changes"), [
    ("llama", {}), ("llama", {"covariance": False}), ("llama", {"value_norm": False, "n_sinks": 0}),
    ("smollm3", {"epsilon": 0.01, "n_future": 3}),
])  # fmt: skip
def test_expected_attention_is_the_papers_formula(model, changes):
    """Layer 3 of smollm3 has no rotation; llama's rotation is scaled by frequency."""
    options = {**OPTIONS, **changes}
    collector_options = {"future_tokens": options["n_future"], "sink_tokens": options["n_sinks"]} | {
        key: options[key] for key in ("covariance", "value_norm", "epsilon")
    }
    text = ",".join(f"{key}={value}" for key, value in collector_options.items()).lower()
    method = create_method(f"expected_attention:budget_tokens=40,{text}")
    ids = prompt_ids(N_TOKENS)
    prompt = heard(model, ids, [method])
    for layer in (0, 3):
        found_HN = method.scores(prompt, layer)
        expected_HN = expected_scores(model, ids, layer, *keys_and_values(prompt, layer), **options)
        torch.testing.assert_close(found_HN.double(), expected_HN, rtol=2e-3, atol=1e-9)
        assert method.kept(prompt)[layer].tolist() == [best(row.tolist(), 40) for row in found_HN]


@pytest.mark.parametrize("model", ["llama", "gpt_oss", "gemma2"])
def test_tova_and_h2o_begin_with_the_stock_models_attention(model, monkeypatch):
    monkeypatch.setattr(collectors, "MOST_LOGITS", 2 * 96 * 20)  # tiles of 20 queries and of fewer
    tova, h2o = create_method("tova"), create_method("h2o")
    ids = prompt_ids(N_TOKENS)
    prompt, attention = heard(model, ids, [tova, h2o]), stock_attention(model, ids)
    for layer in loaded_model(model).shape.layers:
        last_N = attention[layer][:, -1].mean(0)
        torch.testing.assert_close(tova.scores(prompt, layer), last_N[None], rtol=1e-4, atol=1e-7)
        sum_HN = attention[layer].sum(1).view(2, 2, N_TOKENS).sum(1)
        torch.testing.assert_close(h2o.scores(prompt, layer), sum_HN, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("pyramidkv:beta=0", "beta must be 1 or more, got 0"),
        ("adakv:safeguard=1.1", "safeguard must be between 0 and 1, got 1.1"),
        ("expected_attention:future_tokens=0", "future_tokens must be 1 or more, got 0"),
        ("expected_attention:sink_tokens=-1", "sink_tokens must be 0 or more, got -1"),
        ("expected_attention:epsilon=-1", "epsilon must be 0 or more, got -1.0"),
        ("h2o:recent_fraction=1", "recent_fraction must be 0 or more and below 1, got 1.0"),
        ("snapkv:interval_steps=16", r"interval_steps must be window_tokens \(32\) or more, .* got 16"),
    ],
)
def test_options_out_of_range_are_refused(spec, sentence):
    with pytest.raises(UsageError, match=sentence):
        create_method(spec)
