"""NaN and infinity, planted in weights, caches and scores: a failure that says where, never a token."""

import copy
import math

import pytest
import torch
from compressed_tiny import random_model
from lsa_tools import random_indexer
from safetensors.torch import load_file, save_file
from tiny_models import PAGE_TOKENS, loaded_model, prompt_ids, stock_model

from kvscope.errors import UsageError
from kvscope.harness.engine.decode import answer_nll, decode
from kvscope.harness.engine.finite import NotFinite
from kvscope.harness.engine.models import wrap_model
from kvscope.harness.engine.prefill import prefill
from kvscope.methods.base import union_collectors
from kvscope.methods.lsa.indexer_files import load_indexer
from kvscope.methods.registry import create_method

IDS = prompt_ids(300)


def _planted(change, *, dtype=torch.float32):
    model = copy.deepcopy(stock_model("llama")).to(dtype)
    change(model)
    return wrap_model(model, None, page_tokens=PAGE_TOKENS)


def _set(path, value):
    return lambda model: model.get_parameter(path).data[0].fill_(value)


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("model.layers.1.self_attn.k_proj.weight", math.inf, "K of layer 1"),
        ("model.layers.1.self_attn.v_proj.weight", math.nan, "V of layer 1"),
        ("model.layers.2.mlp.down_proj.weight", math.nan, "the output of layer 2"),
        ("model.layers.3.self_attn.v_proj.weight", math.nan, "V of layer 3"),
    ],
)
def test_a_prefill_names_layer_and_tensor(path, value, where):
    with pytest.raises(NotFinite, match=f"{where} is not finite"):
        prefill(_planted(_set(path, value)), IDS, chunk_tokens=64)


def test_what_overflows_float16_is_told_of_other_types():
    loaded = _planted(lambda model: model.model.layers[1].mlp.down_proj.weight.data.mul_(1e6), dtype=torch.float16)
    with pytest.raises(NotFinite, match=r"the output of layer 1 .* float16 ends at 65,504: try --dtype bfloat16"):
        prefill(loaded, IDS, chunk_tokens=64)


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ("model.embed_tokens.weight", "from the embedding on"),
        ("model.layers.2.mlp.down_proj.weight", "from layer 2 on"),
        ("lm_head.weight", "behind layer 3"),
    ],
)
@pytest.mark.parametrize(
    "answer",
    [
        lambda loaded, method, prompt: decode(loaded, method, prompt, [0, 0], max_new_tokens=2),
        lambda loaded, method, prompt: answer_nll(loaded, method, prompt, [0], [5, 6]),
    ],
    ids=["decode", "nll"],
)
def test_a_step_names_itself_and_the_layer(path, where, answer):
    loaded = _planted(lambda model: None)
    prompt = prefill(loaded, IDS, chunk_tokens=64)
    _set(path, math.nan)(loaded.model)
    dense = create_method("dense")
    with pytest.raises(NotFinite, match=f"at decode step 0 the model's logits are not finite .*, {where}"):
        answer(loaded, dense, prompt)


SCORING = [
    "quest:budget_tokens=64",
    "moba:budget_tokens=64,block_tokens=32",
    "dsa:indexer=oracle,budget_tokens=64",
    "lsa:budget_fraction=0.5,chunk_tokens=16,indexer=attention",
]


def _opened(loaded, spec):
    method = create_method(spec)
    assert method.unsupported(loaded.shape, loaded.device) == []
    return method, prefill(loaded, IDS, collectors=union_collectors([method], loaded.shape.layers), chunk_tokens=64)


@pytest.mark.parametrize("spec", SCORING)
def test_finite_scores_are_let_through(spec):
    loaded = loaded_model("llama")
    method, prompt = _opened(loaded, spec)
    assert len(decode(loaded, method, prompt, [5], max_new_tokens=2, stop_at_eos=False).ids) == 2


@pytest.mark.parametrize("spec", SCORING[:2])
def test_summaries_that_are_not_finite_give_no_answer(spec):
    loaded = loaded_model("llama")
    method, prompt = _opened(loaded, spec)
    for layers in prompt.metadata.values():
        for layer, kept in layers.items():
            layers[layer] = torch.full_like(kept, math.nan)
    with pytest.raises(NotFinite, match="at decode step 0 scores that the method chooses by are not finite"):
        decode(loaded, method, prompt, [5], max_new_tokens=2)


@pytest.mark.parametrize("rule", ["budget_fraction=0.5", "threshold=0.5"])
def test_an_indexer_of_nan_gives_no_answer(rule, tmp_path, monkeypatch):
    from kvscope.methods.lsa.indexer_selection import IndexerSelector

    loaded = loaded_model("llama")
    method, prompt = _opened(loaded, f"lsa:{rule},indexer={random_indexer(tmp_path / 'indexer', loaded.shape)}")
    own = IndexerSelector.logits
    monkeypatch.setattr(IndexerSelector, "logits", lambda self: own(self) * math.nan)
    with pytest.raises(NotFinite, match="scores that the method chooses by"):
        decode(loaded, method, prompt, [5], max_new_tokens=2)


def test_indexer_weights_that_are_not_finite_are_refused(tmp_path):
    loaded = loaded_model("llama")
    folder = random_indexer(tmp_path / "indexer", loaded.shape)
    weights = load_file(folder / "indexer.safetensors")
    damaged = next(iter(weights))
    weights[damaged].view(-1)[0] = math.nan
    save_file(weights, folder / "indexer.safetensors")
    method = create_method(f"lsa:budget_fraction=0.5,indexer={folder}")
    with pytest.raises(UsageError, match=r"Indexer weights .* are not finite"):  # by plan, not only in the prefill
        method.require(loaded.shape)
    assert "are not finite" in method.unsupported(loaded.shape, "cpu")[0]
    with pytest.raises(UsageError, match=r"Indexer weights .* are not finite"):
        load_indexer(folder)


def test_compressed_entries_that_are_not_finite_are_refused():
    model = random_model()
    loaded = wrap_model(model, None)
    layer = loaded.shape.layers[0]
    _set(f"model.layers.{layer}.self_attn.compressor.kv_proj.weight", math.nan)(model)
    with pytest.raises(NotFinite, match=f"what the compressor keeps of layer {layer} is not finite"):
        prefill(loaded, IDS, chunk_tokens=64)
