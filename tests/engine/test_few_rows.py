"""Products of few rows, turned round: those of a linear layer but for rounding, in the steps of a session alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kvscope.harness.engine import few_rows
from kvscope.harness.engine.few_rows import MOST_ROWS, turned_products
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.session import Session
from kvscope.harness.engine.synthetic import synthetic_prompt
from kvscope.methods.registry import create_method


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_rows", [2, 3, 16, MOST_ROWS])
def test_a_step_gets_the_same_product(n_rows, bias):
    torch.manual_seed(0)
    layer = nn.Linear(48, 40, bias=bias)
    x = torch.randn(n_rows, 1, 48)
    with torch.inference_mode(), turned_products():
        turned = layer(x)
    expected = layer.double()(x.double())
    assert turned.is_contiguous()
    torch.testing.assert_close(turned.double(), expected, atol=1e-5, rtol=1e-5)
    view = torch.randn(n_rows, 3, 48)[:, -1:]  # as models cut the last position out
    with torch.inference_mode(), turned_products():
        assert torch.equal(layer.float()(view), layer(view.clone()))


@pytest.mark.parametrize(
    "x",
    [
        torch.ones(1, 1, 8),
        torch.ones(2, 5, 8),
        torch.ones(4, 8),
        torch.ones(MOST_ROWS + 1, 1, 8),
        torch.ones(3, 1, 8, dtype=torch.bfloat16),
    ],
    ids=["one row", "a prompt", "no step", "many rows", "another type"],
)
def test_all_else_is_torchs_own(x):
    weight = torch.randn(6, 8).to(x.dtype)
    with turned_products():
        assert torch.equal(F.linear(x, weight), torch.matmul(x, weight.t()))


def test_torchs_function_comes_back_after_an_error():
    own = F.linear

    def fails():
        with turned_products():
            assert F.linear is not own
            raise ValueError("no room")

    with pytest.raises(ValueError, match="no room"):
        fails()
    assert F.linear is own


@pytest.mark.parametrize(("n_members", "expected"), [(1, False), (3, True)])
def test_shared_steps_turn_their_products(n_members, expected, monkeypatch):
    loaded = load_model("preset:tiny", device="cpu", dtype="float32")
    prompt = synthetic_prompt(loaded, 100, mirror=True, collectors=(), seed=1)
    turned = []
    monkeypatch.setattr(few_rows.torch, "mm", lambda *args, own=torch.mm: turned.append(args) or own(*args))
    with Session(loaded) as session:
        for _ in range(n_members):
            session.add(create_method("dense"), prompt, reserve_tokens=1)
        session.step(list(range(n_members)))
    assert bool(turned) == expected
