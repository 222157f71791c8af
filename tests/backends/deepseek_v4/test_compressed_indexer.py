"""The released score function against a plain fp64 formula, and the paper's bytes."""

import pytest
import torch
from compressed_plain import plain_logits

from kvscope.methods.compressed_bytes import FLASH_FP8
from kvscope.methods.lsa.compressed import CompressedIndexer, key_bytes, stored_keys
from kvscope.methods.lsa.compressed_query import hadamard, rotate_last
from kvscope.methods.lsa.printed import TABLE_1, pruned_fractions

M, RANK, HEADS, DIM, N = 48, 24, 6, 16, 37
PAIRS = 4


@pytest.fixture
def indexer() -> CompressedIndexer:
    return CompressedIndexer.random((3, 7), hidden_size=M, rank=RANK, heads=HEADS, key_dim=DIM, seed=4)


def test_scores_are_the_formula(indexer):
    draws = torch.Generator().manual_seed(0)
    position, inv_freq = 1234, 1 / 100 ** (torch.arange(PAIRS) / PAIRS)
    hidden = {layer: torch.randn(M, generator=draws) for layer in (3, 7)}
    keys = {layer: stored_keys(torch.randn(N, DIM, generator=draws)) for layer in (3, 7)}
    angle = position * inv_freq.double()
    cos, sin = angle.cos().float(), angle.sin().float()
    plain = {
        layer: plain_logits(
            indexer.layers[layer], hidden[layer], position, keys[layer][0].double() * keys[layer][1][:, None], inv_freq
        )
        for layer in (3, 7)
    }
    for layer, expected in plain.items():
        alone = CompressedIndexer(layers={layer: indexer.layers[layer]})
        torch.testing.assert_close(alone.logits(hidden, cos, sin, keys).double(), expected, atol=2e-5, rtol=1e-4)
    best = torch.maximum(plain[3], plain[7])
    torch.testing.assert_close(indexer.logits(hidden, cos, sin, keys).double(), best, atol=2e-5, rtol=1e-4)
    both = torch.cat(list(plain.values()))
    assert both.min() < 0 < both.max()


def test_hadamard_keeps_products_and_is_its_own_inverse():
    x, y = torch.randn(5, 64, dtype=torch.float64), torch.randn(5, 64, dtype=torch.float64)
    torch.testing.assert_close((hadamard(x) * hadamard(y)).sum(-1), (x * y).sum(-1))
    torch.testing.assert_close(hadamard(hadamard(x)), x)


def test_rotation_is_the_stock_one():
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

    x = torch.randn(HEADS, DIM)
    angle = torch.rand(PAIRS) * 9
    stock = apply_rotary_pos_emb(x[None, :, None], angle.cos()[None, None], angle.sin()[None, None])[0, :, 0]
    torch.testing.assert_close(rotate_last(x, angle.cos(), angle.sin()), stock)


def test_stored_keys_are_132_bytes_and_close():
    k = torch.randn(50, 128)
    k[:, 3] *= 40  # an outlier dimension, which the turn spreads
    codes, scale = stored_keys(k)
    assert codes.element_size() * codes.shape[1] + scale.element_size() == key_bytes(128) == 132
    restored = hadamard(codes.float() * scale[:, None])
    assert (restored - k).norm() / k.norm() < 0.04


def test_the_formula_gives_the_paper_s_nine_rows():
    """GPU KV of Table 1's dense column, which is printed to two digits."""
    gib = [FLASH_FP8.bytes_per_token * row.tokens / 2**30 for row in TABLE_1]
    assert [round(x, 3) for x in gib] == [0.169, 0.657, 1.81, 0.459, 1.836, 0.235, 0.47, 0.94, 1.88]
    for row, computed in zip(TABLE_1, gib, strict=True):
        assert computed == pytest.approx(row.dense_gb, rel=0.025)
    assert FLASH_FP8.bytes_per_token == pytest.approx(3850, abs=1)


def test_three_accountings_of_the_pruned_cache():
    rows = [pruned_fractions(row) for row in TABLE_1]
    means = {name: round(100 * sum(row[name] for row in rows) / len(rows), 1) for name in rows[0]}
    assert means == {"printed": 13.1, "with_hca": 15.4, "with_hca_and_keys": 18.0}
    last = pruned_fractions(TABLE_1[-1])
    assert (round(100 * last["printed"], 1), round(100 * last["with_hca_and_keys"], 1)) == (9.6, 14.6)
