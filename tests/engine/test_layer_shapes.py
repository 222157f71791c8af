"""Layers that differ: query heads by layer, and a V that is narrower than K, whose padding is said and counted."""

from typing import Any

import pytest
import torch
import transformers

from kvscope.errors import UsageError
from kvscope.harness.engine.backend import backend_of
from kvscope.harness.engine.models import wrap_model
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.engine.session import Session
from kvscope.methods.registry import create_method
from kvscope.methods.shape import ModelShape

MIX = ["sliding_attention", "full_attention"] * 2
N_TOKENS = 64
SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 512, "sliding_window": 24, "layer_types": MIX, "mlp_layer_types": ["dense"] * 4,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def laguna(heads_by_layer: list[int]) -> Any:
    own = {"head_dim": 16, "num_key_value_heads": 2, "num_attention_heads_per_layer": heads_by_layer}
    return transformers.LagunaConfig(**SIZES, **own)


def mimo(v_head_dim: int = 16) -> Any:
    return transformers.MiMoV2FlashConfig(**SIZES, head_dim=32, v_head_dim=v_head_dim, num_key_value_heads=1)


def shape_of(config: Any) -> ModelShape:
    shape: ModelShape = backend_of(config).shape(config, element_bytes=4, page_tokens=16)
    return shape


def built(config: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def test_query_heads_are_those_of_the_layers() -> None:
    shape = shape_of(laguna([4, 8, 4, 8]))
    assert (shape.n_q_heads, shape.sliding_n_q_heads, shape.n_kv_heads) == (8, 4, 2)
    assert shape.attention_flops(10) == 2 * 4 * 8 * 16 * 10
    assert shape.stock_attention_flops(10) == 2 * 4 * 4 * 16 * 10
    loaded = wrap_model(built(laguna([4, 8, 4, 8])), None)
    assert loaded.shape.n_q_heads == 8


@pytest.mark.parametrize("heads_by_layer", [[4, 8, 4, 4], [4, 8, 8, 8]])
def test_layers_of_one_kind_with_other_query_heads_are_refused(heads_by_layer: list[int]) -> None:
    with pytest.raises(UsageError, match="its layers of one kind differ in heads or width"):
        shape_of(laguna(heads_by_layer))


def test_query_heads_that_the_config_does_not_tell_are_refused() -> None:
    model = built(laguna([4, 8, 4, 8]))
    model.config.num_attention_heads_per_layer = [4, 4, 4, 4]  # another class could have its counts elsewhere
    with pytest.raises(UsageError, match=r"its layer 1 has 8 query heads .* its config says otherwise"):
        wrap_model(model, None)


@torch.inference_mode()
def test_padding_of_v_is_said_and_counted() -> None:
    config = mimo()
    model = built(config)
    ids = torch.randint(3, 250, (1, N_TOKENS), generator=torch.Generator().manual_seed(1))
    stock = model(ids, use_cache=True).past_key_values.layers
    loaded = wrap_model(model, None, page_tokens=16)
    shape = loaded.shape
    assert (shape.head_dim, shape.v_head_dim) == (32, 16)
    stock_bytes = sum(stock[layer].keys.nbytes + stock[layer].values.nbytes for layer in shape.layers)
    with Session(loaded) as session:
        prompt = prefill(loaded, ids[0].tolist(), chunk_tokens=32)
        member = session.add(create_method("dense"), prompt, reserve_tokens=0)
        held_bytes = member.cache.footprint().kv_bytes - shape.stock_kv_bytes(N_TOKENS)
    assert held_bytes == shape.paged_kv_bytes(N_TOKENS) == round(stock_bytes * shape.padded_share)
    said = "V is padded from 16 to K's 32 elements a head: every method holds 1.33 times the bytes"
    assert said in loaded.attention_backend
    assert said in str(loaded.backend.note(shape, N_TOKENS))


def test_without_padding_nothing_is_said() -> None:
    shape = shape_of(mimo(v_head_dim=32))
    backend = backend_of(mimo(v_head_dim=32))
    assert (shape.v_head_dim, shape.padded_share) == (0, 1.0)
    assert backend.note(shape, N_TOKENS) is None
    assert "padded" not in str(backend.attention_text(shape, torch.device("cpu"), torch.float32))
