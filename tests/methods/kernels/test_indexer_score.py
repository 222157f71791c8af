"""The indexer_score kernel against its reference in fp64, and against the torch indexer.

Shapes: L indexed layers, X queries, I indexer heads, E key size, n chunks.
"""

import pytest
import torch
from kernel_tools import DEVICE, randn

from kvscope.methods.fp8_keys import dequantize, quantize
from kvscope.methods.kernels.indexer_score.kernel import Tuning, indexer_score
from kvscope.methods.kernels.indexer_score.reference import indexer_score_reference
from kvscope.methods.lsa.indexer import Indexer, IndexerConfig

TINY = Tuning(tile_chunks=16)
PRECISIONS = ["fp8", "fp16"]


def inputs(L, X, heads, E, n, *, seed=0):
    pairs = [quantize(randn(n, E, seed=seed + layer) * 3) for layer in range(L)]
    keys, scale = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    q, weight = randn(L, X, heads, E, seed=seed + 50), randn(L, X, heads, seed=seed + 60) / heads
    return q, weight, randn(L, seed=seed + 70), keys, scale


def rounded(q, precision):
    """The queries the kernel multiplies with: scaled by head, rounded, scaled back."""
    factor = q.abs().amax(-1, keepdim=True) / 448.0
    factor = torch.where(factor > 0, factor, 1.0)
    return (q / factor).to(torch.float8_e4m3fn if precision == "fp8" else torch.float16).double() * factor


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("L", "X", "heads", "E", "n"), [(1, 1, 8, 32, 1), (3, 1, 16, 64, 100), (2, 3, 5, 48, 47), (1, 1, 64, 128, 128)]
)
def test_equals_the_reference(L, X, heads, E, n, precision):
    q, weight, bias, keys, scale = inputs(L, X, heads, E, n)
    found = indexer_score(q, weight, bias, keys, scale, query_precision=precision, tuning=TINY)
    # Exact but for the rounding of queries: Hopper adds fp8 products with 13 bits.
    exact = indexer_score_reference(rounded(q, precision), weight, bias, keys, scale)
    tolerance = 2e-3 if precision == "fp8" and DEVICE.type == "cuda" else 2e-5
    torch.testing.assert_close(found.double(), exact, atol=tolerance * exact.abs().max().item(), rtol=tolerance)


@pytest.mark.parametrize(("precision", "band"), [("fp8", 0.2), ("fp16", 1e-3)])
def test_a_threshold_selects_the_oracles_set_outside_a_band(precision, band):
    q, weight, bias, keys, scale = inputs(2, 1, 32, 64, 300, seed=5)
    found = indexer_score(q, weight, bias, keys, scale, query_precision=precision, tuning=Tuning(tile_chunks=64))
    exact = indexer_score_reference(q, weight, bias, keys, scale).amax((0, 1))
    threshold = exact.quantile(0.8)
    clear = (exact - threshold).abs() > band * exact.std()
    assert clear.float().mean() > 0.8
    assert torch.equal((found.amax((0, 1)) >= threshold)[clear], (exact >= threshold)[clear])


def test_products_of_zero_tie_at_the_bias():
    q, weight, bias, keys, scale = inputs(1, 1, 8, 32, 40)
    found = indexer_score(-keys.float().abs().amax(1)[:, None, None].expand(1, 1, 8, 32), weight, bias, keys, scale)
    assert found.shape == (1, 1, 40)
    keys = torch.ones_like(keys.float()).to(keys.dtype)
    found = indexer_score(-torch.ones_like(q), weight, bias, keys, scale)
    assert torch.equal(found, bias.view(1, 1, 1).expand(1, 1, 40))
    found = indexer_score(torch.zeros_like(q), weight, bias, keys, scale)
    assert torch.equal(found, bias.view(1, 1, 1).expand(1, 1, 40))


def test_equals_the_torch_indexer():
    config = IndexerConfig(
        model="m", model_revision="r", layers=(1, 4), chunk_tokens=4, tau=8, hidden_size=24, key_features=32
    )
    indexer = Indexer.untrained(config, seed=3)
    hidden = randn(2, 2, 24, seed=1).cpu()
    pairs = [quantize(randn(33, config.key_dim, seed=layer).cpu()) for layer in config.layers]
    with torch.inference_mode():
        expected = indexer.logits(hidden, [dequantize(*pair) for pair in pairs])
        encoded = [indexer.layer(layer).query(hidden[:, i]) for i, layer in enumerate(config.layers)]
        bias = torch.stack([indexer.layer(layer).bias for layer in config.layers])
    found = indexer_score(
        torch.stack([q for q, _ in encoded]).to(DEVICE),
        torch.stack([w for _, w in encoded]).to(DEVICE),
        bias.to(DEVICE),
        torch.stack([keys for keys, _ in pairs]).to(DEVICE),
        torch.stack([scale for _, scale in pairs]).to(DEVICE),
        query_precision="fp16",
    )
    torch.testing.assert_close(found.amax(0).cpu(), expected, atol=1e-3, rtol=1e-3)


def test_no_chunks_and_twenty_equal_runs():
    assert indexer_score(*inputs(2, 1, 8, 32, 0)).shape == (2, 1, 0)
    given = inputs(1, 1, 8, 32, 50)
    first = indexer_score(*given)
    for _ in range(20):
        assert torch.equal(first, indexer_score(*given))


def test_wrong_calls_are_refused():
    q, weight, bias, keys, scale = inputs(1, 1, 8, 32, 20)
    for wrong, message in [
        ((q[..., :16], weight, bias, keys, scale), "do not fit"),
        ((q, weight, bias, keys.float(), scale), "float8_e4m3fn"),
        (inputs(1, 1, 8, 40, 20), "multiple of 16"),
        ((q, weight, bias, keys[:, ::2], scale[:, ::2]), "contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            indexer_score(*wrong)
