"""Weights that are not all of a model's, or not a model's: refused by name."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from kvscope.errors import UsageError
from kvscope.harness.engine.models import load_model


def _load_changed(folder, change):
    save_tiny(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return load_model(str(folder), device="cpu")


def test_a_layer_without_weights_is_refused(tmp_path):
    def without_a_layer(tensors):
        for key in [key for key in tensors if ".layers.2." in key]:
            del tensors[key]

    with pytest.raises(UsageError, match=r"lack model.layers.2.input_layernorm.* and 6 more, which would be random"):
        _load_changed(tmp_path / "lacking", without_a_layer)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    def narrower(tensors):
        tensors["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(16, 64)

    with pytest.raises(
        UsageError,
        match=r"layers.1.self_attn.k_proj.weight as \[16, 64\], and its config makes it \[32, 64\]",
    ):
        _load_changed(tmp_path / "narrower", narrower)


def test_a_tensor_of_a_module_that_has_no_place_for_it_is_refused(tmp_path):
    def scaled(tensors):
        tensors["model.layers.1.self_attn.q_proj.scale"] = torch.ones(64)

    with pytest.raises(UsageError, match=r"no place for 1 tensor \(model.layers.1.self_attn.q_proj.scale\)"):
        _load_changed(tmp_path / "scaled", scaled)


def test_tied_weights_and_parts_of_other_models_are_no_fault(tmp_path):
    def more(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # old Llama checkpoints
        tensors["vision_tower.patch.weight"] = torch.ones(8)
        tensors["model.layers.9.mtp.weight"] = torch.ones(8)  # a prediction layer behind the last

    assert _load_changed(tmp_path / "more", more).shape.n_layers == 4
    assert load_model(str(save_tiny(tmp_path / "tied", "afmoe")), device="cpu").shape.n_layers == 4
