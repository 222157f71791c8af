"""Packed pages at lengths around a page and the residual: bytes as predicted, a full budget is dense of that format."""

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
N_STEPS = 20  # past the end of a page


def decoded(spec, n_tokens):
    """Return logits of some steps; bytes must be as predicted."""
    loaded, method = loaded_model("llama"), create_method(spec)
    prompt = prefilled(loaded, prompt_ids(n_tokens), [spec])
    with Single(loaded, method, prompt, reserve_tokens=N_STEPS) as session:
        logits = torch.stack([session.step(token) for token in prompt_ids(N_STEPS, seed=8)])
        assert_predicted(session.sequence.footprint(), method, method.predict(loaded.shape, n_tokens, N_STEPS))
    return logits


@pytest.mark.parametrize("kv", ["int8", "kivi2"])
@pytest.mark.parametrize("n_tokens", [1, 15, 63, 64, 65, 127])
def test_bytes_are_as_predicted_and_a_full_budget_is_dense(n_tokens, kv):
    dense, *_ = [decoded(f"{spec}{',' if ':' in spec else ':'}kv={kv}", n_tokens) for spec in PART]
    for spec in FULL:
        full = decoded(f"{spec},kv={kv}", n_tokens)
        torch.testing.assert_close(full, dense, atol=2e-5, rtol=1e-5, msg=lambda text, spec=spec: f"{spec}: {text}")
    assert torch.equal(decoded("dense:kv=none", n_tokens), decoded("dense", n_tokens))
