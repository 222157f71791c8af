"""The paged_decode kernel over packed pages against its reference in fp64, which unpacks them by the plain formula.

Shapes: B sequences, Q query heads, H KV heads, D head size, S slots, P tokens a page, R bytes of a record.
"""

import dataclasses

import pytest
import torch
from kernel_tools import DEVICE, DTYPES, FP32_ERROR, generator, randn

from kvscope.methods.kernels.dispatch import unsupported_packed
from kvscope.methods.kernels.paged_decode import kernel
from kvscope.methods.kernels.paged_decode.inputs import PagedKV
from kvscope.methods.kernels.paged_decode.kernel import PackedTuning, packed_piece_size, packed_tile_size, paged_decode
from kvscope.methods.kernels.paged_decode.reference import paged_decode_reference
from kvscope.methods.kv_format import FORMATS, PagePacking
from kvscope.methods.packing import pack_pages, unpack_pages

SMALL_TILES = PackedTuning(tile_tokens=16)


def packed_store(kv, S, H, P, D, *, n_tokens, seed, table=None, head_table=False):
    """Pages drawn around channels of unlike means, packed; a channel's mean is what a base is for."""
    packing = PagePacking(FORMATS[kv], P, D)
    raw = randn(S, H, 2, P, D, seed=seed) + 2 * randn(D, seed=seed + 1)
    page_table = None
    if table is not None:
        rows = [torch.randperm(S, generator=generator(seed + 2 + i))[:table] for i in range(H if head_table else 1)]
        page_table = torch.stack(rows).view(1, len(rows), table).int().to(DEVICE)
    return PagedKV(pages=pack_pages(raw, packing), n_tokens=n_tokens, page_table=page_table, packing=packing)


def check(q, stores, *, scale=0.2, tuning=SMALL_TILES, **options):
    """The kernel's error against fp64 is what rounding operands to the query's dtype costs; returns the result."""
    out, lse = paged_decode(q, stores, scale=scale, packed_tuning=tuning, **options)
    exact, exact_lse = paged_decode_reference(q, stores, scale=scale, **options)
    assert out.isfinite().all()
    eps = torch.finfo(q.dtype).eps
    # A logit is a sum of D products of rounded factors, an output a mean of values of rounded weights.
    logit_error = 4 * eps * float((q.abs().amax() * scale) * q.shape[3])
    spread = max(float(unpacked(store).abs().amax()) for store in stores)
    if q.dtype == torch.float32:
        torch.testing.assert_close(lse.double(), exact_lse, atol=1e-4, rtol=1e-5)
        assert (out.double() - exact).abs().max() <= FP32_ERROR * spread
    else:
        assert (lse.double() - exact_lse).abs().max() <= logit_error * spread
        assert (out.double() - exact).abs().max() <= (8 * eps + logit_error) * spread
    return out, lse


def unpacked(store):
    return store.pages if store.packing is None else unpack_pages(store.pages, store.packing)


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize(("P", "D", "Q", "H"), [(16, 64, 4, 2), (32, 80, 3, 3), (48, 16, 8, 1)], ids=str)
def test_equals_the_reference(kv, P, D, Q, H):
    store = packed_store(kv, 4, H, P, D, n_tokens=3 * P, seed=1, table=3)
    check(randn(1, Q, 1, D, seed=2), [store], scale=D**-0.5)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kv", FORMATS)
def test_low_precision_queries(kv, dtype):
    store = packed_store(kv, 3, 1, 64, 128, n_tokens=2 * 64, seed=1, table=2)
    check(randn(1, 4, 1, 128, seed=2, dtype=dtype), [store], scale=128**-0.5)


@pytest.mark.parametrize("size", [1e-3, 1.0, 4000.0], ids=str)
@pytest.mark.parametrize("kv", FORMATS)
def test_operands_stay_within_fp16(kv, size):
    """Small values and large ones, a token that takes nearly all of the mass among them; without a GPU, too."""
    packing = PagePacking(FORMATS[kv], 32, 64)
    q = randn(1, 2, 1, 64, seed=12, dtype=torch.float16)
    raw = randn(3, 1, 2, 32, 64, seed=13)
    raw[0, 0, 0, 5] += 0.5 * q[0, 0, 0].float()
    raw[:, :, 1] *= size
    raw[0, 0, 1, 5] *= 1e-3
    check(q, [PagedKV(pages=pack_pages(raw, packing), n_tokens=90, packing=packing)], scale=64**-0.5)


