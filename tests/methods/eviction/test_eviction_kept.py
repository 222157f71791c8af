"""Eviction when the prompt ends: what stays is the papers' rule, head by head, and what is stored is what stays."""

import dataclasses

import pytest
import torch
from eviction_plain import best, heard, snapkv_kept, stock_attention
from tiny_models import loaded_model, prompt_ids

from kvscope.errors import KvscopeError, UsageError
from kvscope.methods.eviction.choice import shared_tokens, top_tokens
from kvscope.methods.registry import create_method
from kvscope.methods.store import PagePool

N_TOKENS = 150
# Rotation; none in a layer; sink logits; soft caps and attention that is not all layers'.
MODELS = ["llama", "smollm3", "gpt_oss", "gemma2"]


def prompt_keys(prompt, layer):
    """K [H, N, D] of a prompt's layer."""
    return prompt.pages[layer][:, :, 0].transpose(0, 1).flatten(1, 2)[:, : prompt.n_tokens]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("window", "kernel", "pooling"), [(32, 5, "avg"), (7, 3, "max"), (60, 1, "avg")])
def test_snapkv_keeps_what_the_stock_models_attention_says(model, window, kernel, pooling):
    """Windows lie in one chunk of 48 tokens, or in two."""
    method = create_method(f"snapkv:budget_tokens=70,window_tokens={window},kernel_size={kernel},pooling={pooling}")
    ids = prompt_ids(N_TOKENS)
    kept = method.kept(heard(model, ids, [method]))
    attention = stock_attention(model, ids)
    H = loaded_model(model).shape.n_kv_heads
    assert set(kept) == set(loaded_model(model).shape.layers)
    for layer, positions_HN in kept.items():
        expected = snapkv_kept(attention[layer], H, budget=70, window=window, kernel=kernel, pooling=pooling)
        assert positions_HN.tolist() == expected, layer
    assert len({tuple(head) for positions_HN in kept.values() for head in positions_HN.tolist()}) > 1


def test_the_window_ends_where_the_method_begins():
    """What follows (the question, where the method starts there) is no part of the choice."""
    ids = prompt_ids(N_TOKENS)
    method = create_method("snapkv:budget_tokens=40,window_tokens=8")
    kept = method.kept(heard("llama", ids[:100], [method]))
    expected = snapkv_kept(stock_attention("llama", ids)[0][:, :100, :100], 2, budget=40, window=8, kernel=5,
                           pooling="avg")  # fmt: skip
    assert kept[0].tolist() == expected
    assert all(head[-8:] == list(range(92, 100)) for head in kept[3].tolist())


def test_knorm_keeps_the_smallest_keys():
    method = create_method("knorm:budget_fraction=0.3")
    prompt = heard("llama", prompt_ids(N_TOKENS), [method])
    for layer, positions_HN in method.kept(prompt).items():
        norms_HN = prompt_keys(prompt, layer).pow(2).sum(-1)
        assert positions_HN.tolist() == [best((-row).tolist(), 45) for row in norms_HN]


def test_what_is_stored_is_what_stays():
    """Packed in order for each head, the end of the last page zero; the host pages are as they were."""
    loaded, method = loaded_model("llama"), create_method("snapkv:budget_tokens=50,window_tokens=8")
    prompt = heard("llama", prompt_ids(N_TOKENS), [method])
    kept = method.kept(prompt)
    pool = PagePool(loaded.shape, n_tokens=50 + 20, dtype=torch.float32, device=torch.device("cpu"))
    pool.load_heads(prompt, kept)
    for layer, pages in pool.pages.items():
        for kind in (0, 1):
            flat_HTD = pages[:, :, kind].transpose(0, 1).flatten(1, 2)
            whole_HND = prompt.pages[layer][:, :, kind].transpose(0, 1).flatten(1, 2)
            for head, positions in enumerate(kept[layer]):
                assert torch.equal(flat_HTD[head, :50], whole_HND[head, positions])
            assert not flat_HTD[:, 50:].any()
    assert set(pool.lengths.values()) == {50}


