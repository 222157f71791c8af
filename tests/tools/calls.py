"""Attention calls as tests make them."""

from kvscope.methods.base import AttentionCall


def attention_call(query, key=None, value=None, *, scale, **extras):
    """A call of one sequence and one token; without K and V where they are in pages already."""
    key = query if key is None else key
    return AttentionCall(query=query, key=key, value=key if value is None else value, scale=scale, **extras)
