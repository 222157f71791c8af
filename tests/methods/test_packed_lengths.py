"""Packed pages at lengths around a page and the residual: bytes as predicted, a full budget is dense of that format."""

from functools import lru_cache

import pytest
import torch
from sequences import assert_predicted, prefilled
from sessions import Single
from tiny_models import loaded_model, prompt_ids

from kvscope.methods.registry import create_method

# Chunks of 16 are packed as pages of 16 are, so that everything kept is what dense holds.
FULL = [
    "recency:budget_fraction=1.0",
    "lsa:budget_fraction=1.0,chunk_tokens=16,selection=synthetic",
    "snapkv:budget_fraction=1.0",
]
PART = ["dense", "recency:budget_fraction=0.5", "lsa:budget_fraction=0.4,chunk_tokens=16,selection=synthetic"]
LENGTHS_TOKENS = [0, 1, 15, 63, 64, 65, 127]
N_STEPS = 17  # past the end of a page


@lru_cache(maxsize=1)
def prompt_of(n_tokens, kv):
    """The prompt, prefilled once for all methods that store it so."""
    return prefilled(loaded_model("llama"), prompt_ids(n_tokens), [stored_as(spec, kv) for spec in [*PART, *FULL]])


def stored_as(spec, kv):
    return spec if kv is None else f"{spec}{',' if ':' in spec else ':'}kv={kv}"


def decoded(spec, n_tokens, kv):
    """Return logits of some steps; bytes must be as predicted."""
    loaded, method, prompt = loaded_model("llama"), create_method(stored_as(spec, kv)), prompt_of(n_tokens, kv)
    with Single(loaded, method, prompt, reserve_tokens=N_STEPS) as session:
        logits = torch.stack([session.step(token) for token in prompt_ids(N_STEPS, seed=8)])
        assert_predicted(session.sequence.footprint(), method, method.predict(loaded.shape, n_tokens, N_STEPS))
    return logits


@pytest.mark.parametrize("kv", ["int8", "kivi2"])
@pytest.mark.parametrize("n_tokens", LENGTHS_TOKENS)
def test_bytes_are_as_predicted_and_a_full_budget_is_dense(n_tokens, kv):
    dense, *_ = [decoded(spec, n_tokens, kv) for spec in PART]
    for spec in FULL:
        full = decoded(spec, n_tokens, kv)
        torch.testing.assert_close(full, dense, atol=2e-5, rtol=1e-5, msg=lambda text, spec=spec: f"{spec}: {text}")


@pytest.mark.parametrize("n_tokens", LENGTHS_TOKENS)
def test_no_format_is_the_store_as_it_is(n_tokens):
    assert torch.equal(decoded("dense", n_tokens, "none"), decoded("dense", n_tokens, None))