@pytest.mark.parametrize("n_tokens", [0, 1, 16, 33, 64, 100])
@pytest.mark.parametrize("kv", ["int4", "kivi2"])
def test_odd_counts_on_the_device(kv, n_tokens):
    count = torch.tensor([[n_tokens]], dtype=torch.int32, device=DEVICE)
    store = packed_store(kv, 4, 2, 32, 64, n_tokens=count, seed=3)
    out, lse = check(randn(1, 4, 1, 64, seed=4), [store])
    if n_tokens == 0:
        assert (out == 0).all()
        assert (lse == -torch.inf).all()


@pytest.mark.parametrize("kv", FORMATS)
def test_softcap_sinks_and_the_residual_beside_it(kv):
    """What a sequence reads: packed pages, and raw ones in an order of their own."""
    raw = randn(3, 2, 2, 32, 64, seed=7)
    order = torch.tensor([[[2, 0, 1]]], dtype=torch.int32, device=DEVICE)
    stores = [
        packed_store(kv, 4, 2, 32, 64, n_tokens=96, seed=5, table=3, head_table=True),
        PagedKV(pages=raw, n_tokens=71, page_table=order),
    ]
    sinks = torch.tensor([1.0, -2.0, 30.0, 0.0], device=DEVICE)
    q = randn(1, 4, 1, 64, seed=6) * 2
    check(q, stores, softcap=3.0, sink_logits=sinks)
    check(q, stores)


def test_tiles_give_one_result():
    """Tiles of a whole page and of a part of it, many programs and few."""
    store = packed_store("int4", 6, 2, 64, 64, n_tokens=330, seed=8, table=6)
    q = randn(1, 4, 1, 64, seed=9)
    first, _ = check(q, [store], tuning=PackedTuning(tile_tokens=64))
    for tuning in (SMALL_TILES, PackedTuning(tile_tokens=32, programs_per_sm=1)):
        torch.testing.assert_close(check(q, [store], tuning=tuning)[0], first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv", ["fp8", "int8", "int4"])
def test_pieces_of_a_token_give_one_result(kv):
    store = packed_store(kv, 2, 1, 32, 128, n_tokens=50, seed=16)
    q = randn(1, 2, 1, 128, seed=17)
    first, _ = check(q, [store], tuning=PackedTuning(tile_tokens=32, piece_words=64))
    for words in (16, 32):
        tuning = PackedTuning(tile_tokens=32, piece_words=words)
        assert packed_piece_size(store.packing, tuning) == words
        torch.testing.assert_close(check(q, [store], tuning=tuning)[0], first, atol=1e-5, rtol=1e-5)
    assert packed_piece_size(PagePacking(FORMATS[kv], 32, 80)) == {"fp8": 64, "int8": 64, "int4": 32}[kv]


def test_programs_share_the_channels_of_many_partial_results(monkeypatch):
    monkeypatch.setattr(kernel, "MERGE_PART_ROWS", 16)
    store = packed_store("int4", 10, 1, 64, 48, n_tokens=640, seed=14)
    options = kernel.merge_options(10, 1, 64)
    assert (options["MERGE_ROWS"], options["PARTS"]) == (16, 1)
    options = kernel.merge_options(20, 1, 64)
    assert (options["MERGE_ROWS"], options["PARTS"]) == (32, 2)
    monkeypatch.setattr(kernel, "MERGE_PART_ROWS", 4)
    assert kernel.merge_options(10, 1, 64)["PARTS"] == 4
    check(randn(1, 2, 1, 48, seed=15), [store], sink_logits=torch.tensor([0.5, -1.0], device=DEVICE))


def test_a_tile_shares_its_scales():
    assert packed_tile_size(PagePacking(FORMATS["int4"], 64, 128)) == 64
    assert packed_tile_size(PagePacking(FORMATS["kivi2"], 64, 128)) == 32
    assert packed_tile_size(PagePacking(FORMATS["int8"], 48, 128)) == 16
    reasons = unsupported_packed(
        "cpu", dtype=torch.float32, packing=PagePacking(FORMATS["int8"], 24, 64), n_q_heads=2, n_kv_heads=1
    )
    assert any("over 24 tokens" in reason for reason in reasons)


def test_what_does_not_fit_is_refused():
    store = packed_store("int8", 3, 1, 16, 64, n_tokens=48, seed=10)
    q = randn(1, 2, 1, 64, seed=11)
    for wrong, words in (
        ({"pages": store.pages[:, :, :-32].contiguous()}, "must be"),
        ({"pages": store.pages.to(torch.int8)}, "bytes"),
        ({"tokens": torch.zeros((1, 1, 3), dtype=torch.int32, device=DEVICE)}, "no token list"),
    ):
        with pytest.raises(ValueError, match=words):
            paged_decode(q, [dataclasses.replace(store, **wrong)], scale=1.0)
