"""A tiny random DeepSeek-V4, and its cache restricted by masks: the oracle of physical eviction."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, DeepseekV4Config

LAYER_TYPES = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"] * 2
# Within the steps ends an entry of 32 tokens, and several of 4.
N_TOKENS, N_NEW = 403, 14


def tiny_config(**changes) -> DeepseekV4Config:
    values = {
        "vocab_size": 512,
        "hidden_size": 64,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "q_lora_rank": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "o_groups": 2,
        "o_lora_rank": 16,
        # With few heads ReLU leaves entries a score of exactly 0, and which of these top-k takes is chance.
        "index_n_heads": 16,
        "index_head_dim": 16,
        "index_topk": 24,
        "sliding_window": 32,
        "hc_mult": 2,
        "hc_sinkhorn_iters": 3,  # of 20 each would cost as much as a layer, twice a layer
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 4096,
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 32},
        "layer_types": LAYER_TYPES,
        "mlp_layer_types": ["moe"] * 6,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return DeepseekV4Config(**{**values, **changes})


def random_model(**changes):
    """A stock model whose logits depend on the context; the same weights at every call."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(tiny_config(**changes), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
            if name.endswith(("sinks", "position_bias")):
                parameter.normal_()
    return made


@contextmanager
def masked(loaded, kept: dict[int, torch.Tensor]) -> Iterator[None]:
    """Let a stock model see, in each CSA layer, only the entries that ``kept`` (bool, by entry) allows; later ones all.

    Both hooks are needed: the scores choose, and a choice among too few entries falls back on masked ones.
    """

    def allowed(layer: int, n: int) -> torch.Tensor:
        mask = torch.ones(n, dtype=torch.bool, device=kept[layer].device)
        known = kept[layer][:n]
        mask[: len(known)] = known
        return mask

    def on_scores(layer):
        return lambda module, args, out: out.masked_fill(~allowed(layer, out.shape[-1]), -torch.inf)

    def on_choice(layer):
        def hook(module, args, out):
            mask = allowed(layer, int(out.max()) + 1 if out.numel() else 1)
            return torch.where((out >= 0) & mask[out.clamp(min=0)], out, -1)

        return hook

    handles = []
    for layer in loaded.shape.layers:
        indexer = loaded.model.model.layers[layer].self_attn.compressor.indexer
        handles.append(indexer.scorer.register_forward_hook(on_scores(layer)))
        handles.append(indexer.register_forward_hook(on_choice(layer)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
