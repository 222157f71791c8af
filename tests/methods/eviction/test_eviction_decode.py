"""Eviction while decoding, and heads of unequal size: what is held is the rule's, at every step."""

import pytest
import torch
from calls import attention_call
from masked import masking
from sequences import prefilled
from sessions import Single
from tiny_models import loaded_model, prompt_ids

from kvscope.methods.adakv.method import AdaKV
from kvscope.methods.eviction import heads as heads_module
from kvscope.methods.eviction.heads import HeadPool, heads_attention, most_pages
from kvscope.methods.eviction.reapplied import Reapplied
from kvscope.methods.registry import create_method
from kvscope.methods.shape import ModelShape

STEPWISE = [
    "tova:budget_tokens=34",
    "h2o:budget_tokens=34",
    "h2o:budget_tokens=34,recent_fraction=0",
    "snapkv:budget_tokens=34,window_tokens=4,interval_steps=7,pooling=max",
]


@pytest.mark.parametrize("model", ["llama", "gpt_oss"])
@pytest.mark.parametrize("spec", STEPWISE)
def test_a_cache_that_fills_up_evicts_from_then_on(model, spec):
    """A prompt of 25 tokens fits; the answer of 40 outgrows the budget, and what was reserved."""
    loaded, method = loaded_model(model), create_method(spec)
    prompt, tokens = prefilled(loaded, prompt_ids(25), [spec]), prompt_ids(40, seed=8)
    logits, held = [], []
    for each, reserve in ((method, 3), (masking(method), 40)):
        with Single(loaded, each, prompt, reserve_tokens=reserve) as session:
            rows = []
            for step, token in enumerate(tokens, 1):
                rows.append(session.step(token))
                if each is method:
                    held.append(session.sequence.footprint())
                    read = method.predict(loaded.shape, 25, step)
                    assert held[-1].bytes_read_per_step == read.bytes_read_per_step
            logits.append(torch.stack(rows))
    torch.testing.assert_close(*logits, atol=5e-6, rtol=0)
    assert method.is_noop(25)
    most = max(each.kv_bytes for each in held)
    assert held[-1].kv_bytes == most < create_method("dense").predict(loaded.shape, 25, 40).kv_bytes
    whole = prefilled(loaded, prompt_ids(25), ["dense"])
    with Single(loaded, create_method("dense"), whole, reserve_tokens=40) as session:
        dense = torch.stack([session.step(token) for token in tokens])
    same = (logits[0] - dense).abs().amax(1) < 5e-6
    assert same[:9].all(), "nothing left while everything fitted"
    assert not same[-5:].any()


def test_reapplied_sizes():
    rule = Reapplied(interval_steps=10, budget_tokens=100, window_tokens=4, pooling="avg", kernel_size=5)
    assert [rule.held_tokens(100, n) for n in (0, 9, 10, 15, 40)] == [
        (100, 100), (109, 109), (100, 110), (105, 110), (100, 110),
    ]  # fmt: skip
    assert [rule.held_tokens(70, n) for n in (20, 30, 40, 41)] == [(90, 90), (100, 100), (100, 110), (101, 110)]


SHAPE = ModelShape(
    layers=(0,), n_layers=1, n_q_heads=6, n_kv_heads=3, head_dim=16, hidden_size=96, element_bytes=4, page_tokens=16
)


