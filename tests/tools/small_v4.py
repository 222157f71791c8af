"""A small DeepSeek-V4 for training's tests, and key-value recall as batches."""

from collections.abc import Iterator
from typing import Any

import torch

from kvscope.harness.reference_model.data import Batch
from kvscope.harness.reference_model.v4.architecture import CSA, HCA, SLIDING, DeepseekV4, v4_config

LAYER_TYPES = [SLIDING, CSA, HCA, CSA]


def small_config(**changes: Any) -> Any:
    values = {
        "vocab_size": 512, "hidden_size": 64, "moe_intermediate_size": 48, "num_attention_heads": 4, "head_dim": 32,
        "q_lora_rank": 32, "o_lora_rank": 16, "index_n_heads": 16, "index_head_dim": 16, "sliding_window": 8,
        "hc_mult": 2, "hc_sinkhorn_iters": 3, "num_hidden_layers": 4, "layer_types": LAYER_TYPES,
        "mlp_layer_types": ["moe"] * 4, "max_position_embeddings": 4096,
    }  # fmt: skip
    return v4_config(**{**values, **changes})


def loud_model(**changes: Any) -> Any:
    """Training's model with weights large enough that every part matters, sinks and position biases, too."""
    model = DeepseekV4().build(small_config(**changes), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
            if name.endswith(("sinks", "position_bias")):
                parameter.normal_()
    return model


def logits(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """Training's logits [B, T, V]."""
    backbone = DeepseekV4()
    x, given = backbone.entering(model.model, ids_BT)
    for layer in model.model.layers:
        x = layer(x, **given)
    found: torch.Tensor = model.lm_head(model.model.norm(backbone.leaving(model.model, x, ids_BT)))
    return found


def recall_batches(*, tokens: int, rows: int, questions: int, words: int, seed: int) -> Iterator[Batch]:
    """Rows of keys and values of one token each, then some keys again; the values are scored."""
    draws = torch.Generator().manual_seed(seed)
    n_pairs = (tokens - 1 - 3 * questions) // 3
    while True:
        keys = torch.stack([torch.randperm(words, generator=draws)[:n_pairs] for _ in range(rows)]) + 10
        values = torch.randint(10 + words, 10 + 2 * words, (rows, n_pairs), generator=draws)
        asked = torch.stack([torch.randperm(n_pairs, generator=draws)[:questions] for _ in range(rows)])
        pairs = torch.stack((keys, values, torch.full_like(keys, 2)), 2)
        again = torch.stack((keys.gather(1, asked), values.gather(1, asked), torch.full_like(asked, 2)), 2)
        ids = torch.cat((torch.ones(rows, 1, dtype=torch.long), pairs.flatten(1), again.flatten(1)), 1)
        at = 1 + 3 * n_pairs + 3 * torch.arange(questions)
        at_N = (torch.arange(rows)[:, None] * ids.shape[1] + at).flatten()
        yield Batch(ids, at_N, ids.flatten()[at_N + 1], ("recall",) * rows)
