"""The paged_decode kernel against its reference in fp64: in Triton's interpreter on a CPU, compiled on a GPU.

Shapes: B sequences, Q query heads, H KV heads, D head size, S slots, P tokens a page.
"""

import dataclasses

import pytest
import torch
from kernel_tools import DEVICE, DTYPES, FP32_ERROR, generator, randn

from kvscope.methods.kernels.paged_decode import kernel
from kvscope.methods.kernels.paged_decode.inputs import PagedKV
from kvscope.methods.kernels.paged_decode.kernel import Tuning, paged_decode, tile_size
from kvscope.methods.kernels.paged_decode.reference import paged_decode_reference

SMALL_TILES = Tuning(tile_bytes=2048)  # 16 tokens in fp16 at D 64: splits and loops even in tiny inputs


def counts(*n):
    return torch.tensor(n, dtype=torch.int32, device=DEVICE).view(-1, 1)


def table(B, H, S, n_slots, *, seed=0):
    """Page tables [B, H, S] of slots drawn without repetition."""
    rows = [torch.randperm(n_slots, generator=generator(seed + i))[:S] for i in range(B * H)]
    return torch.stack(rows).view(B, H, S).to(DEVICE)


def eager(q, stores, *, scale, softcap, sink_logits):
    """The reference carried out in the dtype of the inputs."""
    options = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits, "dtype": q.dtype}
    return paged_decode_reference(q, stores, **options)


