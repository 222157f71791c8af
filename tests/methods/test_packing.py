"""Packed pages against the plain formula in fp64, element by element, and the bound on what packing loses.

Shapes: X any leading sizes, P tokens a page, D head size.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvscope.methods.kv_format import FORMATS, PagePacking
from kvscope.methods.packing import pack_pages, unpack_pages, unpack_tokens

SIZES = [(16, 16), (64, 128), (48, 80), (33, 48), (1, 32)]


def draw_pages(P, D, *, seed, lead=(3, 2), spread=1.0, shift=0.0):
    """Pages whose channels have unlike means and whose tokens have unlike sizes, as K and V do."""
    numbers = torch.Generator().manual_seed(seed)
    size = torch.rand((*lead, 2, P, 1), generator=numbers) * spread
    return torch.randn((*lead, 2, P, D), generator=numbers) * size + shift * torch.randn(D, generator=numbers)


def group_of(packing, kind, token, channel):
    """The elements (tokens, channels) that share a scale with one."""
    if kind == 0:
        size = packing.key_group_tokens
        start = token // size * size
        return range(start, start + size), [channel]
    size = packing.head_dim // packing.format.fields
    start = channel // size * size
    return [token], range(start, start + size)


def plain(x_2PD, packing):
    """Quantise and dequantise by the formula, a group at a time, in fp64; scales are fp16, as small as will do."""
    found = torch.zeros_like(x_2PD, dtype=torch.float64)
    bits = packing.format.bits
    for kind in (0, 1):
        done = set()
        for token in range(packing.page_tokens):
            for channel in range(packing.head_dim):
                tokens, channels = group_of(packing, kind, token, channel)
                if (key := (tokens[0], channels[0])) in done:
                    continue
                done.add(key)
                at = (kind, slice(tokens[0], tokens[-1] + 1), slice(channels[0], channels[-1] + 1))
                group = x_2PD[at].double()
                if packing.format.is_float:
                    scale = fp16_at_least(float(group.abs().max()) / 448)
                    found[at] = (group / max(scale, 2.0**-24)).float().to(torch.float8_e4m3fn).double() * scale
                    continue
                # A code counts for as much as its place in the byte says.
                levels, place = 2**bits - 1, 2 ** (bits * (channels[0] // (packing.head_dim // packing.format.fields)))
                base = -fp16_at_least(-float(group.min()))
                scale = fp16_at_least((float(group.max()) - base) / (levels * place))
                codes = (group - base) / (max(scale, 2.0**-24) * place)
                found[at] = codes.round().clamp(0, levels) * place * scale + base
    return found


def fp16_at_least(x):
    """An fp16 at or a little above ``x``."""
    near = torch.tensor(x, dtype=torch.float64).half()
    return float(near) if float(near) >= x else float(torch.tensor(x + abs(x) * 2.0**-10 + 2.0**-24).half())


@pytest.mark.parametrize("kv", FORMATS)
@pytest.mark.parametrize(("P", "D"), SIZES)
def test_equals_the_plain_formula(kv, P, D):
    packing = PagePacking(FORMATS[kv], P, D)
    pages = draw_pages(P, D, seed=1, lead=(2,), shift=3.0)
    found = unpack_pages(pack_pages(pages, packing), packing, torch.float64)
    exact = torch.stack([plain(page, packing) for page in pages])
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kv", FORMATS)
def test_single_tokens_are_those_of_their_pages(kv):
    packing = PagePacking(FORMATS[kv], 32, 48)
    records = pack_pages(draw_pages(32, 48, seed=2, lead=(5, 3)), packing)
    numbers = torch.Generator().manual_seed(3)
    page_HT, offset_HT = (torch.randint(0, n, (3, 41), generator=numbers) for n in (5, 32))
    found = unpack_tokens(records, packing, page_HT=page_HT, offset_HT=offset_HT)
    pages = unpack_pages(records, packing)
    expected = pages[page_HT, torch.arange(3)[:, None], :, offset_HT].permute(2, 0, 1, 3)
    assert torch.equal(found, expected)


@given(
    kv=st.sampled_from(sorted(FORMATS)),
    seed=st.integers(0, 2**16),
    spread=st.sampled_from([0.0, 1e-6, 1e-2, 1.0, 300.0]),
    shift=st.sampled_from([0.0, 1e-3, 5.0, 2000.0]),
    size=st.sampled_from([(16, 16), (32, 48), (7, 32)]),
)
def test_no_element_is_off_by_more_than_half_a_step(kv, seed, spread, shift, size):
    P, D = size
    packing = PagePacking(FORMATS[kv], P, D)
    x = draw_pages(P, D, seed=seed, lead=(1,), spread=spread, shift=shift)
    found = unpack_pages(pack_pages(x, packing), packing, torch.float64)
    groups_k = x[:, 0].reshape(1, packing.key_groups, -1, D).double()
    groups_v = x[:, 1].reshape(1, P, packing.format.fields, -1).double()
    for kind, groups, dim in ((0, groups_k, 2), (1, groups_v, 3)):
        error = (found[:, kind].reshape(groups.shape) - groups).abs()
        most = groups.abs().amax(dim, keepdim=True)
        rounding = 1e-6 * most + 2.0**-24
        if packing.format.is_float:
            # e4m3 has three bits behind the first; below its normal numbers steps are of equal size.
            bound = groups.abs() * 2.0**-4 + most / 448 * 2.0**-10 * 1.01 + rounding
        else:
            levels = 2**packing.format.bits - 1
            spread_of = groups.amax(dim, keepdim=True) - groups.amin(dim, keepdim=True)
            # What fp16 adds: to the base below, and to the scale, which may be its least number.
            spare = most * 2.0**-9 + 2.0**-23
            widest = (spread_of + spare) / levels * (1 + 2.0**-9) + 2.0**-24 * packing.format.places[-1]
            bound = 0.5 * widest + rounding
        assert (error <= bound).all()


def test_bytes_are_those_of_elements_and_scales():
    """Llama-3.1-8B's page, counted by hand: bits of an element with all that belongs to it."""
    bits = {kv: 8 * PagePacking(form, 64, 128).record_bytes / (2 * 64 * 128) for kv, form in FORMATS.items()}
    # K: a number or two in fp16 for each channel and 64 (kivi2: 32) tokens; V: for each token and 128 / F channels.
    assert bits["fp8"] == 8 + (16 / 64 + 16 / 128) / 2
    assert bits["int8"] == 8 + (32 / 64 + 32 / 128) / 2
    assert bits["int4"] == 4 + (32 / 64 + 32 / 64) / 2
    assert bits["kivi2"] == 2 + (32 / 32 + 32 / 32) / 2


def test_heads_that_do_not_fill_words_are_refused():
    assert PagePacking(FORMATS["kivi2"], 16, 40).unsupported() == []
    (reason,) = PagePacking(FORMATS["kivi2"], 16, 36).unsupported()
    assert reason == "kv=kivi2 puts 8 channels into a word of two bytes, and heads have 36"
