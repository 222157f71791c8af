"""The engine against the model's own forward, at load: what passes, and faults of every kind planted."""

import copy
from types import SimpleNamespace

import pytest
import torch
from compressed_tiny import random_model
from tiny_models import ARCHITECTURES, PAGE_TOKENS, build_stock, loaded_model, stock_model

from kvscope.errors import UsageError
from kvscope.harness.engine import self_check as module
from kvscope.harness.engine.models import wrap_model
from kvscope.harness.engine.self_check import self_check


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_passes_and_is_as_before(name):
    loaded = loaded_model(name)
    attention, window = loaded.model.config._attn_implementation, loaded.shape.sliding_window
    found = self_check(loaded)
    assert found.difference < 1e-5
    assert found.n_tokens > window + 64, "more than a window and a chunk"
    assert loaded.model.config._attn_implementation == attention
    assert {getattr(each, "sliding_window", None) or window for each in loaded.model.modules()} == {window}


def test_long_windows_are_shortened_for_the_check_alone():
    loaded = wrap_model(build_stock("gemma3", sliding_window=4096), None)
    found = self_check(loaded)
    assert (found.n_tokens, found.passed) == (146, True)
    assert loaded.model.config.sliding_window == loaded.model.model.layers[0].self_attn.sliding_window == 4096


def test_a_window_that_cannot_be_shortened_is_checked_at_its_own_length():
    loaded = wrap_model(build_stock("gemma3", sliding_window=100), None)
    # As a model that makes its mask from a number of its own: shortened windows give other logits.
    config = loaded.model.config
    fixed = type("Fixed", (type(config),), {"sliding_window": property(lambda self: 100, lambda self, value: None)})
    config.__class__ = fixed
    found = self_check(loaded)
    assert found.passed
    assert found.n_tokens == 64 + 100 + 16 + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_narrow_types_is_no_fault(dtype):
    loaded = wrap_model(copy.deepcopy(stock_model("qwen3")).to(dtype), None)
    found = self_check(loaded)
    assert 1e-5 < found.difference < found.tolerance


def test_what_a_batch_does_is_measured_where_the_least_tolerance_is_not_enough(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "_noise_of_a_batch", lambda *_: asked.append(1) or 0.01)
    own_logits = module._own_logits
    monkeypatch.setattr(module, "_own_logits", lambda *args: own_logits(*args) * scale)
    loaded = loaded_model("llama")
    scale = 1.0
    assert self_check(loaded).tolerance == 1e-3
    assert not asked
    scale = 1.02
    found = self_check(loaded)
    assert 1e-3 < found.difference < found.tolerance == 4 * 0.01
    assert asked


def test_compressed_entries_pass_in_the_same_form():
    loaded = wrap_model(random_model(), None)
    found = self_check(loaded)
    assert found.difference < 1e-5
    assert found.n_tokens > loaded.shape.cache.window_tokens + 64


def _planted(change):
    model = copy.deepcopy(stock_model("llama"))
    change(model.model.layers[2])
    return wrap_model(model, None, name="planted", page_tokens=PAGE_TOKENS)


def _remembers(layer):
    """Give a layer a state beside the cache: the running mean of what it read, over one forward."""

    def with_mean(module, args, kwargs, out):
        mean = args[0].cumsum(1) / torch.arange(1, args[0].shape[1] + 1)[None, :, None]
        return out + mean if isinstance(out, torch.Tensor) else (out[0] + mean, *out[1:])

    layer.register_forward_hook(with_mean, with_kwargs=True)


def test_a_layer_with_a_state_beside_the_cache_is_refused():
    loaded = _planted(_remembers)
    with pytest.raises(
        UsageError, match=r"'planted' cannot be measured: .* differ .* by \d.\d+ .*from layer 2 on"
    ) as told:
        self_check(loaded)
    assert "--no-self-check" in str(told.value)


def test_values_changed_behind_the_cache_are_refused(monkeypatch):
    """As DiffLlama's: the attention the model computes by itself reads V doubled, which no cache can know."""
    loaded = wrap_model(copy.deepcopy(stock_model("llama")), None, name="planted", page_tokens=PAGE_TOKENS)
    from transformers.models.llama import modeling_llama

    eager = modeling_llama.eager_attention_forward

    def doubled(module, query, key, value, *args, **kwargs):
        return eager(module, query, key, value * 2, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", doubled)
    with pytest.raises(UsageError, match="cannot be measured"):
        self_check(loaded)


def test_a_cache_that_stays_empty_is_refused(monkeypatch):
    loaded = loaded_model("llama")

    class Empty(module.Session):
        def add(self, method, prompt, **options):
            member = super().add(method, prompt, **options)
            return SimpleNamespace(n_tokens=0, cache=member.cache)

    monkeypatch.setattr(module, "Session", Empty)
    with pytest.raises(UsageError, match="of 146 tokens fed its cache holds 0"):
        self_check(loaded)


def test_weights_that_are_not_finite_are_refused():
    loaded = _planted(lambda layer: layer.mlp.down_proj.weight.data[0].fill_(torch.nan))
    with pytest.raises(UsageError, match="not finite"):
        self_check(loaded)


def test_a_model_that_differs_from_itself_in_chunks_is_measured_against_its_chunks(monkeypatch):
    """As ties in a model's own selection: its forward in one piece gives other logits than in pieces."""
    loaded = loaded_model("llama")
    own_logits = module._own_logits
    monkeypatch.setattr(module, "_own_logits", lambda *args: own_logits(*args) * 1.05)
    monkeypatch.setattr(module, "_noise_of_a_batch", lambda *_: 0.0)
    found = self_check(loaded)
    assert found.own_chunks
    assert found.difference < 1e-5


def test_a_model_of_zeros_is_no_equal_one():
    """Whatever the engine computed, it would agree."""
    zeros = copy.deepcopy(stock_model("llama"))
    with torch.no_grad():
        zeros.lm_head.weight.zero_()
    with pytest.raises(UsageError, match="the same for every token"):
        self_check(wrap_model(zeros, None, name="zeros", page_tokens=PAGE_TOKENS))
