"""The index_topk kernels against their reference in fp64: sets, ties, counts, and scores that are hard to tell apart.

Shapes: I indexer heads, E key size, n entries, k chosen.
"""

import pytest
import torch
from kernel_tools import DEVICE, DTYPES, randn

from kvscope.methods.kernels.index_topk import kernel
from kvscope.methods.kernels.index_topk.kernel import index_topk
from kvscope.methods.kernels.index_topk.ops import index_topk as dispatched
from kvscope.methods.kernels.index_topk.reference import index_scores_reference, index_topk_reference


def inputs(heads, E, n, *, seed=0, dtype=torch.float32):
    q, keys = randn(heads, E, seed=seed, dtype=dtype), randn(n, E, seed=seed + 1, dtype=dtype)
    return q, randn(heads, seed=seed + 2) / heads, keys


def one(value, dtype=torch.int32):
    return torch.tensor([value], dtype=dtype, device=DEVICE)


def by_scores(scores, *, k, count=None):
    """The kernel's choice among entries of these scores: one head, and keys that are the scores."""
    keys = torch.zeros(len(scores), 16)
    keys[:, 0], keys[:, 1] = scores, -scores
    q = torch.zeros(2, 16)
    q[0, 0] = q[1, 1] = 1.0
    weights = torch.tensor([1.0, -1.0])
    count = len(scores) if count is None else count
    return index_topk(q.to(DEVICE), weights.to(DEVICE), keys.to(DEVICE), one(count), k=k).tolist()


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernel, "_BLOCK", 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "E", "n", "count", "k"),
    [(4, 16, 100, 100, 7), (16, 32, 300, 200, 24), (5, 48, 130, 129, 64), (64, 128, 257, 256, 128), (8, 32, 63, 1, 1)],
)
@pytest.mark.usefixtures("small_blocks")
def test_the_set_is_the_references_in_fp64_outside_a_band(heads, E, n, count, k, dtype):
    q, weight, keys = inputs(heads, E, n, dtype=dtype)
    found = index_topk(q, weight, keys, one(count), k=k)
    assert found.dtype == torch.int32
    assert torch.equal(found, found.sort().values)
    assert len(set(found.tolist())) == k
    exact = index_scores_reference(q, weight, keys)[:count]
    least = exact.sort(descending=True).values[k - 1]
    band = 1e-5 * exact.abs().max()
    chosen = torch.zeros(count, dtype=torch.bool, device=DEVICE).index_fill_(0, found.long(), value=True)
    assert bool(chosen[exact > least + band].all())
    assert not bool(chosen[exact < least - band].any())
    reference = index_topk_reference(q, weight, keys, one(count), k=k, dtype=torch.float64)
    assert torch.equal(found, reference)


@pytest.mark.parametrize("count", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("choose", [index_topk, index_topk_reference])
def test_where_fewer_count_than_are_asked_for_all_are_listed(count, choose):
    q, weight, keys = inputs(8, 32, 40)
    keys[count:] = float("nan")
    found = choose(q, weight, keys, one(count, torch.int64), k=12).tolist()
    n = min(count, 12)
    assert found[n:] == [-1] * (12 - n)
    assert all(0 <= entry < count for entry in found[:n])
    assert len(set(found[:n])) == n


@pytest.mark.usefixtures("small_blocks")
def test_of_equal_scores_the_first_entries_are_taken():
    scores = torch.zeros(300)
    scores[[299, 5, 128]] = 1.0
    scores[[0, 77, 200]] = -1.0
    assert by_scores(scores, k=3) == [5, 128, 299]
    assert by_scores(scores, k=6) == [1, 2, 3, 5, 128, 299]
    assert by_scores(scores, k=298) == [e for e in range(300) if e not in (77, 200)]
    q, weight, keys = inputs(8, 32, 300)
    keys = keys.abs()
    found = index_topk(-q.abs(), weight, keys, one(300), k=10)  # nothing but zeros, of either sign
    assert found.tolist() == list(range(10))
    assert index_topk_reference(-q.abs(), weight, keys, one(300), k=10).tolist() == list(range(10))


@pytest.mark.usefixtures("small_blocks")
def test_every_bit_of_a_score_counts():
    """Neighbouring numbers, of either sign and at every magnitude."""
    draws = torch.Generator().manual_seed(3)
    bits = torch.randint(0, 2**31 - 2**24, (200,), generator=draws, dtype=torch.int64)
    scores = torch.cat((bits, bits + 1)).int().view(torch.float32)
    scores = torch.cat((scores, -scores))
    scores = scores[scores.isfinite() & (scores.abs() >= 1.2e-38)]  # products of subnormal numbers are 0
    scores = scores[torch.randperm(len(scores), generator=draws)]
    for k in (1, 50, 399):
        expected = scores.argsort(descending=True, stable=True)[:k].sort().values.tolist()
        assert by_scores(scores, k=k) == expected


@pytest.mark.parametrize("choose", [index_topk, index_topk_reference])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_score_that_is_no_number_counts_as_the_highest(choose, sign):
    """Whatever its sign bit is: a CPU's NaN of inf - inf has one, a GPU's has none."""
    q, weight, keys = inputs(8, 32, 40)
    keys[[7, 30]] = torch.full((), float("nan")).copysign(torch.tensor(float(sign))).to(keys)
    found = choose(q, weight, keys, one(40), k=3).tolist()
    assert {7, 30} < set(found)


def test_entries_behind_the_count_are_not_looked_at_and_reruns_are_equal():
    q, weight, keys = inputs(16, 32, 500)
    first = index_topk(q, weight, keys, one(333), k=40)
    keys[333:] = float("nan")
    for _ in range(20 if DEVICE.type == "cuda" else 2):
        assert torch.equal(first, index_topk(q, weight, keys, one(333), k=40))


def test_the_choice_is_the_stock_indexers():
    """``topk`` of the stock module's scores, as a set."""
    q, weight, keys = inputs(32, 64, 400, seed=7)
    scores = (torch.relu(q @ keys.T) * weight[:, None]).sum(0)
    found = index_topk(q, weight, keys, one(400), k=50)
    assert torch.equal(found.long().cpu(), scores.topk(50).indices.sort().values.cpu())


def test_what_is_dispatched_is_the_same_everywhere():
    q, weight, keys = inputs(8, 32, 100)
    expected = index_topk_reference(q, weight, keys, one(90), k=9)
    assert torch.equal(dispatched(q, weight, keys, one(90), k=9), expected)


def test_no_entries_and_wrong_calls():
    q, weight, keys = inputs(8, 32, 20)
    assert index_topk(q, weight, keys[:0], one(0), k=3).tolist() == [-1, -1, -1]
    assert index_topk_reference(q, weight, keys[:0], one(0), k=3).tolist() == [-1, -1, -1]
    for wrong, message in [
        ((q[:, :16], weight, keys, one(3)), "do not fit"),
        ((q, weight, keys, torch.zeros(2, dtype=torch.int32, device=DEVICE)), "do not fit"),
        ((q.half(), weight, keys, one(3)), "one dtype"),
        ((q, weight.half(), keys, one(3)), "weights float32"),
        ((q[:, :8], weight, keys[:, :8], one(3)), "multiple of 16"),
        ((q[:, ::2], weight, keys[:, ::2], one(3)), "contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            index_topk(*wrong, k=2)
