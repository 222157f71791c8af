"""A budget that holds everything is dense: the same logits, bytes where they should be, and the row says it is a no-op.

At lengths off the chunk, the page and the block, and tokens decoded on top.
"""

from functools import cache

import pytest
import torch
from lsa_tools import random_indexer
from sequences import assert_predicted, prefilled
from sessions import Single
from tiny_models import loaded_model, prompt_ids

from kvscope.methods.registry import create_method, method_names

N_STEPS = 5
LENGTHS_TOKENS = [29, 63, 100, 127, 129, 1000]
#: ``{room}`` is the prompt and what is decoded behind it.
SPECS = [
    "dense",
    "sliding_window:budget_fraction=1.0",
    "sliding_window:window={room}",
    "sliding_window:window={room},sinks=0",
    "recency:budget_fraction=1.0",
    "recency:recency_tokens={room}",
    "recency:budget_bytes=64MiB",
    "random:fraction=1.0",
    "random:fraction=1.0,recency_tokens=7,chunk_tokens=5",
    "random:budget_fraction=1.0",
    "random:budget_bytes=64MiB",
    "snapkv:budget_tokens={room},pooling=max",
    "snapkv:budget_fraction=1.0,window_tokens=2,interval_steps=3",
    "knorm:budget_fraction=1.0",
    "pyramidkv:budget_fraction=1.0",
    "adakv:budget_fraction=1.0",
    "expected_attention:budget_tokens={room}",
    "tova:budget_fraction=1.0",
    "tova:budget_tokens={room}",
    "h2o:budget_tokens={room}",
    "quest:budget_tokens={room}",
    "quest:budget_tokens={room},block_tokens=5,dense_layers=0",
    "moba:budget_tokens={room}",
    "moba:budget_tokens={room},block_tokens=3",
    "msa:budget_tokens={room}",
    "msa:budget_tokens={room},block_tokens=4",
    "dsa:budget_tokens={room},selection=synthetic",
    "dsa:budget_tokens={room},indexer=oracle",
    "lsa:budget_fraction=1.0,selection=synthetic,tau=2",
    "lsa:budget_tokens={room},selection=synthetic,tau=3,chunk_tokens=12,recency_tokens=5",
    "lsa:budget_fraction=1.0,selection=synthetic,tau=2,chunk_tokens=8,recency_tokens=5,refresh=stale1",
    "lsa:budget_tokens={room},indexer=attention,chunk_tokens=8,recency_tokens=5,tau=2",
    "lsa:budget_fraction=1.0,indexer=landmark,chunk_tokens=8,recency_tokens=5,tau=2",
]


@cache
def prompt_of(model: str, n_tokens: int):
    """The prompt, prefilled once for all methods."""
    specs = [spec.format(room=n_tokens + N_STEPS) for spec in SPECS]
    return prefilled(loaded_model(model), prompt_ids(n_tokens), specs, seed=4)


@cache
def dense_steps(model: str, n_tokens: int) -> torch.Tensor:
    return steps(loaded_model(model), create_method("dense"), prompt_of(model, n_tokens))[0]


def steps(loaded, method, prompt):
    """Return the logits of every step, and the last footprint."""
    with Single(loaded, method, prompt, reserve_tokens=N_STEPS) as session:
        logits = torch.stack([session.step(token) for token in prompt_ids(N_STEPS, seed=8)])
        return logits, session.sequence.footprint()


def test_every_method_is_here() -> None:
    assert {spec.partition(":")[0] for spec in SPECS} == set(method_names())


@pytest.mark.parametrize(("model", "n_tokens"), [*(("llama", n) for n in LENGTHS_TOKENS), ("gemma3", 100)])
@pytest.mark.parametrize("spec", SPECS)
def test_a_full_budget_is_dense(spec: str, model: str, n_tokens: int) -> None:
    loaded = loaded_model(model)
    method = create_method(spec.format(room=n_tokens + N_STEPS))
    found, footprint = steps(loaded, method, prompt_of(model, n_tokens))
    torch.testing.assert_close(found, dense_steps(model, n_tokens), atol=5e-6, rtol=0)
    assert method.is_noop(n_tokens, loaded.shape)
    assert_predicted(footprint, method, method.predict(loaded.shape, n_tokens, N_STEPS))
    dense = create_method("dense").predict(loaded.shape, n_tokens, N_STEPS)
    # Chunks are held without the rest of a page, sinks and what follows in pages of their own.
    pages_bytes = 2 * loaded.shape.page_tokens * loaded.shape.kv_bytes_per_token
    assert abs(footprint.kv_bytes - dense.kv_bytes) <= pages_bytes
    if method.name in ("recency", "random", "snapkv", "knorm"):
        assert footprint == dense


@pytest.mark.parametrize("n_tokens", LENGTHS_TOKENS)
def test_a_threshold_that_every_chunk_reaches_is_dense(n_tokens: int, tmp_path) -> None:
    loaded = loaded_model("llama")
    folder = random_indexer(tmp_path / "indexer", loaded.shape)
    method = create_method(f"lsa:threshold=1e-30,tau=2,recency_tokens=9,indexer={folder}")
    prompt = prefilled(loaded, prompt_ids(n_tokens), [method.label], seed=4)
    found, _ = steps(loaded, method, prompt)
    torch.testing.assert_close(found, dense_steps("llama", n_tokens), atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    "spec",
    [
        "sliding_window:window={room}",
        "quest:budget_tokens={room},block_tokens=5",
        "tova:budget_tokens={room}",
        "h2o:budget_tokens={room}",
    ],
)
def test_one_token_less_is_no_longer_dense(spec: str) -> None:
    """The query's own token takes its place in a window and in a budget of reads."""
    n_tokens = 127
    sinks = 4 if "sliding" in spec else 0
    shape = loaded_model("llama").shape
    assert create_method(spec.format(room=n_tokens + 1 - sinks)).is_noop(n_tokens, shape)
    assert not create_method(spec.format(room=n_tokens - sinks)).is_noop(n_tokens, shape)


def test_a_budget_of_blocks_is_never_exceeded() -> None:
    """103 tokens hold six blocks of 16 and a part of a seventh: a context of 103 is read whole, one of 104 is not."""
    plan = create_method("quest:budget_tokens=103").blocks(103)
    assert (plan.n_blocks, plan.reads_all(103), plan.reads_all(104)) == (6, True, False)


@pytest.mark.parametrize("n_tokens", [0, 1, 3])
def test_all_of_a_prompt_of_no_more_tokens_than_sinks_is_a_budget(n_tokens: int) -> None:
    shape = loaded_model("llama").shape
    method, dense = create_method("sliding_window:budget_fraction=1.0"), create_method("dense")
    assert method.is_noop(n_tokens, shape)
    assert method.predict(shape, n_tokens).bytes_read_per_step == dense.predict(shape, n_tokens).bytes_read_per_step
