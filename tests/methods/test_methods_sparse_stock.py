"""transformers' own sparse models as oracles: MiniMax-M3 and DeepSeek-V3.2 with random weights.

Two halves. The stock indexer's queries and keys, put through our scores and our choice, give the stock selection. And
our gather, fed with the indices the stock indexer chose, gives the stock model's outputs.
"""

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
import transformers
from rounding import assert_same_sums, roundings
from tiny_models import cache_kwarg
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from kvscope.methods.dsa.lightning import lightning_scores
from kvscope.methods.gather import choose, gather_blocks, page_logits, token_partial
from kvscope.methods.msa.method import block_maxima

N_TOKENS, N_DECODED, PAGE_TOKENS = 150, 6, 8
BASE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "max_position_embeddings": 4096,
}
BLOCK_TOKENS, TOP_BLOCKS, TOP_TOKENS = 16, 3, 24


def minimax_m3():
    config_module = pytest.importorskip("transformers.models.minimax_m3_vl.configuration_minimax_m3_vl")
    modeling = pytest.importorskip("transformers.models.minimax_m3_vl.modeling_minimax_m3_vl")
    config = config_module.MiniMaxM3VLTextConfig(
        **BASE,
        num_key_value_heads=2,
        intermediate_size=32,
        dense_intermediate_size=96,
        shared_intermediate_size=32,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        rotary_dim=16,
        index_n_heads=2,
        index_head_dim=32,
        index_block_size=BLOCK_TOKENS,
        index_topk_blocks=TOP_BLOCKS,
        index_local_blocks=1,
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        mlp_layer_types=["dense", "sparse", "sparse"],
    )
    return randomised(modeling.MiniMaxM3VLTextModel, config)


def deepseek_v32():
    config = transformers.DeepseekV32Config(
        **BASE,
        num_key_value_heads=4,
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=32,
        q_lora_rank=48,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        first_k_dense_replace=1,
        index_topk=TOP_TOKENS,
        index_head_dim=32,
        index_n_heads=8,
    )
    return randomised(transformers.DeepseekV32Model, config)


def randomised(cls, config):
    """Return a model whose weights are large enough that attention is far from uniform."""
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4.0)
    return model


def ids():
    return torch.randint(2, 290, (1, N_TOKENS), generator=torch.Generator().manual_seed(1))


