"""What stands in for parts of the stock model while it runs one token at fixed addresses.

Compressors read and write the static cache; attention is to the window and to the entries that the native indexer
chooses, gathered; experts are called by the form of transformers that waits for nothing; streams are mixed by a matrix
that one kernel makes. Each gives what the stock part gives, but for rounding.

Shapes: S residual streams, M hidden size, Q query heads, D head size, T window tokens and entries, I indexer heads, E
indexer key size, n entries, k chosen ones.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

from kvscope.harness.backends.deepseek_v4.shape import CompressedModelShape
from kvscope.methods.kernels.dispatch import unsupported_index_topk
from kvscope.methods.kernels.index_topk.ops import index_topk
from kvscope.methods.kernels.sinkhorn.ops import sinkhorn

ATTENTION_NAME = "kvscope_deepseek_v4_step"
_GROUPED_CAPABILITY = (9, 0)


def step_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend one query as the stock eager function does, its heads as rows of two products.

    Args:
        module: the attention module, for its sink logits [Q].
        query: [1, Q, 1, D].
        key, value: one tensor [1, 1, T, D].
        attention_mask: [1, 1, 1, T], added.
        scaling: of the logits.

    Returns:
        [1, 1, Q, D].
    """
    kv_TD = key[0, 0]
    logits_QT = (query[0, :, 0] @ kv_TD.T) * scaling + attention_mask[0, 0]
    logits_QT = torch.cat((logits_QT, module.sinks[:, None]), -1)
    logits_QT = logits_QT - logits_QT.max(-1, keepdim=True).values
    weights_QT = logits_QT.softmax(-1, dtype=logits_QT.dtype)[:, :-1].to(kv_TD.dtype)
    return (weights_QT @ kv_TD)[None, None], None


