"""The eviction rules in plain words, over attention weights [Q, N, N] written out: the oracles of what stays.

Shapes: Q query heads, H KV heads, N tokens, w tokens of a window.
"""

import copy

import torch
from tiny_models import loaded_model, stock_model

from kvscope.harness.engine.prefill import prefill
from kvscope.methods.base import union_collectors


def stock_attention(name, ids):
    """The stock model's own attention weights, layer by layer, [Q, N, N]."""
    model = copy.deepcopy(stock_model(name))
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return [each[0] for each in model(torch.tensor([ids]), output_attentions=True).attentions]


def heard(name, ids, methods, *, chunk_tokens=48, **options):
    """Prefill with what the methods ask for."""
    loaded = loaded_model(name)
    collectors = union_collectors(methods, loaded.shape.layers)
    return prefill(loaded, ids, collectors=collectors, chunk_tokens=chunk_tokens, **options)


def best(scores_N, n):
    """The n best positions, earlier ones where scores tie, ascending."""
    order = sorted(range(len(scores_N)), key=lambda token: (-float(scores_N[token]), token))
    return sorted(order[:n])


def pooled(row, size, pooling):
    """Pool a list of numbers around each of them; beyond its ends are zeros (avg) or nothing (max)."""
    half, found = size // 2, []
    for at in range(len(row)):
        near = row[max(0, at - half) : at + half + 1]
        found.append(sum(near) / size if pooling == "avg" else max(near))
    return found


def snapkv_scores(attention_QNN, n_kv_heads, *, window, kernel, pooling):
    """Scores of the tokens before the window, a list for each KV head."""
    Q, N, _ = attention_QNN.shape
    mean_QN = attention_QNN[:, N - window :, : N - window].mean(1).tolist()
    rows = [pooled(row, kernel, pooling) for row in mean_QN]
    G = Q // n_kv_heads
    return [[sum(column) / G for column in zip(*rows[h * G : h * G + G], strict=True)] for h in range(n_kv_heads)]


def snapkv_kept(attention_QNN, n_kv_heads, *, budget, window, kernel, pooling):
    """The positions each KV head keeps."""
    N = attention_QNN.shape[1]
    rows = snapkv_scores(attention_QNN, n_kv_heads, window=window, kernel=kernel, pooling=pooling)
    return [best(row, budget - window) + list(range(N - window, N)) for row in rows]


def rotations(model, name, positions):
    """The rotation of each position as a matrix [D, D], from the stock model's tables; keys and queries are rows."""
    config = model.config
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor([positions]))
    half = torch.zeros(D, D)
    half[D // 2 :, : D // 2], half[: D // 2, D // 2 :] = torch.eye(D // 2), -torch.eye(D // 2)
    return [torch.diag(c) + torch.diag(s) @ half for c, s in zip(cos[0], sin[0], strict=True)]


def expected_scores(name, ids, layer, key_HND, value_HND, *, n_future, n_sinks, covariance, value_norm, epsilon):
    """Expected attention by the paper's formulas, in fp64; the queries are the stock model's before rotation."""
    model = stock_model(name)
    with torch.inference_mode():
        hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer]
        module = model.model.layers[layer]
        flat = module.self_attn.q_proj(module.input_layernorm(hidden))[0, n_sinks:]
    (H, N, D), use_rope = key_HND.shape, getattr(module.self_attn, "use_rope", True)
    turn = sum(rotations(model, name, list(range(N, N + n_future)))) / n_future if use_rope else torch.eye(D)
    q_QTD, turn = flat.view(len(flat), -1, D).transpose(0, 1).double(), turn.double()
    G = len(q_QTD) // H
    rows = []
    for head in range(H):
        k_TD, total = key_HND[head, n_sinks:].double(), 0
        for q_TD in q_QTD[head * G : head * G + G]:
            mean = turn @ q_TD.mean(0)
            logits = k_TD @ mean / D**0.5
            if covariance:
                spread = turn @ torch.cov(q_TD.T, correction=0) @ turn.T
                logits = logits + torch.stack([k @ spread @ k for k in k_TD]) / (2 * D)
            total = total + torch.softmax(logits, 0)
        score = total / G
        if value_norm:
            score = (score + epsilon) * value_HND[head, n_sinks:].double().norm(dim=-1)
        rows.append(torch.cat([torch.full((n_sinks,), torch.inf), score]))
    return torch.stack(rows)
