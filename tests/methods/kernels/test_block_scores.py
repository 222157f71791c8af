"""Block scores of Quest, MoBA and MSA against references in fp64, and against the methods' torch forms.

Shapes: H KV heads, G query heads a KV head, N blocks, P tokens a page, D head size.
"""

import pytest
import torch
from kernel_tools import DTYPES, randn

from kvscope.methods.gather import page_logits
from kvscope.methods.kernels.block_scores.kernel import moba_scores, msa_scores, quest_scores
from kvscope.methods.kernels.block_scores.reference import moba_reference, msa_reference, quest_reference
from kvscope.methods.moba.method import mean
from kvscope.methods.msa.method import block_maxima
from kvscope.methods.quest.method import min_max, upper_bounds

SHAPES = [(1, 1, 64, 1), (2, 4, 128, 70), (3, 5, 48, 64), (1, 20, 16, 33)]


def close(found, exact):
    """Products are exact in the stored dtype and added in fp32."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=2e-5 * exact.abs().max().item(), rtol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "G", "D", "N"), SHAPES)
def test_quest(H, G, D, N, dtype):
    q = randn(H, G, D, seed=1, dtype=dtype)
    keys = randn(H, N, 4, D, seed=2, dtype=dtype)
    bounds = min_max(keys).contiguous()
    found = quest_scores(q, bounds)
    close(found, quest_reference(q, bounds))
    close(found, upper_bounds(q, bounds).amax(1, keepdim=True).double())
    best = torch.einsum("hgd,hntd->hgnt", q.double(), keys.double()).amax((1, 3))
    assert (found[:, 0].double() >= best - 1e-4).all()  # a bound of every token's logit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "G", "D", "N"), SHAPES)
def test_moba(H, G, D, N, dtype):
    q = randn(H, G, D, seed=3, dtype=dtype)
    means = mean(randn(H, N, 4, D, seed=4, dtype=dtype)).contiguous()
    close(moba_scores(q, means), moba_reference(q, means))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("P", "block", "N", "D"), [(16, 16, 21, 64), (16, 4, 67, 64), (64, 128, 3, 128), (16, 512, 2, 32), (24, 1, 50, 16)]
)
def test_msa(P, block, N, D, dtype):
    H, G = 2, 3
    n_pages = -(-N * block // P) + 1
    pages = randn(n_pages, H, 2, P, D, seed=5, dtype=dtype)
    q = randn(H, G, D, seed=6, dtype=dtype)
    # Values, and keys behind the last block, are not read.
    pages[:, :, 1] = torch.nan
    for token in range(N * block, n_pages * P):
        pages[token // P, :, 0, token % P] = torch.nan
    found = msa_scores(q, pages, n_blocks=N, block_tokens=block)
    assert found.isfinite().all()
    close(found, msa_reference(q, pages, n_blocks=N, block_tokens=block))
    if dtype == torch.float32:
        torch_form = block_maxima(page_logits(q.mean(1, keepdim=True), pages, n_tokens=N * block), block)
        close(found, torch_form.double())


def test_ties_no_blocks_and_twenty_equal_runs():
    # Whole numbers: their products and sums are exact, in whatever order a processor adds them.
    q = randn(2, 3, 64, seed=7).mul(4).round()
    same = randn(1, 2, 2, 64, seed=8).mul(4).round().sort(2).values.expand(40, 2, 2, 64).contiguous()
    found = quest_scores(q, same)
    assert torch.equal(found.double(), quest_reference(q, same))
    assert torch.equal(found, found[:, :, :1].expand_as(found))
    assert quest_scores(q, same[:0]).shape == (2, 1, 0)
    assert moba_scores(q, same[:0, :, :1].contiguous()).shape == (2, 3, 0)
    q, pages = randn(2, 3, 64, seed=7), randn(4, 2, 2, 16, 64, seed=9)
    assert msa_scores(q, pages, n_blocks=0, block_tokens=16).shape == (2, 1, 0)
    first = msa_scores(q, pages, n_blocks=4, block_tokens=16)
    for _ in range(20):
        assert torch.equal(first, msa_scores(q, pages, n_blocks=4, block_tokens=16))


def test_large_products_stay_finite():
    q, pages = randn(1, 2, 64, seed=10) * 1e4, randn(2, 1, 2, 16, 64, seed=11) * 1e4
    close(msa_scores(q, pages, n_blocks=2, block_tokens=16), msa_reference(q, pages, n_blocks=2, block_tokens=16))


def test_wrong_calls_are_refused_with_every_reason():
    q, pages = randn(2, 2, 64, seed=12), randn(2, 2, 2, 16, 64, seed=13)
    with pytest.raises(ValueError, match=r"powers of two.*float16"):
        msa_scores(q.half(), pages, n_blocks=1, block_tokens=24)
    with pytest.raises(ValueError, match="are not in 2 pages"):
        msa_scores(q, pages, n_blocks=3, block_tokens=16)
    with pytest.raises(ValueError, match="expected a contiguous tensor"):
        quest_scores(q, pages[:, :, :, 0][:, :1])
    with pytest.raises(ValueError, match="head size is 40"):
        moba_scores(randn(1, 1, 40, seed=14), randn(3, 1, 1, 40, seed=15))
