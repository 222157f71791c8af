"""Training's forward of DeepSeek-V4 against the stock classes: logits and gradients, dense and with top-k."""

import copy
from typing import Any

import pytest
import torch
from small_v4 import logits, loud_model, small_config
from transformers import AutoModelForCausalLM

from kvscope.harness.reference_model.v4 import attention
from kvscope.harness.reference_model.v4.architecture import LAYER_TYPES, DeepseekV4, v4_config
from kvscope.harness.reference_model.v4.index_loss import entry_mass
from kvscope.harness.reference_model.v4.layer import compiled_parts, entries_of
from kvscope.harness.reference_model.v4.parts import feed_forward

ALL = 1024


def stock_of(model: Any) -> Any:
    stock = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation="eager")
    stock.load_state_dict(model.state_dict())
    return stock.to(next(model.parameters()).dtype)


def random_ids(n_tokens: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 512, (rows, n_tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("few", [0, attention.FEW_ENTRIES])
@pytest.mark.parametrize(
    ("n_tokens", "topk", "dtype"),
    [(3, ALL, torch.float32), (7, ALL, torch.float32), (32, ALL, torch.float32), (131, ALL, torch.float32),
     (70, ALL, torch.float64), (131, 8, torch.float32), (70, 8, torch.float64)],
)  # fmt: skip
def test_logits_and_gradients_equal_the_stock_model_s(
    n_tokens: int, topk: int, dtype: torch.dtype, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows without an entry, whole groups of tokens or not, several blocks of the window; top-k below all entries."""
    monkeypatch.setattr(attention, "FEW_ENTRIES", few)
    model = loud_model(index_topk=topk).to(dtype)
    stock, ids_BT = stock_of(model), random_ids(n_tokens)
    found, wanted = logits(model, ids_BT), stock(ids_BT, use_cache=False).logits
    # The stock classes normalise and rotate in fp32 whatever the type.
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert wanted.abs().max() > 1, "logits large enough for the tolerance to mean something"
    (3 * found).sin().sum().backward()
    (3 * wanted).sin().sum().backward()
    compared = 0
    for (name, parameter), of_stock in zip(model.named_parameters(), stock.parameters(), strict=True):
        if parameter.grad is None:
            assert ".compressor." in name, name
            assert of_stock.grad is None or not of_stock.grad.any(), name
            continue
        scale = of_stock.grad.norm().item()
        torch.testing.assert_close(parameter.grad, of_stock.grad, atol=1e-4 * scale + 1e-7, rtol=0, msg=name)
        compared += 1
    assert compared > (90 if n_tokens > 32 else 70)


def test_top_k_changes_the_logits() -> None:
    """Else the comparison with top-k would say nothing."""
    ids_BT = random_ids(131)
    with torch.no_grad():
        difference = logits(loud_model(index_topk=8), ids_BT) - logits(loud_model(index_topk=ALL), ids_BT)
    assert difference[:, :32].abs().max() < 1e-5, "eight entries are all a query sees up to here"
    assert difference.abs().max() > 0.1


@torch.no_grad()
def test_chosen_entries_in_several_parts_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids_BT = loud_model(index_topk=8), random_ids(131)
    whole = logits(model, ids_BT)
    monkeypatch.setattr(attention, "CHOSEN_QUERIES", 50)
    torch.testing.assert_close(logits(model, ids_BT), whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_every_expert_weighed_is_the_stock_block() -> None:
    model = loud_model()
    x_NM = torch.randn(40, model.config.hidden_size)
    for layer in stock_of(model).model.layers:
        torch.testing.assert_close(feed_forward(layer.mlp, x_NM), layer.mlp(x_NM[None])[0], atol=1e-5, rtol=1e-5)


def joint_gradients(
    join: Any, dtype: torch.dtype, *, rate: int, n_tokens: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Output and gradients of window and entries joined, each beside those of one softmax over a masked matrix."""
    torch.manual_seed(0)
    B, Q, D, window, scale = 2, 3, 8, 4, 0.4
    n = n_tokens // rate
    q, kv, e, sinks = (
        torch.randn(shape, dtype=dtype, requires_grad=True)
        for shape in ((B, n_tokens, Q, D), (B, n_tokens, D), (B, n, D), (Q,))
    )
    out, lse = attention.window_attention(q, kv, sinks, window=window, scale=scale)
    found = join(q, e, out, lse, rate=rate, scale=scale)
    at = torch.arange(n_tokens)
    near = (at[:, None] >= at) & (at[:, None] - at < window)
    far = torch.arange(n) < (at[:, None] + 1) // rate
    keys = torch.cat((kv, e), 1)
    scores = torch.einsum("btqd,bkd->btqk", q, keys) * scale
    scores = scores.masked_fill(~torch.cat((near, far), 1)[:, None], float("-inf"))
    weights = torch.cat((scores, sinks[:, None].expand(B, n_tokens, -1, 1)), -1).softmax(-1)
    wanted = torch.einsum("btqk,bkd->btqd", weights[..., :-1], keys)
    push = torch.randn_like(found)
    leaves = (q, kv, e, sinks)
    ours, theirs = (torch.autograd.grad(x, leaves, push, allow_unused=True) for x in (found, wanted))
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None and b.numel()]
    return [(found, wanted), *pairs]


@pytest.mark.parametrize("join", [attention.joined_with_entries, attention.joined_with_few])
@pytest.mark.parametrize("n_tokens", [2, 5, 12, 13, 40])
@pytest.mark.parametrize("rate", [1, 4, 8])
def test_window_and_entries_are_one_softmax(join: Any, rate: int, n_tokens: int) -> None:
    for found, wanted in joint_gradients(join, torch.float64, rate=rate, n_tokens=n_tokens):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)  # scores of the window are taken in fp32


def test_memory_grows_with_the_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of a training step has an element for each query and each entry, where entries are many."""
    monkeypatch.setattr(attention, "FEW_ENTRIES", 0)
    largest = {}
    for n_tokens in (256, 512):
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits(loud_model(), random_ids(n_tokens, rows=1))
        largest[n_tokens] = (max(sizes), sum(sizes))
    assert largest[512][0] == 2 * largest[256][0]
    assert largest[512][1] < 2.01 * largest[256][1]


@pytest.mark.slow
def test_parts_are_compiled_once_for_all_layers_and_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for each layer or length would take minutes of a GPU's time."""
    model = loud_model(hc_sinkhorn_iters=2, sliding_window=32)
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        del inputs
        graphs.append(graph)
        return graph.forward

    ids_BT = random_ids(64, 5)  # two blocks of the window, as the shortest rows have
    plain = logits(model, ids_BT).detach()
    torch._dynamo.reset()
    # Traced operations differ in their symbols: to keep what each gave takes longer than to find it out again.
    monkeypatch.setattr(torch._dynamo.config, "fake_tensor_cache_enabled", False)
    parts = compiled_parts(backend=counting)
    for layer in model.model.layers:
        layer.parts = parts
    torch.testing.assert_close(logits(model, ids_BT), plain, atol=1e-5, rtol=0)
    # Three kinds of attention; the two ways behind them differ in whether they are given a view.
    assert len(graphs) == 9
    for n_tokens, rows in ((128, 3), (256, 2)):
        logits(model, random_ids(n_tokens, rows))
    assert len(graphs) == 9


@torch.no_grad()
def test_the_mass_of_entries_is_what_stock_attention_gives_them() -> None:
    """Mean over heads of the eager weights, window and sink in the same softmax."""
    model = loud_model()
    stock, ids_BT = stock_of(model), random_ids(70)
    wanted: list[torch.Tensor] = []
    for layer in stock.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, out: wanted.append(out[1][..., 70:].mean(1)))
    stock(ids_BT, use_cache=False)
    x, given = DeepseekV4().entering(model.model, ids_BT)
    at_BC = torch.tensor([[0, 2, 3, 40, 69], [5, 6, 7, 8, 68]])
    for layer, wanted_BTn in zip(model.model.layers, wanted, strict=True):
        hidden_BTM = layer.entering_attention(x)[0].unflatten(0, (2, -1))
        x = layer(x, **given)
        if layer.self_attn.compressor is not None:
            found = entry_mass(layer.self_attn, hidden_BTM, at_BC, given["rope"])
            torch.testing.assert_close(found, wanted_BTn[torch.arange(2)[:, None], at_BC], atol=1e-5, rtol=0)
            assert found.max() > 0.05


def test_the_configuration_is_of_the_stock_class_and_within_its_size() -> None:
    config = v4_config()
    assert tuple(config.layer_types) == LAYER_TYPES
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert type(model).__name__ == "DeepseekV4ForCausalLM"
    size_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert 32e6 < size_bytes <= 36e6


def test_no_entry_before_a_group_of_tokens_is_whole() -> None:
    model = loud_model()
    maker = model.model.layers[1].self_attn.compressor
    angles = (torch.ones(1, 3, 4), torch.zeros(1, 3, 4))
    assert entries_of(maker, torch.randn(2, 3, small_config().hidden_size), angles).shape == (2, 0, 32)
