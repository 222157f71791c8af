"""What a plan says of the released engine, item by item: the paper's table, and the weights of a stock model."""

import math

import pytest
import torch
from compressed_tiny import tiny_config
from transformers import AutoModelForCausalLM

from kvscope import cli
from kvscope.harness.backends.deepseek_v4.backend import DeepseekV4
from kvscope.harness.backends.deepseek_v4.itemised import held_bytes, released_tables, step_flops_by_part
from kvscope.harness.engine.presets import preset_config
from kvscope.methods.compressed_bytes import FLASH_FP8
from kvscope.methods.compressed_flops import step_flops
from kvscope.methods.lsa.printed import TABLE_1
from kvscope.methods.registry import create_method

GIB = 2**30


@pytest.fixture(scope="module")
def shape():
    return DeepseekV4().shape(preset_config("preset:deepseek-v4-flash"), element_bytes=2)


def form(shape, spec):
    return DeepseekV4().form_of(create_method(spec, paper_settings=True), shape)


def test_the_preset_is_the_released_models_shape(shape):
    assert shape.layers == tuple(range(2, 43, 2))
    assert [shape.layers[ordinal] for ordinal in (10, 12, 20)] == [22, 26, 42]
    assert (shape.cache.n_csa, shape.cache.n_hca, shape.cache.n_sliding) == (21, 20, 2)
    assert (FLASH_FP8.n_csa, FLASH_FP8.n_hca, FLASH_FP8.n_sliding) == (21, 20, 2)


@pytest.mark.parametrize("row", TABLE_1, ids=[f"{row.name}-{row.tokens // 1024}K" for row in TABLE_1])
def test_every_row_of_the_paper_s_table(shape, row):
    """Dense within 2.5 %. Pruned caches are printed to two digits, and without what HCA layers keep."""
    dense = held_bytes(shape, form(shape, "dense"), row.tokens)
    assert sum(dense.values()) / GIB == pytest.approx(row.dense_gb, rel=0.025)
    for spec, printed_gb in (("recency", row.recency_gb), ("random", row.random_gb)):
        held = held_bytes(shape, form(shape, spec), row.tokens)
        assert held["hca_kv"] == dense["hca_kv"]
        assert (held["csa_kv"] + held["indexer_keys"]) / GIB == pytest.approx(printed_gb, abs=0.02)


def test_flops_of_dense_grow_by_the_scores_and_hca_alone(shape):
    short, long = (step_flops_by_part(shape, form(shape, "dense"), n * 1024) for n in (256, 512))
    grown = {part: long[part] - short[part] for part in long}
    assert grown == {
        "weights": 0,
        "indexer": 21 * 64 * (128 + 1) * 2 * 65_536,
        "csa_attention": 0,
        "hca_attention": 20 * 2048 * 64 * 512 * 4,
        "window_attention": 0,
        "choosing": 0,
    }


@pytest.mark.parametrize("changes", [{}, {"hc_mult": 4, "num_experts_per_tok": 1}])
def test_weights_are_those_a_token_is_multiplied_with(changes):
    """Every matrix of a stock model but embeddings, biases of positions and the experts that are not asked."""
    config = tiny_config(**changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    asked = config.num_experts_per_tok / config.n_routed_experts
    counted = sum(
        math.prod(parameter.shape) * (asked if ".mlp.experts." in name else 1)
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and not name.endswith(("embed_tokens.weight", "position_bias"))
    )
    assert step_flops(config).n_weights == counted


def test_a_plan_prints_both_tables_and_an_unknown_packing_none(shape, capsys):
    words = ["plan", "--model", "preset:deepseek-v4-flash", "-l", "500k", "-m", "dense", "-m", "quest", "-m", "random"]
    words += ["-m", "recency:share=0.25", "-m", "snapkv:share=0.25"]
    assert cli.run_cli([*words, "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    first, second = text.index("Bytes on the released engine after 512,000 tokens"), text.index("FLOPs of a decode")
    dense, drawn = text[first:second].splitlines()[4:6]
    assert dense.split() == ["dense", "1.462", "0.330", "0.044", "0.000", "1.836", "100.0%"]
    assert drawn.startswith("random")
    (shared,) = [line for line in text[first:second].splitlines() if line.startswith("recency:share=0.25")]
    assert 24 < float(shared.split()[-1].rstrip("%")) < 27
    assert "snapkv:share=0.25" not in text[first:second]  # it has no form over entries
    assert text[second:].splitlines()[3].split() == [
        "dense", "26.54", "44.38", "1.41", "10.49", "0.72", "0.00", "83.54", "100.0%"
    ]  # fmt: skip
    tiny = DeepseekV4().shape(tiny_config(), element_bytes=2)
    assert released_tables(tiny, [form(tiny, "dense")], 512) == []
