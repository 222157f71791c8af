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