@pytest.mark.parametrize("n_kept", [0, 1, 3, 5, 6])
def test_where_scores_tie_the_earlier_token_stays(n_kept):
    rows = [[1.0, 3.0, 3.0, 3.0, 0.0, 2.0], [2.0, 2.0, 2.0, 2.0, 2.0, torch.inf]]
    assert top_tokens(torch.tensor(rows), n_kept).tolist() == [best(row, n_kept) for row in rows]


def test_heads_share_a_budget_but_for_their_best_tokens():
    scores_HN = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 5.0, 2.0, 0.0]])
    assert [each.tolist() for each in shared_tokens(scores_HN, 2, n_safe=0)] == [[0, 1, 2, 3], []]
    assert [each.tolist() for each in shared_tokens(scores_HN, 2, n_safe=1)] == [[0, 1, 2], [1]]
    assert [each.tolist() for each in shared_tokens(scores_HN, 2, n_safe=2)] == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("snapkv:budget_tokens=0", "budget_tokens must be 1 or more, got 0"),
        ("snapkv:budget_tokens=5,budget_fraction=0.5", "give budget_tokens or budget_fraction, not both"),
        ("knorm:budget_fraction=0", "budget_fraction must be above 0 and at most 1, got 0.0"),
        ("snapkv:window_tokens=0", "window_tokens must be 1 or more, got 0"),
        ("snapkv:kernel_size=4", "kernel_size must be an odd number, 1 or more, got 4"),
        ("snapkv:pooling=mean", "pooling"),
    ],
)
def test_options_out_of_range_are_refused(spec, sentence):
    with pytest.raises(UsageError, match=sentence):
        create_method(spec)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            "snapkv:budget_tokens=20",
            r"holds 20 of 1000 tokens, and the observation window \(window_tokens\) takes 32; raise",
        ),
        ("snapkv:budget_fraction=0.01", "holds 10 of 1000 tokens, and the observation window"),
        ("h2o:budget_tokens=1", "holds 1 of 1000 tokens, and a heavy hitter with a recent token takes 2; raise"),
        ("expected_attention:budget_tokens=3", r"and the set of sinks \(sink_tokens\) takes 4; raise the budget"),
        ("knorm:budget_fraction=0.0001", "holds 0 of 1000 tokens, and the smallest set takes 1; raise the budget"),
    ],
)
def test_a_budget_below_what_always_stays_is_refused(spec, sentence):
    shape = loaded_model("llama").shape
    with pytest.raises(UsageError, match=sentence):
        create_method(spec).predict(shape, 1000)
    assert create_method(spec).config is not None


def test_budgets_by_length():
    for n_tokens, expected in ((100, 100), (1000, 128), (8192, 512), (131_072, 2048)):
        assert create_method("snapkv").effective_config(n_tokens)["budget_tokens"] == expected
    assert create_method("snapkv", paper_settings=True).effective_config(8192)["budget_tokens"] == 2048
    assert create_method("snapkv:budget_fraction=0.5", paper_settings=True).n_kept_tokens(100) == 50


def test_scores_that_are_missing_or_not_finite_end_the_opening():
    method = create_method("snapkv:budget_tokens=50,window_tokens=8")
    prompt = heard("llama", prompt_ids(N_TOKENS), [])
    with pytest.raises(ValueError, match="prefilled without the collectors of 'window_attention_8_avg_5'"):
        method.open(prompt, "cpu")
    name = method.collector(0).name
    scores = dict.fromkeys(prompt.shape.layers, torch.full((2, N_TOKENS), torch.nan))
    with pytest.raises(KvscopeError, match="scores of layer 0 that method 'snapkv' chooses by are not finite"):
        method.open(dataclasses.replace(prompt, metadata={name: scores}), "cpu")
    collector = method.collector(0)
    collector.begin(5)
    with pytest.raises(ValueError, match="does not say what 'window_attention_8_avg_5' goes by"):
        collector.finish()