def check(q, stores, *, scale=0.2, softcap=None, sink_logits=None, tuning=SMALL_TILES):
    """The kernel's error against fp64 is within what the dtype's own arithmetic costs; returns its result."""
    options = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
    out, lse = paged_decode(q, stores, tuning=tuning, **options)
    exact, exact_lse = paged_decode_reference(q, stores, **options)
    assert out.dtype == q.dtype
    assert out.isfinite().all()
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-5)
    error = (out.double() - exact).abs().max()
    bound = FP32_ERROR
    if q.dtype != torch.float32:
        bound = max((eager(q, stores, **options)[0].double() - exact).abs().max(), torch.finfo(q.dtype).eps)
    assert error <= bound, f"error {error:.2e} is over {bound:.2e}"
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("P", "D", "Q", "H"),
    [(16, 64, 4, 2), (32, 128, 8, 2), (64, 64, 3, 3), (64, 80, 2, 1), (16, 256, 5, 1), (24, 16, 32, 1)],
)
def test_equals_the_reference(P, D, Q, H, dtype):
    pages = randn(9, H, 2, P, D, seed=1, dtype=dtype)
    q = randn(2, Q, 1, D, seed=2, dtype=dtype) * 2
    store = PagedKV(pages=pages, n_tokens=counts(6 * P + 5, 3 * P), page_table=table(2, 1, 7, 9))
    check(q, [store], scale=D**-0.5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_softcap_and_sink_logits(softcap, with_sinks):
    sinks = torch.tensor([1.0, -2.0, 30.0, 0.0], device=DEVICE) if with_sinks else None
    store = PagedKV(pages=randn(5, 2, 2, 16, 64, seed=3), n_tokens=70)
    check(randn(1, 4, 1, 64, seed=4) * 3, [store], softcap=softcap, sink_logits=sinks)


@pytest.mark.parametrize("n_tokens", [0, 1, 15, 16, 17, 63, 100])
@pytest.mark.parametrize("on_device", [False, True])
def test_odd_counts_and_partial_pages(n_tokens, on_device):
    pages = randn(7, 2, 2, 16, 64, seed=5)
    flat = pages.transpose(2, 3).transpose(1, 2).reshape(7 * 16, 2, 2, 64)
    poisoned = flat.clone()
    poisoned[n_tokens:] = torch.nan
    poisoned = poisoned.view(7, 16, 2, 2, 64).permute(0, 2, 3, 1, 4).contiguous()
    n = counts(n_tokens) if on_device else n_tokens
    out, lse = check(randn(1, 4, 1, 64, seed=6), [PagedKV(pages=poisoned, n_tokens=n)])
    if not n_tokens:
        assert not out.any()
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize("per_head", [False, True])
def test_reads_through_a_table_and_nothing_else(per_head):
    slots = table(2, 2 if per_head else 1, 3, 9, seed=7)
    pages = randn(9, 2, 2, 32, 64, seed=8)
    poisoned = torch.full_like(pages, torch.nan)
    for b in range(2):
        for h in range(2):
            chosen = slots[b, h if per_head else 0]
            poisoned[chosen, h] = pages[chosen, h]
    check(randn(2, 4, 1, 64, seed=9), [PagedKV(pages=poisoned, n_tokens=counts(90, 33), page_table=slots)])


def test_ragged_batch_with_empty_sequences_and_a_count_for_each_head():
    pages = randn(12, 2, 2, 16, 64, seed=10)
    slots = table(5, 1, 12, 12, seed=11)
    q = randn(5, 4, 1, 64, seed=12)
    out, _ = check(q, [PagedKV(pages=pages, n_tokens=counts(0, 180, 0, 1, 47), page_table=slots)])
    assert not out[[0, 2]].any()
    by_head = torch.tensor([[3, 190], [0, 16], [17, 0], [64, 64], [1, 2]], dtype=torch.int32, device=DEVICE)
    check(q, [PagedKV(pages=pages, n_tokens=by_head, page_table=slots)])


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("programs_per_sm", [1, 4])
def test_counts_of_all_a_sequence_a_head_or_each(shape, programs_per_sm):
    n = torch.tensor([170, 33, 0, 96, 1, 192], dtype=torch.int32, device=DEVICE)[: shape[0] * shape[1]].view(shape)
    store = PagedKV(pages=randn(14, 2, 2, 16, 64, seed=50), n_tokens=n, page_table=table(3, 1, 12, 14, seed=51))
    tuning = dataclasses.replace(SMALL_TILES, programs_per_sm=programs_per_sm)
    check(randn(3, 4, 1, 64, seed=52), [store], tuning=tuning)


@pytest.mark.parametrize(("n_rows", "whole"), [(14, False), (15, True), (16, True)])
def test_about_as_many_equal_rows_as_programs_are_not_split(n_rows, whole, monkeypatch):
    """On four multiprocessors, as the interpreter has them: 16 programs."""
    monkeypatch.setattr(kernel, "n_sms", lambda device: 4)
    tuning = dataclasses.replace(SMALL_TILES, programs_per_sm=4)
    pages = randn(20, 1, 2, 16, 64, seed=53)
    n, slots = counts(*[6 * tile_size(PagedKV(pages=pages, n_tokens=0), tuning)] * n_rows), table(n_rows, 1, 12, 20)
    q = randn(n_rows, 2, 1, 64, seed=54)
    found, _ = check(q, [PagedKV(pages=pages, n_tokens=n, page_table=slots)], tuning=tuning)
    # One program reads a row in the order of its tokens, whatever the others do.
    monkeypatch.setattr(kernel, "MIN_TILES", 8)
    alone = []
    for i in range(n_rows):
        store = PagedKV(pages=pages, n_tokens=n[i : i + 1], page_table=slots[i : i + 1])
        alone.append(check(q[i : i + 1], [store], tuning=tuning)[0])
    assert torch.equal(found, torch.cat(alone)) == whole
    assert (found[0] - alone[0]).abs().max() < 1e-5


@pytest.mark.parametrize("programs_per_sm", [1, 3, 50])
@pytest.mark.parametrize("n_tokens", [5, 100, 1000])
def test_any_grid_gives_the_same(n_tokens, programs_per_sm):
    pages = randn(16, 2, 2, 64, 64, seed=13)
    tuning = dataclasses.replace(SMALL_TILES, programs_per_sm=programs_per_sm)
    check(randn(1, 4, 1, 64, seed=14), [PagedKV(pages=pages, n_tokens=counts(n_tokens))], tuning=tuning)


def test_tiles_of_several_pages_and_pages_of_several_tiles():
    for P, tile_bytes in ((16, 8192), (64, 4096)):
        pages = randn(12, 1, 2, P, 64, seed=15, dtype=torch.float16)
        store = PagedKV(pages=pages, n_tokens=10 * P + 3, page_table=table(1, 1, 11, 12))
        tuning = Tuning(tile_bytes=tile_bytes)
        assert tile_size(store, tuning) in (4 * P, P // 2)
        check(randn(1, 4, 1, 64, seed=16, dtype=torch.float16), [store], tuning=tuning)


@pytest.mark.parametrize("n_second", [0, 1, 40])
def test_two_stores_are_one_softmax(n_second):
    first = PagedKV(pages=randn(4, 2, 2, 64, 64, seed=17), n_tokens=counts(200))
    second = PagedKV(pages=randn(12, 2, 2, 4, 64, seed=18), n_tokens=counts(n_second))
    sinks = torch.tensor([0.0, 1.0, 2.0, -5.0], device=DEVICE)
    check(randn(1, 4, 1, 64, seed=19), [first, second], sink_logits=sinks)
    check(randn(1, 4, 1, 64, seed=19), [second, first])


@pytest.mark.parametrize("with_table", [False, True])
def test_token_lists(with_table):
    pages = randn(8, 2, 2, 16, 64, seed=20)
    slots = table(2, 1, 6, 8, seed=21) if with_table else None
    chosen = torch.stack([torch.randperm(96, generator=generator(i))[:50].sort().values for i in range(2)])
    poisoned = torch.full_like(pages, torch.nan)
    n_chosen = (50, 33)
    for b in range(2):
        for token in chosen[b, : n_chosen[b]].tolist():
            slot = token // 16 if slots is None else int(slots[b, 0, token // 16])
            poisoned[slot, :, :, token % 16] = pages[slot, :, :, token % 16]
    store = PagedKV(
        pages=poisoned, n_tokens=counts(*n_chosen), page_table=slots, tokens=chosen[:, None].int().to(DEVICE)
    )
    check(randn(2, 4, 1, 64, seed=22), [store])


def test_large_logits_and_ties():
    pages = randn(4, 2, 2, 16, 64, seed=23)
    q = randn(1, 4, 1, 64, seed=24)
    check(q * 40, [PagedKV(pages=pages, n_tokens=60)], scale=1.0, softcap=50.0)
    out, _ = paged_decode(q * 1000, [PagedKV(pages=pages, n_tokens=60)], scale=100.0)
    exact, _ = paged_decode_reference(q * 1000, [PagedKV(pages=pages, n_tokens=60)], scale=100.0)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)  # one token has all the weight
    pages[:, :, 0] = pages[:1, :, 0, :1]
    out, _ = check(q, [PagedKV(pages=pages, n_tokens=64)])
    mean = pages[:, :, 1].transpose(0, 1).flatten(1, 2).mean(1)
    torch.testing.assert_close(out[0, :, 0], mean.repeat_interleave(2, 0), atol=1e-5, rtol=1e-5)


def test_counts_and_tables_are_read_when_the_kernel_runs():
    pages = randn(8, 2, 2, 16, 64, seed=25)
    q, n, slots = randn(1, 4, 1, 64, seed=26), counts(20), table(1, 1, 8, 8)
    store = PagedKV(pages=pages, n_tokens=n, page_table=slots)
    first, _ = check(q, [store])
    n.fill_(128)
    slots.copy_(table(1, 1, 8, 8, seed=5))
    second, _ = check(q, [store])
    assert not torch.equal(first, second)
    n.fill_(10_000)  # nothing can be raised from a captured graph: reading stops at the table's end
    check(q, [store])


def test_a_strided_query_is_read_right():
    pages = randn(2, 2, 2, 16, 64, seed=27)
    wide = randn(1, 8, 1, 128, seed=28)
    check(wide[:, ::2, :, :64], [PagedKV(pages=pages, n_tokens=32)])


def test_offsets_past_2_31():
    pages = torch.empty((2**31 // (2 * 64 * 64) + 40, 1, 2, 64, 64), dtype=torch.float16, device=DEVICE)
    assert pages.numel() > 2**31
    slots = torch.tensor([pages.shape[0] - 1, 3, pages.shape[0] - 7], device=DEVICE)
    pages[slots] = randn(3, 1, 2, 64, 64, seed=29, dtype=torch.float16)
    store = PagedKV(pages=pages, n_tokens=170, page_table=slots.view(1, 1, 3))
    check(randn(1, 2, 1, 64, seed=30, dtype=torch.float16), [store])
    token = torch.tensor([5, 64, 130, 169], device=DEVICE).view(1, 1, 4)
    check(randn(1, 2, 1, 64, seed=30, dtype=torch.float16), [dataclasses.replace(store, n_tokens=4, tokens=token)])


def test_twenty_runs_are_bitwise_equal():
    store = PagedKV(pages=randn(6, 1, 2, 16, 64, seed=31), n_tokens=90)
    q = randn(1, 2, 1, 64, seed=32)
    out, lse = paged_decode(q, [store], scale=0.2, tuning=SMALL_TILES)
    for _ in range(20):
        again, again_lse = paged_decode(q, [store], scale=0.2, tuning=SMALL_TILES)
        assert torch.equal(out, again)
        assert torch.equal(lse, again_lse)


def test_wrong_calls_are_refused():
    pages = randn(2, 2, 2, 16, 64, seed=33)
    q = randn(1, 4, 1, 64, seed=34)
    wrong = [
        (q.expand(1, 4, 2, 64), [PagedKV(pages=pages, n_tokens=3)], "must be"),
        (q, [], "got 0"),
        (q, [PagedKV(pages=pages, n_tokens=33)], "do not fit"),
        (q[..., :32], [PagedKV(pages=pages, n_tokens=3)], "do not fit"),
        (q.half(), [PagedKV(pages=pages, n_tokens=3)], "like the queries"),
        (q, [PagedKV(pages=pages[::2], n_tokens=3), PagedKV(pages=pages[:, :1].contiguous(), n_tokens=3)], "same KV"),
        (q, [PagedKV(pages=pages[:, ::2], n_tokens=3)], "contiguous"),
        (q, [PagedKV(pages=pages, n_tokens=counts(1, 2))], "n_tokens must begin"),
        (q, [PagedKV(pages=pages, n_tokens=3, page_table=table(1, 1, 2, 2).float())], "int32 or int64"),
    ]
    for query, stores, message in wrong:
        with pytest.raises(ValueError, match=message):
            paged_decode(query, stores, scale=1.0)


@pytest.mark.gpu
def test_a_captured_graph_replays_with_another_resident_set():
    pages = randn(40, 2, 2, 64, 128, seed=35, dtype=torch.bfloat16)
    other = randn(16, 2, 2, 16, 128, seed=36, dtype=torch.bfloat16)
    q, n, slots = randn(2, 8, 1, 128, seed=37, dtype=torch.bfloat16), counts(900, 64), table(2, 1, 20, 40)
    stores = [
        PagedKV(pages=pages, n_tokens=n, page_table=slots),
        PagedKV(pages=other, n_tokens=counts(100, 0), page_table=table(2, 2, 16, 16)),
    ]
    paged_decode(q, stores, scale=0.1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = paged_decode(q, stores, scale=0.1)
    for step, (first, second) in enumerate([(900, 64), (1, 1280), (0, 0), (1280, 1280)]):
        n.copy_(counts(first, second))
        slots.copy_(table(2, 1, 20, 40, seed=step))
        q.copy_(randn(2, 8, 1, 128, seed=40 + step, dtype=torch.bfloat16))
        pages[slots[0, 0, :3]] *= 1.5  # a slot is used again
        graph.replay()
        exact, _ = paged_decode_reference(q, stores, scale=0.1)
        torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_calls_in_a_row_wait_for_what_comes_before_them():
    """Kernels are launched before the ones they follow have ended: each call must see what was written just before."""
    pages = randn(64, 2, 2, 64, 128, seed=43, dtype=torch.bfloat16)
    q, n, slots = randn(4, 8, 1, 128, seed=44, dtype=torch.bfloat16), counts(1, 1, 1, 1), table(4, 1, 30, 64)
    wanted = [
        (counts(*(1 + (i * 577 + b * 311) % 1900 for b in range(4))), table(4, 1, 30, 64, seed=10 * i), q * (1 + i % 3))
        for i in range(24)
    ]
    store, second = PagedKV(pages=pages, n_tokens=n, page_table=slots), PagedKV(pages=pages, n_tokens=n % 64)

    def run():
        found = []
        for n_next, slots_next, q_next in wanted:
            n.copy_(n_next)
            slots.copy_(slots_next)
            for stores in ([store], [store, dataclasses.replace(second, n_tokens=n % 64)]):
                # Twice, the second fed by the first: a call that comes directly behind another.
                out, _ = paged_decode(q_next, stores, scale=0.1)
                found.append((out, paged_decode(out, stores, scale=0.1)[0]))
        return found

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(5):
        graph.replay()
        torch.cuda.synchronize()
        at = iter(captured)
        for n_next, slots_next, q_next in wanted:
            first = PagedKV(pages=pages, n_tokens=n_next, page_table=slots_next)
            for stores in ([first], [first, PagedKV(pages=pages, n_tokens=n_next % 64)]):
                out, again = next(at)
                exact, _ = paged_decode_reference(q_next, stores, scale=0.1)
                torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=2e-2)
                exact, _ = paged_decode_reference(out, stores, scale=0.1)
                torch.testing.assert_close(again.double(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_a_long_context_on_a_gpu():
    pages = randn(2048, 8, 2, 64, 128, seed=41, dtype=torch.bfloat16)
    q = randn(1, 32, 1, 128, seed=42, dtype=torch.bfloat16)
    store = PagedKV(pages=pages, n_tokens=2048 * 64 - 5, page_table=table(1, 1, 2048, 2048))
    check(q, [store], scale=128**-0.5, tuning=Tuning())