def as_pages(k_HTD, v_HTD):
    """Pages [S, H, 2, P, D] of K and V [H, T, D]."""
    H, T, D = k_HTD.shape
    room = torch.zeros(2, H, -(-T // PAGE_TOKENS) * PAGE_TOKENS, D)
    room[0, :, :T], room[1, :, :T] = k_HTD, v_HTD
    return room.unflatten(2, (-1, PAGE_TOKENS)).permute(2, 1, 0, 3, 4).contiguous()


def watch(module, log):
    """Note every call of a stock module: positional and keyword arguments, and its result."""
    return module.register_forward_hook(lambda _, args, kwargs, out: log.append((args, kwargs, out)), with_kwargs=True)


@contextmanager
def ranked_scores(module):
    """Collect what a stock indexer ranks: the scores it hands to ``topk``, masks included."""
    found, inside = [], []
    topk = torch.Tensor.topk

    def noting(scores, *args, **options):
        if inside:
            found.append(scores.detach().clone())
        return topk(scores, *args, **options)

    handles = [
        module.register_forward_pre_hook(lambda *_: inside.append(True)),
        module.register_forward_hook(lambda *_: inside.clear()),
    ]
    torch.Tensor.topk = noting
    try:
        yield found
    finally:
        torch.Tensor.topk = topk
        for handle in handles:
            handle.remove()


@torch.no_grad()
def test_blocks_of_minimax_m3_are_ours():
    model, log = minimax_m3(), []
    indexer = model.layers[1].self_attn.indexer
    with watch(indexer, log), ranked_scores(indexer) as ranked:
        model(ids())
    (stock_scores,) = ranked
    (hidden, (cos, sin), _, _), _, stock = log[0]
    apply = transformers.models.minimax_m3_vl.modeling_minimax_m3_vl.apply_rotary_pos_emb
    q, k = (
        norm(project(hidden).view(1, N_TOKENS, -1, indexer.head_dim)).transpose(1, 2)
        for norm, project in ((indexer.q_norm, indexer.q_proj), (indexer.k_norm, indexer.k_proj))
    )
    q, k = apply(q, k, cos[..., : indexer.head_dim], sin[..., : indexer.head_dim])
    q_HTD, k_HTD = q[0], k[0].expand(q.shape[1], -1, -1)
    assert stock.shape == (1, 2, N_TOKENS, TOP_BLOCKS)
    n_chosen_freely = 0
    for position in range(N_TOKENS):
        current = position // BLOCK_TOKENS
        stock_sets = [set(row.tolist()) - {-1} for row in stock[0, :, position]]
        if current < TOP_BLOCKS:  # no more blocks than may be read
            assert stock_sets == [set(range(current + 1))] * 2
            continue
        pages = as_pages(k_HTD[:, : position + 1], torch.zeros_like(k_HTD[:, : position + 1]))
        logits = page_logits(q_HTD[:, position : position + 1], pages, n_tokens=current * BLOCK_TOKENS)
        scores_HGN = block_maxima(logits, BLOCK_TOKENS)
        # The stock's own score of the current block is made infinite, which is our forcing of it.
        theirs = stock_scores[0, :, position]
        torch.testing.assert_close(scores_HGN[:, 0], theirs[:, :current], atol=1e-5, rtol=1e-6)
        assert (theirs.argmax(-1) == current).all()
        chosen = choose(scores_HGN, n_chosen=TOP_BLOCKS - 1, current=current, n_kv_heads=2)
        assert [set(row.tolist()) for row in chosen.blocks_HB] == stock_sets
        n_chosen_freely += scores_HGN.shape[-1] > TOP_BLOCKS - 1
    assert n_chosen_freely > 50


@torch.no_grad()
def test_tokens_of_deepseek_v32_are_ours():
    model, log = deepseek_v32(), []
    indexer = model.layers[1].self_attn.indexer
    with watch(indexer, log), ranked_scores(indexer) as ranked:
        model(ids())
    (stock_scores,) = ranked
    args, _, stock = log[0]
    hidden, q_residual, (cos, sin) = args[:3]
    apply = transformers.models.deepseek_v32.modeling_deepseek_v32.apply_rotary_pos_emb
    R = indexer.qk_rope_head_dim
    q = indexer.wq_b(q_residual).view(1, N_TOKENS, indexer.n_heads, indexer.head_dim)
    k = indexer.k_norm(indexer.wk(hidden)).unsqueeze(2)
    q_turned, k_turned = apply(q[..., :R], k[..., :R], cos, sin, unsqueeze_dim=2)
    q_TID = torch.cat([q_turned, q[..., R:]], -1)[0]
    k_TD = torch.cat([k_turned, k[..., R:]], -1)[0, :, 0]
    weight_TI = indexer.weights_proj(hidden)[0]
    n_same_sets = 0
    for position in range(TOP_TOKENS, N_TOKENS):
        scores_T = lightning_scores(q_TID[position], k_TD[: position + 1], weight_TI[position])
        torch.testing.assert_close(scores_T, stock_scores[0, position, : position + 1], atol=1e-6, rtol=1e-6)
        # DeepSeek does not force the current token, so here it is one of those to choose from.
        ours = choose(scores_T[None, None], n_chosen=TOP_TOKENS, current=-1, n_kv_heads=1).blocks_HB[0, :-1]
        theirs = stock[0, position].long()
        # ReLU leaves ties at zero, so the scores of the chosen are compared, and sets where there is no tie.
        torch.testing.assert_close(scores_T[ours].sort().values, scores_T[theirs].sort().values, atol=1e-6, rtol=1e-6)
        n_same_sets += set(ours.tolist()) == set(theirs.tolist())
    assert n_same_sets > 0.9 * (N_TOKENS - TOP_TOKENS)


def gather_attention(module, query, key, value, attention_mask, scaling=None, indices=None, block_indices=None, **_):
    """The attention of a sparse stock model through our gather, query by query; batch 1."""
    pages = as_pages(key[0], value[0])
    H, n_keys, n_queries = key.shape[1], key.shape[2], query.shape[2]
    out = torch.empty(n_queries, H, query.shape[1] // H, value.shape[-1])
    for index in range(n_queries):
        n_tokens = n_keys - n_queries + index + 1
        block_tokens = 1 if block_indices is None else module.indexer.block_size
        current = (n_tokens - 1) // block_tokens
        if block_indices is not None:
            rows = [sorted(set(row.tolist()) - {-1}) for row in block_indices[0, :, index]]
        elif indices is not None:
            rows = [sorted(i for i in indices[0, index].tolist() if i <= current)] * H
        else:
            rows = [list(range(n_tokens))] * H
        blocks_HB = torch.tensor(rows)
        # The last block of the table is partly filled when it is the current one, which is always so for blocks.
        tail_tokens = n_tokens - current * block_tokens
        assert block_tokens == 1 or (blocks_HB[:, -1] == current).all()
        k_HTD, v_HTD = gather_blocks(pages, blocks_HB, block_tokens=block_tokens, tail_tokens=tail_tokens)
        assert k_HTD.shape[1] == (blocks_HB.shape[1] - 1) * block_tokens + tail_tokens
        module.n_gathered = getattr(module, "n_gathered", 0) + k_HTD.shape[1]
        module.n_seen = getattr(module, "n_seen", 0) + n_tokens
        part = token_partial(query[0, :, index].unflatten(0, (H, -1)), k_HTD, v_HTD, scale=scaling)
        out[index] = part.out
    return out.flatten(1, 2)[None], None


@torch.no_grad()
def outputs(model):
    """Outputs of a prefill in chunks and of decode steps behind it, as one tensor."""
    cache, found, tokens = transformers.DynamicCache(config=model.config), [], ids()
    n_prefilled = N_TOKENS - N_DECODED
    cuts = [*range(0, n_prefilled, 50), *range(n_prefilled, N_TOKENS + 1)]
    for start, end in pairwise(cuts):
        found.append(model(tokens[:, start:end], **cache_kwarg(model, cache), use_cache=True)[0])
    return torch.cat(found, 1)


@pytest.mark.parametrize("build", [minimax_m3, deepseek_v32])
def test_our_gather_fed_by_the_stock_indexer_is_the_stock_model(build):
    AttentionInterface.register("test_gather", gather_attention)
    AttentionMaskInterface.register("test_gather", eager_mask)
    model = build()
    stock = outputs(model)
    model.config._attn_implementation = "test_gather"
    ours = outputs(model)
    assert stock.abs().max() > 1
    # Three layers, attention and MLP each of two products in a row, over a hidden size of 64.
    assert_same_sums(ours, stock, n_roundings=roundings(sums=3 * 4, terms=64))
    sparse = [layer.self_attn for layer in model.layers if getattr(layer.self_attn, "indexer", None) is not None]
    assert len(sparse) >= 2
    for module in sparse:
        assert module.n_gathered < 0.6 * module.n_seen