@pytest.mark.parametrize("counts", [(1, 1, 46), (16, 16, 16), (17, 1, 30), (2, 33, 13)])
@pytest.mark.parametrize("reserve", [0, 5, 16])
def test_pages_hold_any_split_of_a_layers_budget(counts, reserve):
    need = sum(-(-(n + reserve) // 16) for n in counts)
    assert need <= most_pages(SHAPE, 16 + reserve) <= 3 * -(-(16 + reserve) // 16) + 3 - 1


def uneven_pool(counts, *, reserve, seed=0):
    """A pool whose heads hold unequal numbers of random tokens, and these, [n, 2, D] a head."""
    from kvscope.methods.store import PromptKV

    draws = torch.Generator().manual_seed(seed)
    pages = torch.randn((5, 3, 2, 16, 16), generator=draws)
    prompt = PromptKV(shape=SHAPE, n_tokens=80, pages={0: pages}, dtype=torch.float32)
    kept = [torch.randperm(80, generator=draws)[:n].sort().values for n in counts]
    pool = HeadPool(
        prompt, 0, kept, n_pages=most_pages(SHAPE, sum(counts) // 3 + reserve), table_pages=5, reserve_tokens=reserve,
        device=torch.device("cpu"),
    )  # fmt: skip
    whole_HNKD = pages.permute(1, 0, 3, 2, 4).flatten(1, 2)
    return pool, [whole_HNKD[head, token_N] for head, token_N in enumerate(kept)], draws


def step(pool, held, draws):
    """Append a random token to each head; return them all."""
    k, v = (torch.randn((1, 3, 1, 16), generator=draws) for _ in range(2))
    pool.append(k, v)
    new = torch.stack((k[0, :, 0], v[0, :, 0]), 1)
    return [torch.cat([each, new[head : head + 1]]) for head, each in enumerate(held)]


def plain_attention(call, held):
    """Attention of each query head over its KV head's tokens, [Q, D], with sink logits."""
    rows = []
    for head, token_nKD in enumerate(held):
        for query in range(head * 2, head * 2 + 2):
            logits = token_nKD[:, 0] @ call.query[0, query, 0] * call.scale
            logits = torch.cat([logits, call.sink_logits[query : query + 1]])
            rows.append(torch.softmax(logits, 0)[:-1] @ token_nKD[:, 1])
    return torch.stack(rows)


@pytest.mark.parametrize("kernel", [False, True], ids=["torch", "kernel"])
@pytest.mark.parametrize("counts", [(1, 1, 46), (16, 17, 15)])
def test_attention_over_heads_of_unequal_size(counts, kernel, monkeypatch):
    """Six steps, past what was reserved; the kernel in Triton's interpreter, on the same tensors."""
    if kernel:
        monkeypatch.setattr(heads_module, "kernel_runs", lambda q, pages: True)
    pool, held, draws = uneven_pool(counts, reserve=2)
    pool.pages[pool.table_HW.max().item() + 1 :] = torch.nan  # pages of nobody
    for _ in range(6):
        held = step(pool, held, draws)
    call = attention_call(
        torch.randn((1, 6, 1, 16), generator=draws), torch.zeros(1, 3, 1, 16), torch.zeros(1, 3, 1, 16),
        scale=0.3, sink_logits=torch.randn(6, generator=draws),
    )  # fmt: skip
    found = heads_attention(call, pool.pages, counts_H1=pool.counts_H1, table_HW=pool.table_HW)
    torch.testing.assert_close(found[0, :, 0], plain_attention(call, held), atol=2e-6, rtol=0)
    assert pool.counts_H1[:, 0].tolist() == [n + 6 for n in counts]
    for head, token_nKD in enumerate(held):
        own = pool.pages[pool.table_HW[head].long(), 0].permute(0, 2, 1, 3).flatten(0, 1)
        assert torch.equal(own[: len(token_nKD)], token_nKD)


def test_uneven_heads_free_real_memory():
    """Bytes are those of the pages, whoever has them: a budget of a tenth is a tenth and less than a page a head."""
    loaded, method = loaded_model("llama"), create_method("adakv:budget_fraction=0.1,window_tokens=4")
    prompt = prefilled(loaded, prompt_ids(1000), [method.label])
    sequence = method.open(prompt, "cpu")
    sizes = {len(head) for heads in method.kept(prompt).values() for head in heads}
    assert len(sizes) > 2
    shape = loaded.shape
    held, least_bytes = sequence.footprint(), 100 * shape.kv_bytes_per_token
    assert least_bytes <= held.kv_bytes < least_bytes + shape.page_tokens * shape.kv_bytes_per_token
    assert held == method.predict(shape, 1000)
    assert isinstance(method, AdaKV)
    sequence.close()
