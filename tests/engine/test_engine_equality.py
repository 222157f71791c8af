"""The engine against transformers: logits, K, V, hidden states and generated tokens of the stock forward."""

import pytest
import torch
from rounding import assert_same_sums, roundings
from sessions import Single
from tiny_models import ARCHITECTURES, cache_kwarg, loaded_model, prompt_ids, stock_model
from transformers import DynamicCache

from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.prefill import prefill
from kvscope.methods.registry import create_method

# Four layers, attention and MLP each of two products in a row, over a hidden size of 64.
ROUNDINGS = roundings(sums=4 * 4, terms=64)


def dense_logits(name, prompt, fed):
    """Logits after each of ``fed`` under dense, [fed, vocabulary]."""
    with Single(loaded_model(name), create_method("dense"), prompt, reserve_tokens=len(fed)) as session:
        return torch.stack([session.step(token) for token in fed])


@pytest.mark.parametrize("chunk_tokens", [16, 64, 2048])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_and_kv_equal_the_stock_forward(name, chunk_tokens):
    ids = prompt_ids(211)
    n_prefilled = 203
    with torch.no_grad():
        cache = DynamicCache(config=stock_model(name).config)
        given = cache_kwarg(stock_model(name), cache)
        stock = stock_model(name)(torch.tensor([ids]), **given, use_cache=True, output_hidden_states=True)
    prompt = prefill(loaded_model(name), ids[:n_prefilled], chunk_tokens=chunk_tokens)

    for layer, pages in prompt.pages.items():
        keys, values = pages.permute(2, 1, 0, 3, 4).flatten(2, 3)
        assert_same_sums(keys[:, :n_prefilled], cache.layers[layer].keys[0, :, :n_prefilled], n_roundings=ROUNDINGS)
        assert_same_sums(values[:, :n_prefilled], cache.layers[layer].values[0, :, :n_prefilled], n_roundings=ROUNDINGS)
        assert not pages[-1, :, :, n_prefilled % pages.shape[3] :].any(), "the end of the last page is zero"
    for layer, hidden_BM in prompt.last_hidden.items():
        assert_same_sums(hidden_BM, stock.hidden_states[layer][:, n_prefilled - 1], n_roundings=ROUNDINGS)
    logits = dense_logits(name, prompt, ids[n_prefilled:])
    assert_same_sums(logits, stock.logits[0, n_prefilled:], n_roundings=ROUNDINGS)


@pytest.mark.parametrize("name", ["gemma3", "gpt_oss", "gemma2", "cohere2", "afmoe"])
def test_stock_sliding_layers_hold_what_transformers_holds(name):
    ids = prompt_ids(150)
    cache = DynamicCache(config=stock_model(name).config)
    with torch.no_grad():
        stock_model(name)(torch.tensor([ids]), **cache_kwarg(stock_model(name), cache), use_cache=True)
    prompt = prefill(loaded_model(name), ids, chunk_tokens=64)
    assert set(prompt.stock) == set(loaded_model(name).shape.sliding_layers) != set()
    for layer, state in prompt.stock.items():
        assert_same_sums(state.keys, cache.layers[layer].keys, n_roundings=ROUNDINGS)
        assert_same_sums(state.values, cache.layers[layer].values, n_roundings=ROUNDINGS)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dense_generation_equals_stock_generate(name):
    ids = prompt_ids(97, seed=3)
    with torch.no_grad():
        generated = stock_model(name).generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, attention_mask=torch.ones(1, len(ids)).long()
        )
    prompt = prefill(loaded_model(name), ids[:-1], chunk_tokens=32)
    result = decode(loaded_model(name), create_method("dense"), prompt, ids[-1:], max_new_tokens=24)
    assert result.ids == generated[0, len(ids) :].tolist()
    assert result.stop_reason == "length"
    assert len(result.step_s) == 24


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_question_under_dense_equals_a_stock_chunked_run(name):
    ids = prompt_ids(140, seed=5)
    n_context = 117
    cache = DynamicCache(config=stock_model(name).config)
    with torch.no_grad():
        stock_model(name)(torch.tensor([ids[:n_context]]), **cache_kwarg(stock_model(name), cache), use_cache=True)
        stock = stock_model(name)(
            torch.tensor([ids[n_context:]]), **cache_kwarg(stock_model(name), cache), use_cache=True
        )
    prompt = prefill(loaded_model(name), ids[:n_context], chunk_tokens=48)
    assert_same_sums(dense_logits(name, prompt, ids[n_context:]), stock.logits[0], n_roundings=ROUNDINGS)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "afmoe"])
def test_a_prompt_of_one_token_has_nothing_to_prefill(name):
    ids = prompt_ids(40, seed=7)
    with torch.no_grad():
        stock = stock_model(name)(torch.tensor([ids]))
    prompt = prefill(loaded_model(name), [])
    assert prompt.n_tokens == 0
    assert prompt.host_bytes == 0
    assert_same_sums(dense_logits(name, prompt, ids), stock.logits[0], n_roundings=ROUNDINGS)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_stock_cache_still_works_on_the_switched_model(name):
    ids = torch.tensor([prompt_ids(60, seed=9)])
    with torch.no_grad():
        switched = loaded_model(name).model
        cache = DynamicCache(config=switched.config)
        switched(ids[:, :40], **cache_kwarg(switched, cache), use_cache=True)
        ours = switched(ids[:, 40:], **cache_kwarg(switched, cache), use_cache=True).logits
        assert_same_sums(ours, stock_model(name)(ids).logits[:, 40:], n_roundings=ROUNDINGS)
