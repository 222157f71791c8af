"""One launch for sequences with pages of their own: against the reference in fp64, sequence by sequence.

In Triton's interpreter on a CPU, compiled on a GPU. Shapes as in test_paged_decode.
"""

import pytest
import torch
from kernel_tools import DEVICE, DTYPES, FP32_ERROR, generator, randn

from kvscope.methods.kernels.paged_decode.inputs import PagedKV, TokenPlace
from kvscope.methods.kernels.paged_decode.kernel import Tuning
from kvscope.methods.kernels.paged_decode.reference import paged_decode_reference
from kvscope.methods.kernels.paged_decode.rows import RowTable

SMALL_TILES = Tuning(tile_bytes=2048)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def count(*n):
    return ints(*n).view(1, -1)


def place(pages, index=0):
    return TokenPlace(pages=pages, slot_1=ints(index // pages.shape[3]), offset_1=ints(index % pages.shape[3]))


def table(H, S, n_slots, *, seed):
    rows = [torch.randperm(n_slots, generator=generator(seed + h))[:S] for h in range(H)]
    return torch.stack(rows)[None].int().to(DEVICE)


def mixed(*, H, P, D, dtype, small=8):
    """A sequence of every kind: a run, two stores, a table or a list of each head, nothing, pages of another size."""
    pages = [randn(9, H, 2, P, D, seed=seed, dtype=dtype) for seed in range(8)]
    listed = torch.stack([torch.randperm(9 * P, generator=generator(h))[: 3 * P] for h in range(H)])[None]
    return [
        [PagedKV(pages=pages[0], n_tokens=count(7 * P + 3))],
        [PagedKV(pages=pages[1], n_tokens=count(5)), PagedKV(pages=pages[2], n_tokens=2 * P)],
        [PagedKV(pages=pages[3], n_tokens=count(4 * P - 1), page_table=table(H, 4, 9, seed=3))],
        [PagedKV(pages=pages[4], n_tokens=count(*range(P, P + H)), tokens=listed.int().to(DEVICE))],
        [PagedKV(pages=pages[5], n_tokens=count(0))],
        [
            PagedKV(pages=pages[6], n_tokens=count(P)),
            PagedKV(
                pages=randn(12, H, 2, small, D, seed=20, dtype=dtype),
                n_tokens=count(6 * small),
                page_table=table(1, 6, 12, seed=5),
            ),
        ],
    ]


def check(stores, q, *, scale=0.2, softcap=None, sink_logits=None, turned=None, part_tokens=None):
    places = [place(each[0].pages) for each in stores]
    rows = RowTable(stores, places, tuning=SMALL_TILES, part_tokens=part_tokens)
    got = rows.attend(q, scale=scale, softcap=softcap, sink_logits=sink_logits, turned_BQ1D=turned)
    assert got.dtype == q.dtype
    options = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
    for b, each in enumerate(stores):
        if turned is None or len(each) == 1:
            exact, _ = paged_decode_reference(q[b : b + 1], each, **options)
            rounded, _ = paged_decode_reference(q[b : b + 1], each, dtype=q.dtype, **options)
        else:
            exact, rounded = (joined(q[b : b + 1], turned[b : b + 1], each, dtype, **options) for dtype in
                              (torch.float64, q.dtype))  # fmt: skip
        bound = FP32_ERROR
        if q.dtype != torch.float32:
            bound = max((rounded.double() - exact).abs().max(), torch.finfo(q.dtype).eps)
        error = (got[b : b + 1].double() - exact).abs().max()
        assert error <= bound, f"sequence {b}: error {error:.2e} is over {bound:.2e}"
    return got


def joined(q, turned, stores, dtype, *, scale, softcap, sink_logits):
    parts = [
        paged_decode_reference(query, [store], scale=scale, softcap=softcap, dtype=dtype)
        for query, store in zip((q, turned), stores, strict=True)
    ]
    lse = torch.stack([lse for _, lse in parts])
    total = torch.logsumexp(lse, 0)
    if sink_logits is not None:
        total = torch.logaddexp(total, sink_logits.to(dtype))
    weight = torch.exp(lse - total)[..., None, None]
    return (weight * torch.stack([out for out, _ in parts])).sum(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("P", "D", "Q", "H"), [(16, 64, 4, 2), (64, 128, 8, 2), (24, 16, 5, 1)])
def test_every_kind_of_sequence_in_one_launch(P, D, Q, H, dtype):
    stores = mixed(H=H, P=P, D=D, dtype=dtype)
    check(stores, randn(len(stores), Q, 1, D, seed=9, dtype=dtype) * 2, scale=D**-0.5)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_softcap_sink_logits_and_turned_queries(softcap, with_sinks):
    sinks = torch.tensor([1.0, -2.0, 30.0, 0.0], device=DEVICE) if with_sinks else None
    stores = mixed(H=2, P=16, D=64, dtype=torch.float32, small=16)
    q, turned = (randn(len(stores), 4, 1, 64, seed=seed) * 2 for seed in (9, 10))
    check(stores, q, softcap=softcap, sink_logits=sinks, turned=turned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("P", "D", "Q", "H"), [(16, 64, 4, 2), (24, 16, 5, 1)])
def test_in_parts_a_sequence_has_the_same_bits_whoever_is_beside_it(P, D, Q, H, dtype):
    """Each row is cut by itself, into parts of 40 tokens or fewer, and its parts are joined in one order."""
    stores = mixed(H=H, P=P, D=D, dtype=dtype)
    q, turned = (randn(len(stores), Q, 1, D, seed=seed, dtype=dtype) * 2 for seed in (9, 10))
    options = {"scale": D**-0.5, "sink_logits": torch.linspace(-2, 3, Q, device=DEVICE).to(dtype)}
    every = check(stores, q, turned=turned, part_tokens=40, **options)
    for some in ([0], [1], [2], [3], [4], [5], [5, 0], [1, 1, 1, 2], [0] * 20):
        rows = RowTable(
            [stores[b] for b in some],
            [place(stores[b][0].pages) for b in some],
            tuning=SMALL_TILES,
            part_tokens=40,
        )
        got = rows.attend(q[some], turned_BQ1D=turned[some], **options)
        assert torch.equal(got, every[some]), some


def test_a_part_longer_than_every_row_is_one_part():
    stores = mixed(H=2, P=16, D=64, dtype=torch.float32)
    check(stores, randn(len(stores), 4, 1, 64, seed=9), part_tokens=4096)


def test_uniform_sequences_take_the_path_of_whole_pages():
    stores = [[PagedKV(pages=randn(6, 2, 2, 16, 64, seed=b), n_tokens=count(90))] for b in range(3)]
    check(stores, randn(3, 4, 1, 64, seed=9))


def test_a_token_is_stored_where_it_belongs_and_nowhere_else():
    stores = mixed(H=2, P=16, D=64, dtype=torch.float32)
    before = [store.pages.clone() for each in stores for store in each]
    places = [place(each[0].pages, index) for each, index in zip(stores, (0, 17, 31, 143, 64, 5), strict=True)]
    k, v = (randn(len(stores), 1, 2, 64, seed=seed).transpose(1, 2) for seed in (1, 2))
    RowTable(stores, places).append(k, v)
    for old, store in zip(before, [store for each in stores for store in each], strict=True):
        index = next((i for i, each in enumerate(stores) if each[0] is store), None)
        if index is not None:
            at, offset = int(places[index].slot_1), int(places[index].offset_1)
            old[at, :, 0, offset], old[at, :, 1, offset] = k[index, :, 0], v[index, :, 0]
        assert torch.equal(old, store.pages)


def test_counts_written_after_the_table_are_read():
    counts = [count(3), count(90)]
    stores = [[PagedKV(pages=randn(6, 2, 2, 16, 64, seed=b), n_tokens=n)] for b, n in enumerate(counts)]
    rows = RowTable(stores, [place(each[0].pages) for each in stores], tuning=SMALL_TILES)
    q = randn(2, 4, 1, 64, seed=9)
    rows.attend(q, scale=0.2)
    counts[0].fill_(70)
    counts[1].fill_(1000)  # past the capacity: everything
    got = rows.attend(q, scale=0.2)
    for b, n in enumerate((70, 96)):
        exact, _ = paged_decode_reference(q[b : b + 1], [PagedKV(pages=stores[b][0].pages, n_tokens=n)], scale=0.2)
        assert (got[b : b + 1].double() - exact).abs().max() <= FP32_ERROR


@pytest.mark.parametrize("n", [1, 40])
def test_many_short_sequences(n):
    stores = [[PagedKV(pages=randn(2, 1, 2, 16, 16, seed=b), n_tokens=count(b % 33))] for b in range(n)]
    check(stores, randn(n, 2, 1, 16, seed=9))


def test_what_does_not_fit_is_refused():
    pages = randn(2, 2, 2, 16, 64, seed=0)
    store = PagedKV(pages=pages, n_tokens=3)
    with pytest.raises(ValueError, match="one place"):
        RowTable([], [])
    with pytest.raises(ValueError, match="one place"):
        RowTable([[store, store, store]], [place(pages)])
    with pytest.raises(ValueError, match="unlike"):
        RowTable([[store], [PagedKV(pages=pages.half(), n_tokens=3)]], [place(pages)] * 2)
    with pytest.raises(ValueError, match="int32 of one sequence"):
        RowTable(
            [[PagedKV(pages=pages, n_tokens=torch.ones((1, 1), dtype=torch.int64, device=DEVICE))]], [place(pages)]
        )
    with pytest.raises(ValueError, match="do not fit"):
        RowTable([[store]], [place(pages)]).attend(randn(2, 4, 1, 64, seed=1), scale=1.0)
