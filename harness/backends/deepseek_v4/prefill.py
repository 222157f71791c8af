"""Prefill of DeepSeek-V4 by the stock forward, chunk by chunk and token-major; then everything moves to the host.

The model concatenates compressed entries behind the cache's ``update``, where kvscope's layer-major engine cannot
follow, and carries their causality in a mask. So attention is the stock eager computation under a name of its own, with
a mask.

Shapes: B batch (1), Q query heads, S new tokens, T window tokens and entries, D head size, M hidden size.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from kvscope.harness.backends.deepseek_v4.cache import Angles, live_bytes, move_rest, take_entries
from kvscope.harness.backends.deepseek_v4.shape import CompressedModelShape
from kvscope.harness.engine.backend import ReadyModel
from kvscope.harness.engine.finite import require_finite_layers, total
from kvscope.harness.engine.glue import cache_argument, observing_attention
from kvscope.methods.store import PromptKV

ATTENTION_NAME = "kvscope_deepseek_v4"
KEEPS_WEIGHTS = "kvscope_keeps_weights"
"""Name under which an attention module has a function that is handed its weights [B, Q, S, T]; mostly it has none."""


def compressed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as the stock eager function does, bit for bit, without its copy of the one KV head for every query head.

    Those copies would be most of the memory of a decode step, and the driver's reading is about the cache.

    Args:
        module: the attention module, for its sink logits [Q].
        query: [B, Q, S, D].
        key, value: [B, 1, T, D].
        attention_mask: [B, 1, S, T], added.
        scaling: of the logits.

    Returns:
        [B, S, Q, D].
    """
    Q = query.shape[1]
    k_BQTD, v_BQTD = key.expand(-1, Q, -1, -1), value.expand(-1, Q, -1, -1)
    logits_BQST = torch.matmul(query, k_BQTD.transpose(2, 3)).mul_(scaling)
    if attention_mask is not None:
        logits_BQST = logits_BQST.add_(attention_mask)
    sinks = module.sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[2], -1)
    logits_BQST = torch.cat([logits_BQST, sinks], -1)
    logits_BQST -= logits_BQST.max(-1, keepdim=True).values
    weights_BQST = logits_BQST.softmax(-1, dtype=logits_BQST.dtype)[..., :-1].to(value.dtype)
    if (keep := getattr(module, KEEPS_WEIGHTS, None)) is not None:
        keep(weights_BQST)
    return torch.matmul(weights_BQST, v_BQTD).transpose(1, 2).contiguous(), None


def use_own_attention(model: Any) -> None:
    """Switch a stock model to the name this backend registers: causality of the entries travels in the mask."""
    AttentionInterface.register(ATTENTION_NAME, compressed_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, eager_mask)
    model.set_attn_implementation(ATTENTION_NAME)


@dataclass(kw_only=True)
class CompressedPrompt(PromptKV):
    """A prefilled prompt, all of it in host memory: read only, opened by every method.

    Attributes:
        config: the model's, from which caches are made.
        host: CSA layer -> its entries [B, n, D] as ``compressor`` and indexer keys [B, n, E] as ``indexer``, pinned
            when the model is on a GPU: the mirror.
        rest: the stock cache without them: windows, HCA entries, pending tokens.
        angles: rotation of the compressed layers at a position.
        modules: the model's decoder layers: a step of fixed addresses goes by their compressors' sizes and biases.
    """

    config: Any
    host: dict[int, dict[str, torch.Tensor]]
    rest: DynamicCache
    angles: Angles
    modules: Any
    pages: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def n_entries(self) -> int:
        """Entries of every CSA layer."""
        return self.n_tokens // self.shape.page_tokens

    @property
    def host_bytes(self) -> int:
        """Bytes of the mirror."""
        return sum(tensor.nbytes for tensors in self.host.values() for tensor in tensors.values())


def compressed_prefill(
    ready: ReadyModel, ids_N: torch.Tensor, *, chunk_tokens: int, seed: int, prompt_sha256: str
) -> CompressedPrompt:
    """Prefill with the stock forward and move the cache to the host; arguments as ``Backend.prefill``."""
    model, shape = ready.model, ready.shape
    assert isinstance(shape, CompressedModelShape)
    cache = DynamicCache(config=model.config)
    last_hidden: dict[int, torch.Tensor] = {}
    with observing_attention(model, shape.layers, last_hidden.__setitem__):
        for start in range(0, len(ids_N), chunk_tokens):
            part = ids_N[None, start : start + chunk_tokens].to(ready.device)
            model(input_ids=part, use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})
    peak_bytes = sum(live_bytes(cache).values())
    widths = {"compressor": shape.head_dim, "indexer": shape.index_key_dim}
    like = {name: torch.empty((1, 0, width), dtype=ready.dtype) for name, width in widths.items()}
    pinned = ready.device.type == "cuda"
    host = {layer: take_entries(cache.layers[layer], like, pinned=pinned) for layer in shape.layers}
    totals = {layer: [total(host[layer][name]) for name in widths] for layer in shape.layers}
    require_finite_layers(totals, [f"what the {name} keeps" for name in widths], ready.dtype)
    # On the host as well: what stays on the device is a sequence's own copy, and counted there.
    move_rest(cache, torch.device("cpu"))

    def angles(position: int) -> tuple[torch.Tensor, torch.Tensor]:
        where = torch.tensor([[position]], device=ready.device)
        like_hidden = torch.empty(0, device=ready.device)
        cos, sin = model.model.rotary_emb(like_hidden, position_ids=where, layer_type="compress")
        return cos[0, 0], sin[0, 0]

    return CompressedPrompt(
        shape=shape,
        n_tokens=len(ids_N),
        dtype=ready.dtype,
        config=model.config,
        host=host,
        rest=cache,
        angles=angles,
        modules=model.model.layers,
        last_hidden={layer: hidden_BM.clone() for layer, hidden_BM in last_hidden.items()},
        seed=seed,
        prompt_sha256=prompt_sha256,
        peak_device_kv_bytes=peak_bytes,
    )