def heavy_entries(
    compressor: Any, hidden: torch.Tensor, q_residual: torch.Tensor, position_ids: torch.Tensor, cache: Any, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand in for an HCA compressor: return all entries there is room for, and what hides those that are not whole."""
    held = cache.layers[layer]
    place, entries_BnD = held.place, held.hca_BnD
    made_1D = held.rings["compressor"].entry(compressor, hidden, place.hca)
    entries_BnD.index_copy_(1, place.hca.slot, made_1D[None].to(entries_BnD.dtype))
    return entries_BnD[:, None], place.hca_bias


def chosen_entries(
    compressor: Any, hidden: torch.Tensor, q_residual: torch.Tensor, position_ids: torch.Tensor, cache: Any, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand in for a CSA compressor: return the entries that its indexer chooses among the resident ones."""
    held = cache.layers[layer]
    place, indexer = held.place, compressor.indexer
    entries_BnD, keys_BnE = (held.csa.buffers[name] for name in ("compressor", "indexer"))
    for name, maker, buffer in (("compressor", compressor, entries_BnD), ("indexer", indexer, keys_BnE)):
        made_1D = held.rings[name].entry(maker, hidden, place.csa)
        buffer.index_copy_(1, place.csa.slot, made_1D[None].to(buffer.dtype))
    q_IE, weight_I = index_query(indexer, hidden, q_residual, place.query_angles)
    k = min(indexer.index_topk, keys_BnE.shape[1])
    chosen_k = index_topk(q_IE.to(keys_BnE.dtype), weight_I, keys_BnE[0], place.csa_count, k=k)
    picked_kD = entries_BnD[0].index_select(0, chosen_k.clamp_min(0))
    bias_k = torch.zeros(k, dtype=place.window_bias.dtype, device=hidden.device)
    return picked_kD[None, None], bias_k.masked_fill(chosen_k < 0, float("-inf"))[None, None, None]


def index_query(
    indexer: Any, hidden: torch.Tensor, q_residual: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a native indexer's rotated queries [I, E] and its head weights [I] in fp32, both scales in them.

    Args:
        hidden: entering attention [1, 1, M].
        q_residual: the queries' low-rank states [1, 1, R].
        angles: cosines and sines of the token's position.
    """
    q_BI1E = indexer.q_b_proj(q_residual).view(1, 1, -1, indexer.head_dim).transpose(1, 2)
    scorer = indexer.scorer
    weight_I = scorer.weights_proj(hidden)[0, 0].float() * (scorer.weights_scaling * scorer.softmax_scale)
    return apply_rotary_pos_emb(q_BI1E, *angles)[0, :, 0], weight_I


def mixing(mixer: Any, hidden_streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stand in for a hyper-connection: its doubly stochastic matrix by one kernel in place of some hundred.

    Args:
        mixer: the hyper-connection; S streams, a power of 2.
        hidden_streams: [B, 1, S, M].

    Returns:
        Weights of the way back [B, 1, S] and [B, 1, S, S], and what the block is given [B, 1, M].
    """
    S, eps = mixer.hc_mult, mixer.hc_eps
    mixed = F.linear(mixer.input_norm(hidden_streams.flatten(2).float()), mixer.fn.float())
    pre, back, mix = mixed.tensor_split((S, 2 * S), -1)
    pre_base, back_base, mix_base = mixer.base.tensor_split((S, 2 * S))
    pre_scale, back_scale, mix_scale = mixer.scale.unbind(0)
    pre = torch.sigmoid(pre * pre_scale + pre_base) + eps
    back = 2 * torch.sigmoid(back * back_scale + back_base)
    logits = (mix * mix_scale + mix_base).float().unflatten(-1, (S, S))
    matrix = sinkhorn(logits.flatten(0, 1), 2 * mixer.hc_sinkhorn_iters - 1, eps).view_as(logits)
    given = (pre.unsqueeze(-1) * hidden_streams).sum(2).to(hidden_streams.dtype)
    return back, matrix, given


def experts_name(device: torch.device, dtype: torch.dtype) -> str:
    """Return the form of transformers' experts that a step of fixed addresses calls.

    ``grouped_mm`` reads the weights where they are, and waits for the host but in bf16 from compute capability 9.0 on;
    ``batched_mm`` copies those of the experts that a token goes to.
    """
    grouped = (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and torch.cuda.get_device_capability(device) >= _GROUPED_CAPABILITY
    )
    return "grouped_mm" if grouped else "batched_mm"


def step_backends(shape: CompressedModelShape, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Return what computes a step of fixed addresses where it is not the stock part, for the row."""
    reasons = unsupported_index_topk(device, key_dim=shape.index_key_dim, n_heads=shape.index_heads)
    topk = f"torch: native top-k ({'; '.join(reasons)})" if reasons else "triton: index_topk"
    return topk, "attention to the entries it chose", f"experts: {experts_name(device, dtype)}"


@contextmanager
def one_step(model: Any) -> Iterator[None]:
    """Within it, a stock model runs one token over a static cache."""
    AttentionInterface.register(ATTENTION_NAME, step_attention)
    parameter = next(model.parameters())
    experts = ALL_EXPERTS_FUNCTIONS[experts_name(parameter.device, parameter.dtype)]
    before = model.config._attn_implementation
    with ExitStack() as undo:
        for layer in model.model.layers:
            compressor = layer.self_attn.compressor
            if compressor is not None:
                entries = chosen_entries if hasattr(compressor, "indexer") else heavy_entries
                undo.enter_context(_forward(compressor, partial(entries, compressor)))
            undo.enter_context(_forward(layer.mlp.experts, partial(experts, layer.mlp.experts)))
            for mixer in (layer.attn_hc, layer.ffn_hc):
                if mixer.hc_mult & (mixer.hc_mult - 1) == 0:
                    undo.enter_context(_forward(mixer, partial(mixing, mixer)))
        model.config._attn_implementation = ATTENTION_NAME
        try:
            yield
        finally:
            model.config._attn_implementation = before


@contextmanager
def _forward(module: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Let a module's forward be a function; hooks stay."""
    module.forward = function
    try:
        yield
    finally:
        del module.forward
