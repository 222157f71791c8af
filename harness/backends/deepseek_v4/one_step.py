"""What stands in for parts of the stock model while it runs one token at fixed addresses.

Compressors read and write the static cache; attention is to the window and to the entries that the native indexer
chooses, gathered; experts are called by the form of transformers that waits for nothing; streams are mixed by a matrix
that one kernel makes; norms and rotations, of which a step has hundreds, are a kernel each. Each gives what the stock
part gives, but for rounding.

Shapes: S residual streams, M hidden size, Q query heads, D head size, T window tokens and entries, I indexer heads, E
indexer key size, n entries, k chosen ones.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from kvscope.harness.backends.deepseek_v4.shape import CompressedModelShape
from kvscope.methods.kernels.dispatch import unsupported_index_topk
from kvscope.methods.kernels.index_topk.ops import index_topk
from kvscope.methods.kernels.sinkhorn.ops import sinkhorn
from kvscope.methods.kernels.token_rows.ops import rms_norm, rotate

ATTENTION_NAME = "kvscope_deepseek_v4_step"
_GROUPED_CAPABILITY = (9, 0)
_stand_ins: weakref.WeakKeyDictionary[Any, list[tuple[Any, Callable[..., Any]]]] = weakref.WeakKeyDictionary()


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
    return rotate(q_BI1E[0, :, 0], *angles), weight_I


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
    pre_scale, back_scale, mix_scale = mixer.scale.float().unbind(0)
    scale = torch.cat((pre_scale.expand(S), back_scale.expand(S), mix_scale.expand(S * S)))
    given, back, mix = torch.addcmul(mixer.base.float(), mixed, scale).tensor_split((S, 2 * S), -1)
    logits = mix.view(*mix.shape[:-1], S, S)
    matrix = sinkhorn(logits.flatten(0, 1), 2 * mixer.hc_sinkhorn_iters - 1, eps).view_as(logits)
    weighed = (torch.sigmoid(given) + eps).unsqueeze(-1) * hidden_streams
    return 2 * torch.sigmoid(back), matrix, weighed.sum(2).to(hidden_streams.dtype)


def normed(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """Stand in for an RMS norm, with a weight or without."""
    if isinstance(norm, stock.DeepseekV4RMSNorm):
        return rms_norm(x, norm.weight, norm.variance_epsilon)
    return rms_norm(x, None, norm.eps)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> torch.Tensor:
    """Stand in for ``apply_rotary_pos_emb``: the angles are those of one token, whatever dimension its heads are in."""
    del unsqueeze_dim
    return rotate(x, cos, sin)


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
    """Within it, a stock model runs one token over a static cache. Hooks stay."""
    AttentionInterface.register(ATTENTION_NAME, step_attention)
    attention, rotary = model.config._attn_implementation, stock.apply_rotary_pos_emb
    changed = stand_ins(model)
    for module, forward in changed:
        module.forward = forward
    model.config._attn_implementation, stock.apply_rotary_pos_emb = ATTENTION_NAME, rotated
    try:
        yield
    finally:
        model.config._attn_implementation, stock.apply_rotary_pos_emb = attention, rotary
        for module, _ in changed:
            del module.forward


def stand_ins(model: Any) -> list[tuple[Any, Callable[..., Any]]]:
    """Return the modules of a stock model whose forward is another in a step, each with that. Found once a model."""
    if model in _stand_ins:
        return _stand_ins[model]
    parameter = next(model.parameters())
    experts = ALL_EXPERTS_FUNCTIONS[experts_name(parameter.device, parameter.dtype)]
    by_class: dict[type[Any], Callable[..., Any]] = {
        stock.DeepseekV4CSACompressor: chosen_entries,
        stock.DeepseekV4HCACompressor: heavy_entries,
        stock.DeepseekV4Experts: experts,
        stock.DeepseekV4RMSNorm: normed,
        stock.DeepseekV4UnweightedRMSNorm: normed,
    }
    S = model.config.hc_mult
    if S & (S - 1) == 0:  # what the kernel takes
        by_class[stock.DeepseekV4HyperConnection] = mixing
    found: list[tuple[Any, Callable[..., Any]]] = [
        (each, partial(by_class[type(each)], each)) for each in model.modules() if type(each) in by_class
    ]
    _stand_ins[model] = found
    return found
