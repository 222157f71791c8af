"""The name under which a model takes its cache: transformers renamed it, and older versions swallow the new one."""

import copy

import pytest
import torch
from rounding import assert_same_sums, roundings
from sessions import Single
from tiny_models import loaded_model, prompt_ids, stock_model
from transformers import LlamaForCausalLM, LlamaModel

from kvscope.errors import KvscopeError
from kvscope.harness.engine.glue import cache_argument
from kvscope.harness.engine.models import wrap_model
from kvscope.harness.engine.prefill import prefill
from kvscope.methods.registry import create_method

STOCK_NAME = cache_argument(stock_model("llama"))


def _renamed(stock: type, name: str) -> type:
    """A subclass whose forward takes its cache as ``name`` and swallows every other, as transformers' do."""
    source = f"def forward(self, *args, {name}=None, **kwargs):\n    return call(self, args, {name}, kwargs)\n"

    def call(self, args, cache, kwargs):
        kwargs = {key: value for key, value in kwargs.items() if key not in ("cache", "past_key_values")}
        return stock.forward(self, *args, **kwargs, **{STOCK_NAME: cache})

    space = {"call": call}
    exec(source, space)  # a signature of this version's own and of the other one
    return type(stock.__name__, (stock,), {"forward": space["forward"]})


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_prefill_fills_the_cache_under_the_name_that_the_decoder_has(name):
    model = copy.deepcopy(stock_model("llama"))
    model.model.__class__ = _renamed(LlamaModel, name)
    found = prefill(wrap_model(model, None, page_tokens=16), prompt_ids(60), chunk_tokens=16)
    expected = prefill(loaded_model("llama"), prompt_ids(60), chunk_tokens=16)
    assert set(found.pages) == set(expected.pages)
    for layer, pages in found.pages.items():
        assert torch.equal(pages, expected.pages[layer])


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_decode_reads_the_cache_under_the_name_that_the_model_has(name):
    ids = prompt_ids(70)
    model = copy.deepcopy(stock_model("llama"))
    model.__class__ = _renamed(LlamaForCausalLM, name)
    loaded = wrap_model(model, None, page_tokens=16)
    prompt = prefill(loaded, ids[:60], chunk_tokens=16)
    with Single(loaded, create_method("dense"), prompt, reserve_tokens=10) as session, torch.no_grad():
        found = torch.stack([session.step(token) for token in ids[60:]])
        expected = stock_model("llama")(torch.tensor([ids]), use_cache=False).logits[0, 60:]
    assert_same_sums(found, expected, n_roundings=roundings(sums=4 * 4, terms=64))


def test_decorated_forwards_and_models_without_a_cache():
    assert cache_argument(stock_model("llama")) == cache_argument(stock_model("llama").model)
    with pytest.raises(KvscopeError, match=r"Linear\.forward takes no cache"):
        cache_argument(torch.nn.Linear(1, 1))
