"""The gradient of what no head matches: where it is given, what it leaves alone, and that it brings a chunk back."""

import pytest
import torch

from kvscope.errors import UsageError
from kvscope.harness.indexers.lsa.train_config import TrainConfig
from kvscope.methods.lsa.compressed_query import EntryLayer
from kvscope.methods.lsa.indexer import Indexer, IndexerConfig
from kvscope.methods.lsa.rectifier import rectified

CONFIG = IndexerConfig(
    model="tiny", model_revision=None, layers=(0, 1), chunk_tokens=4, tau=4, hidden_size=16, key_features=8,
    heads=2, key_dim=8, rank=8, encoder="pooled", encoder_width=8,
)  # fmt: skip


def test_values_are_relus_whatever_the_slope() -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 3.0], requires_grad=True)
    for slope in (0.0, 0.3, 1.0):
        assert torch.equal(rectified(x, slope), torch.relu(x))


def test_below_zero_only_a_gradient_that_raises_passes() -> None:
    x = torch.tensor([-1.0, -1.0, 2.0, 2.0], requires_grad=True)
    # Descent moves against the gradient: -1 raises, +1 lowers.
    rectified(x, 0.25).backward(torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    assert x.grad is not None
    assert x.grad.tolist() == [-0.25, 0.0, -1.0, 1.0]


def test_without_a_slope_it_is_relu() -> None:
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    rectified(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 1.0]


def test_a_chunk_that_no_head_matches_comes_back() -> None:
    def trained(slope: float) -> float:
        indexer = Indexer.untrained(CONFIG, seed=0).train()
        indexer.revive(slope)
        draws = torch.Generator().manual_seed(1)
        states = torch.randn(1, 2, 16, generator=draws)
        with torch.no_grad():
            keys = []
            for at, layer in enumerate(CONFIG.layers):
                side = indexer.token_layer(layer)
                side.query.weights.weight.zero_()
                side.query.weights.bias.fill_(1.0)  # every match adds
                q, _ = side.query(states[:, at])
                keys.append(-q.sum(1) / q.norm())  # no head has a product above zero
                assert (q[0] @ keys[-1].T).max() < 0
        side_weights = [indexer.token_layer(layer).query.up.weight for layer in CONFIG.layers]
        optimizer = torch.optim.SGD(side_weights, lr=10.0)
        for _ in range(200):
            optimizer.zero_grad()
            torch.nn.functional.softplus(-indexer.logits(states, keys)).sum().backward()
            optimizer.step()
        with torch.no_grad():
            return float(indexer.logits(states, keys))

    assert trained(0.0) == 0.0  # the bias, for good
    assert trained(0.3) > 0.1


def test_both_kinds_of_layer_take_the_slope_and_store_nothing_of_it() -> None:
    indexer = Indexer.untrained(CONFIG, seed=0)
    before = set(indexer.state_dict())
    indexer.revive(0.5)
    assert {indexer.layer(layer).revive for layer in CONFIG.layers} == {0.5}
    assert set(indexer.state_dict()) == before
    entries = EntryLayer(hidden_size=16, rank=8, heads=2, key_dim=8)
    draws = torch.Generator().manual_seed(2)
    states, keys = torch.randn(1, 16, generator=draws), torch.randn(5, 8, generator=draws)
    angles = torch.stack([torch.ones(1, 2), torch.zeros(1, 2)], 1)

    def gradient(slope: float) -> torch.Tensor:
        entries.revive = slope
        entries.zero_grad()
        entries.logits(states, keys, angles).sum().neg().backward()
        assert entries.w_iuq.grad is not None
        return entries.w_iuq.grad.clone()

    assert not torch.equal(gradient(0.5), gradient(0.0))


@pytest.mark.parametrize("slope", [-0.1, float("nan"), float("inf")])
def test_a_slope_that_is_none_is_refused(slope: float) -> None:
    with pytest.raises(UsageError, match="revive must be 0 or more and finite"):
        TrainConfig(revive=slope)
