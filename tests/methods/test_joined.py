"""Sequences that attend together in plain torch: each gets what it gets alone.

Shapes: n sequences, Q query heads, H KV heads, P tokens a page, D head size.
"""

from dataclasses import replace

import pytest
import torch
from calls import attention_call

from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.session import Session
from kvscope.harness.engine.synthetic import synthetic_prompt
from kvscope.methods.attention import merge_partials, paged_attention, paged_partial
from kvscope.methods.base import SequenceCache, union_collectors
from kvscope.methods.joined import Read, joined_attention, joins
from kvscope.methods.registry import create_method
from kvscope.methods.resident import ResidentSequence

H, Q, P, D = 2, 6, 16, 24
OPTIONS = [{}, {"softcap": 3.0}, {"sink_logits": torch.tensor([1.0, -2.0, 0.5, 4.0, 0.0, 2.0])}]


class Negating:
    """A rotation that can be told: by so many positions it multiplies with minus as many."""

    def angles_at(self, n_tokens_B1):
        return n_tokens_B1.float()[..., None, None], torch.zeros(1)

    def back_by(self, q_BQ1D, cos, sin):
        return -cos * q_BQ1D


def pages_of(n_tokens, *, spare, seed):
    """Random pages; what lies behind the stored tokens is NaN in no page that is read, and large in the last one."""
    pages = torch.randn(-(-n_tokens // P) + spare, H, 2, P, D, generator=torch.Generator().manual_seed(seed))
    used = -(-n_tokens // P)
    pages[used:] = torch.nan
    if n_tokens % P:
        pages[used - 1, :, :, n_tokens % P :] = 1e4
    return pages


def call_of(n, **options):
    q = torch.randn(n, Q, 1, D, generator=torch.Generator().manual_seed(9)) * 3
    return attention_call(q, scale=0.2, **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n_tokens", [(1,), (16, 1), (17, 63, 100, 15), (100, 100)])
def test_each_sequence_gets_what_it_gets_alone(n_tokens, options):
    call = call_of(len(n_tokens), **options)
    reads = [Read(pages=pages_of(n, spare=b % 2, seed=b), n_tokens=n) for b, n in enumerate(n_tokens)]
    out = joined_attention(call, [(read,) for read in reads])
    assert out.shape == call.query.shape
    for b, read in enumerate(reads):
        one = replace(call, query=call.query[b : b + 1])
        alone = paged_attention(one, read.pages, n_tokens=read.n_tokens)
        torch.testing.assert_close(out[b : b + 1], alone, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_sequence_of_two_reads_has_their_union_and_turns_for_one(options):
    call = call_of(3, rotation=Negating(), **options)
    pages = [pages_of(n, spare=1, seed=n) for n in (40, 4, 33, 16, 5)]
    reads = [
        (Read(pages=pages[0], n_tokens=40), Read(pages=pages[1], n_tokens=4, turn_tokens=2)),
        (Read(pages=pages[2], n_tokens=33),),
        (Read(pages=pages[3], n_tokens=16), Read(pages=pages[4], n_tokens=5, turn_tokens=1)),
    ]
    out = joined_attention(call, reads)
    for b, each in enumerate(reads):
        query = call.query[b : b + 1]
        parts = [
            paged_partial(
                query * (-read.turn_tokens or 1), read.pages, n_tokens=read.n_tokens, scale=0.2, softcap=call.softcap
            )
            for read in each
        ]
        alone = merge_partials(parts, query, sink_logits=call.sink_logits)
        torch.testing.assert_close(out[b : b + 1], alone, atol=2e-6, rtol=2e-5)


def test_without_positions_nothing_turns():
    call = call_of(1)
    pages = pages_of(20, spare=0, seed=3)
    turned = joined_attention(call, [(Read(pages=pages, n_tokens=20, turn_tokens=7),)])
    assert torch.equal(turned, joined_attention(call, [(Read(pages=pages, n_tokens=20),)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_attend_one_by_one(dtype):
    assert joins(call_of(2))
    assert not joins(attention_call(torch.zeros(2, Q, 1, D, dtype=dtype), scale=1.0))


def test_nan_in_one_sequence_reaches_no_other():
    call = call_of(2)
    pages = [pages_of(20, spare=0, seed=b) for b in range(2)]
    clean = joined_attention(call, [(Read(pages=each, n_tokens=20),) for each in pages])
    pages[0][0, 0, 0, 0, 0] = torch.nan
    out = joined_attention(call, [(Read(pages=each, n_tokens=20),) for each in pages])
    assert bool(out[0].isnan().any())
    assert torch.equal(out[1], clean[1])


def test_steps_of_sequences_that_join_and_of_one_that_does_not():
    """Every method in one eager step: tokens and bytes of each are those of a session of its own."""
    loaded = load_model("preset:tiny", device="cpu", dtype="float32")
    specs = (
        "dense",
        "quest:budget_tokens=96",
        "sliding_window:sinks=4,window=64",
        "sliding_window:sinks=0,window=64",
        "recency:budget_fraction=0.3",
        "knorm:budget_fraction=0.5",
    )
    methods = [create_method(spec) for spec in specs]
    collectors = union_collectors(methods, loaded.shape.layers)
    prompt = synthetic_prompt(loaded, 300, mirror=True, collectors=collectors, seed=3)
    fed = [[(7 * b + 3 * step) % 50 for b in range(len(methods))] for step in range(4)]
    with Session(loaded) as session:
        members = [session.add(method, prompt, reserve_tokens=1) for method in methods]
        logits = torch.stack([session.step(tokens) for tokens in fed])
        footprints = [member.cache.footprint() for member in members]
    for b, method in enumerate(methods):
        with Session(loaded) as session:
            member = session.add(method, prompt, reserve_tokens=1)
            alone = torch.stack([session.step([tokens[b]]) for tokens in fed])[:, 0]
            assert member.cache.footprint() == footprints[b], method.label
        torch.testing.assert_close(logits[:, b], alone, atol=1e-4, rtol=1e-4)


class Doubling(ResidentSequence):
    def attend(self, layer, call):
        return 2 * super().attend(layer, call)


class Named(ResidentSequence):
    """Attends as its parent does."""


class Reading(Doubling):
    def reads(self, layer, call):
        return super().reads(layer, call)


def test_what_attends_in_its_own_way_is_not_passed_over():
    assert ResidentSequence.says_reads
    assert Named.says_reads
    assert Reading.says_reads
    assert not Doubling.says_reads
    assert not type("Other", (SequenceCache,), {"attend": lambda self, layer, call: call.query}).says_reads
    loaded = load_model("preset:tiny", device="cpu", dtype="float32")
    prompt = synthetic_prompt(loaded, 100, mirror=True, collectors=(), seed=1)
    logits = {}
    for kind in (ResidentSequence, Doubling):
        with Session(loaded) as session:
            for _ in range(2):
                member = session.add(create_method("dense"), prompt, reserve_tokens=1)
                member.cache = kind(prompt, loaded.device, ranges=[(0, 100)], reserve_tokens=1)
            logits[kind] = session.step([3, 4])
    assert not torch.allclose(logits[ResidentSequence], logits[Doubling], atol=1e-2)
