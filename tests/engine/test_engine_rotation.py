"""Position encodings are measured: what each layer does, and whether turning back is exact."""

import dataclasses
import sys

import pytest
import torch
from tiny_models import ARCHITECTURES, build_stock, loaded_model
from transformers import AutoModelForCausalLM, Glm4Config, PersimmonConfig, PhiConfig, StableLmConfig

from kvscope.errors import KvscopeError, UsageError
from kvscope.harness.engine.models import wrap_model
from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.engine.rotation import RopeRotation, UnknownRotation, _calls
from kvscope.methods.registry import create_method, method_names


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_turning_back_gives_the_query_of_the_earlier_position(name):
    loaded = loaded_model(name)
    with torch.inference_mode():
        earlier, later = ([call.query for [call] in _calls(loaded.model, at)] for at in (310, 1001))
    for layer, rotation in loaded.rotations.items():
        if rotation is None:
            torch.testing.assert_close(later[layer], earlier[layer])
        else:
            with torch.inference_mode():
                turned = rotation.back(later[layer], 1001 - 310)
            # fp32 angles near 1000 radians are good to about 1e-4.
            torch.testing.assert_close(turned, earlier[layer], atol=2e-3, rtol=1e-3)
            assert (later[layer] - earlier[layer]).abs().max() > 0.1


def test_layers_without_positions_are_found():
    assert [rotation is None for rotation in loaded_model("smollm3").rotations.values()] == [False, False, False, True]
    assert [rotation is None for rotation in loaded_model("cohere2").rotations.values()] == [False, False, False, True]
    assert [rotation is None for rotation in loaded_model("afmoe").rotations.values()] == [False, True, False, True]
    assert all(isinstance(rotation, RopeRotation) for rotation in loaded_model("gpt_oss").rotations.values())


def test_the_reference_model_s_managed_layers_have_no_positions():
    """Layers 2, 5, 7 and 9 are kvscope's; the others slide, have RoPE and stay the model's own."""
    model = AutoModelForCausalLM.from_pretrained(REFERENCE_MODEL_FOLDER, attn_implementation="eager")
    loaded = wrap_model(model, None)
    assert loaded.shape.layers == (2, 5, 7, 9)
    assert loaded.shape.sliding_layers == (0, 1, 3, 4, 6, 8)
    assert loaded.shape.sliding_window == 128
    assert {layer for layer, rotation in loaded.rotations.items() if rotation is None} == {2, 5, 7, 9}
    assert {type(loaded.rotations[layer]) for layer in loaded.shape.sliding_layers} == {RopeRotation}
    for spec in method_names():
        # A method may still ask for its trained part; the layers' positions are in nobody's way.
        assert not [why for why in create_method(spec).unsupported(loaded.shape, "cpu") if "position" in why]


@pytest.mark.parametrize(
    "other",
    [
        lambda tensor, sin, cos: tensor * cos + sin,  # GPT-J's order, one tensor, another layout
        lambda q, k, cos, position_ids, sin: (q, k),
        lambda q, k, angles: (q, k),
        lambda q, k, cos, sin, *, must: (q, k),  # wants more than is given
        lambda q, k, cos, sin: q[:, :, :, 9],  # gives another shape
    ],
)
def test_a_rotation_of_another_kind_is_unknown_and_dense_runs(other, monkeypatch):
    model = build_stock("llama")
    module = sys.modules[type(model.model.layers[0].self_attn).__module__]
    own = module.apply_rotary_pos_emb
    namespace = type("Module", (), {"apply_rotary_pos_emb": staticmethod(other)})
    monkeypatch.setitem(sys.modules, "another.model", namespace)
    for layer in model.model.layers:
        kind = type(layer.self_attn)
        layer.self_attn.__class__ = type("Attention", (kind,), {"__module__": "another.model"})
    assert module.apply_rotary_pos_emb is own
    loaded = wrap_model(model, None)
    assert {type(each) for each in loaded.rotations.values()} == {UnknownRotation}
    assert not create_method("dense").unsupported(loaded.shape, "cpu")
    assert "position" in create_method("sliding_window:window=20").unsupported(loaded.shape, "cpu")[0]


def test_an_embedding_row_of_zeros_hides_no_rotation():
    model = build_stock("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[:4].zero_()
    assert all(isinstance(each, RopeRotation) for each in wrap_model(model, None).rotations.values())


@pytest.mark.parametrize("config", [PhiConfig, StableLmConfig, PersimmonConfig, Glm4Config])
def test_a_rotation_of_the_first_channels_alone_is_turned_back(config):
    sizes = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 4, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(config(**sizes, **heads), attn_implementation="eager").eval()
    loaded = wrap_model(model, None)
    for layer, rotation in loaded.rotations.items():
        with torch.inference_mode():
            [earlier], [later] = (_calls(loaded.model, at)[layer] for at in (3, 40))
            torch.testing.assert_close(rotation.back(later.query, 37), earlier.query, atol=1e-5, rtol=1e-4)
            start_keys = rotation.undo(later.key, start_tokens=40)
            torch.testing.assert_close(start_keys, rotation.undo(earlier.key, start_tokens=3), atol=1e-5, rtol=1e-4)
    assert create_method("sliding_window").unsupported(loaded.shape, "cpu") == []


def test_kv_heads_unlike_the_config_are_refused():
    model = build_stock("llama")
    model.config.num_key_value_heads = 4
    with pytest.raises(
        UsageError, match="its layer 0 has 4 query heads and keeps 2 KV heads, K 16 and V 16 wide, and its config says"
    ):
        wrap_model(model, None)


def test_layers_of_one_kind_share_a_table():
    rotations = loaded_model("gemma3").rotations
    assert rotations[0] is rotations[1] is not rotations[3]


def test_an_encoding_that_is_no_rotation_is_unknown_and_sliding_window_says_so(monkeypatch):
    model = build_stock("llama")
    module = sys.modules[type(model).__module__]
    rotate = module.apply_rotary_pos_emb
    monkeypatch.setattr(
        module, "apply_rotary_pos_emb", lambda q, k, cos, sin: tuple(x + sin.mean() for x in rotate(q, k, cos, sin))
    )
    loaded = wrap_model(model, None)
    assert all(isinstance(rotation, UnknownRotation) for rotation in loaded.rotations.values())
    assert loaded.shape.unknown_rotation_layers == (0, 1, 2, 3)
    reasons = create_method("sliding_window").unsupported(loaded.shape, "cpu")
    assert len(reasons) == 1
    assert "layers 0, 1, 2, 3" in reasons[0]
    known = dataclasses.replace(loaded.shape, unknown_rotation_layers=())
    assert create_method("sliding_window").unsupported(known, "cpu") == []
    assert create_method("recency").unsupported(loaded.shape, "cpu") == []
    with pytest.raises(KvscopeError, match="layer 2 cannot be undone"):
        loaded.rotations[2].back(torch.zeros(1, 4, 1, 16), 3)
