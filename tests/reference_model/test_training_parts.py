"""What training is made of: attention of unpadded rows, Muon, the guard against the stock model, the checkpoint."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import cache_kwarg
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.reference_model import attention, train
from kvscope.harness.reference_model import trainer as trainers
from kvscope.harness.reference_model.architecture import GLOBAL_LAYERS, build_model, reference_config
from kvscope.harness.reference_model.curriculum import Phase, Shape
from kvscope.harness.reference_model.data import Batch
from kvscope.harness.reference_model.family_accuracy import FamilyAccuracy
from kvscope.harness.reference_model.muon import MOMENTUM, Muon, orthogonalised
from kvscope.harness.reference_model.tokenizer import VOCAB_TOKENS

# -- attention


def masked_formula(q_BQTD, k_BHTD, v_BHTD, *, window: int, scale: float):
    """Softmax over the last ``window`` tokens, token by token."""
    out = torch.empty_like(q_BQTD)
    groups = q_BQTD.shape[1] // k_BHTD.shape[1]
    for head in range(q_BQTD.shape[1]):
        k_BTD, v_BTD = k_BHTD[:, head // groups], v_BHTD[:, head // groups]
        for at in range(q_BQTD.shape[2]):
            seen = slice(max(0, at - window + 1), at + 1)
            weights_BT = (k_BTD[:, seen] @ q_BQTD[:, head, at, :, None])[..., 0].mul(scale).softmax(-1)
            out[:, head, at] = (weights_BT[:, None] @ v_BTD[:, seen])[:, 0]
    return out


@pytest.mark.parametrize("n_tokens", [2, 7, 8, 9, 16, 21, 24])
def test_sliding_attention_is_the_masked_formula(n_tokens: int) -> None:
    """Rows of whole windows or not, and rows shorter than one."""
    torch.manual_seed(n_tokens)
    q_BQTD = torch.randn(2, 6, n_tokens, 4, dtype=torch.float64)
    k_BHTD, v_BHTD = torch.randn(2, 2, 2, n_tokens, 4, dtype=torch.float64)
    found = attention.sliding_attention(q_BQTD, k_BHTD, v_BHTD, window=8, scale=0.7)
    # The scores are taken in fp32, as in training.
    torch.testing.assert_close(found, masked_formula(q_BQTD, k_BHTD, v_BHTD, window=8, scale=0.7), atol=2e-6, rtol=0)


def attend(n_new: int, n_keys: int, **changes: Any) -> torch.Tensor:
    torch.manual_seed(0)
    query, (key, value) = torch.randn(1, 4, n_new, 8), torch.randn(2, 1, 2, n_keys, 8)
    given = {"attention_mask": None, "scaling": 0.5, **changes}
    return attention.unpadded_attention(torch.nn.Identity(), query, key, value, **given)[0]


@pytest.mark.parametrize("window", [None, 4])
def test_only_whole_unpadded_rows_and_single_steps_are_served(window: int | None) -> None:
    assert attend(9, 9, sliding_window=window).shape == (1, 9, 4, 8)
    assert attend(1, 9, sliding_window=window).shape == (1, 1, 4, 8)
    for n_new, n_keys, mask in ((3, 9, None), (9, 9, torch.ones(1, 1, 9, 9)), (1, 9, torch.ones(1, 1, 1, 9))):
        with pytest.raises(ValueError, match="whole unpadded rows"):
            attend(n_new, n_keys, attention_mask=mask, sliding_window=window)


# -- the model under training's attention


def tiny_model(*, seed: int = 0, loud: bool = False) -> PreTrainedModel:
    """The reference's pattern in small; ``loud``: weights large enough that every layer matters."""
    config = reference_config(layers=4, hidden=128)
    config.sliding_window = 16
    model = build_model(config, seed=seed)
    if loud:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() >= 2:
                    weight.mul_(6 if "layers." in name else 3)
    return model


def as_stock(model: PreTrainedModel, implementation: str) -> PreTrainedModel:
    stock = AutoModelForCausalLM.from_config(copy.deepcopy(model.config), attn_implementation=implementation)
    stock.load_state_dict(model.state_dict())
    return stock.float().eval()


def random_ids(rows: int, n_tokens: int) -> torch.Tensor:
    return torch.randint(3, VOCAB_TOKENS, (rows, n_tokens), generator=torch.Generator().manual_seed(1))


def test_the_reference_is_what_its_card_says() -> None:
    config = reference_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 19_628_672
    full = tuple(i for i, kind in enumerate(config.layer_types) if kind == "full_attention")
    assert full == GLOBAL_LAYERS == (2, 5, 7, 9)
    shipped = json.loads((REFERENCE_MODEL_FOLDER / "config.json").read_text(encoding="utf-8"))
    for name, value in config.to_dict().items():
        if name not in ("architectures", "dtype", "transformers_version"):
            assert shipped.get(name, value) == value, name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("n_tokens", [5, 16, 70])
@torch.inference_mode()
def test_logits_equal_the_stock_model_s(implementation: str, n_tokens: int) -> None:
    ours = tiny_model(loud=True).eval()
    ids_BT = random_ids(2, n_tokens)
    found = ours(ids_BT).logits
    torch.testing.assert_close(found, as_stock(ours, implementation)(ids_BT).logits, atol=1e-5, rtol=0)
    assert found.abs().max() > 0.5, "logits large enough for the tolerance to mean something"


@torch.inference_mode()
def test_generation_equals_the_stock_model_s() -> None:
    ours = tiny_model(loud=True).eval()
    ids_BT = random_ids(3, 40)
    given = {
        "input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "max_new_tokens": 24, "do_sample": False,
        "eos_token_id": None, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    found, wanted = ours.generate(**given), as_stock(ours, "sdpa").generate(**given)
    assert found.sequences.tolist() == wanted.sequences.tolist()
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(wanted.logits), atol=1e-5, rtol=0)
    assert len({tuple(row[40:]) for row in found.sequences.tolist()}) == 3
    cache = DynamicCache(config=ours.config)
    ours(ids_BT[:1, :30], **cache_kwarg(ours, cache))
    with pytest.raises(ValueError, match="whole unpadded rows"):
        ours(ids_BT[:1, 30:], **cache_kwarg(ours, cache))


# -- Muon


@pytest.mark.parametrize("shape", [(3, 64, 24), (3, 24, 64), (2, 32, 32)], ids=["tall", "wide", "square"])
def test_orthogonalised_keeps_singular_vectors_and_evens_the_values(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(1.0, 0.02, min(shape[1:]))
    found = orthogonalised(7.0 * (u * values) @ vt)
    within = u.mT @ found @ vt.mT
    kept = within.diagonal(dim1=-2, dim2=-1)
    assert 0.6 < kept.min() <= kept.max() < 1.25
    torch.testing.assert_close(within, torch.diag_embed(kept), atol=1e-3, rtol=0)


def one_matrix_step(weight, gradient, momentum, *, lr: float, decay: float) -> None:
    """Muon as its authors write it, for one matrix; in place."""
    momentum.mul_(MOMENTUM).add_(gradient, alpha=1 - MOMENTUM)
    update = gradient * (1 - MOMENTUM) + momentum * MOMENTUM
    x = update if update.shape[0] <= update.shape[1] else update.T
    x = x / (x.norm() * 1.02 + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x if update.shape[0] <= update.shape[1] else x.T
    weight.mul_(1 - lr * decay).sub_(x, alpha=lr * 0.2 * max(weight.shape) ** 0.5)


def test_a_step_of_muon_is_the_plain_one_matrix_by_matrix() -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 20), (20, 8), (8, 20), (6, 6), (20, 8))]
    plain = [(p.detach().clone(), torch.zeros_like(p)) for p in parameters]
    muon = Muon(parameters, weight_decay=0.1)
    for lr in (0.02, 0.5, 0.01):
        for parameter, (weight, momentum) in zip(parameters, plain, strict=True):
            parameter.grad = torch.randn_like(parameter)
            one_matrix_step(weight, parameter.grad.clone(), momentum, lr=lr, decay=0.1)
        muon.step(lr)
    for parameter, (weight, _) in zip(parameters, plain, strict=True):
        torch.testing.assert_close(parameter.detach(), weight, atol=2e-5, rtol=1e-4)


def test_weights_without_a_gradient_s_push_decay() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    parameter.grad = torch.zeros(4, 6)
    Muon([parameter], weight_decay=0.1).step(0.5)
    torch.testing.assert_close(parameter.detach(), torch.full((4, 6), 0.95))


# -- the trainer


@pytest.fixture
def trainer(tmp_path: Path) -> trainers.Trainer:
    return trainers.Trainer(tiny_model(), device=torch.device("cpu"), out=tmp_path, compile_layers=False)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(REFERENCE_MODEL_FOLDER)


def some_batch(n_tokens: int = 80) -> Batch:
    ids_BT = random_ids(2, n_tokens)
    at_N = torch.arange(n_tokens - 9, n_tokens - 1)
    return Batch(ids_BT, at_N, ids_BT.reshape(-1)[at_N + 1], ("needles", "vt"))


def test_long_rows_are_not_compiled_not_even_where_their_layers_run_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(trainers, "EAGER_TOKENS", 64)
    monkeypatch.setattr(trainers, "KEEP_TOKENS", 64)
    torch._dynamo.utils.counters.clear()
    trainer = trainers.Trainer(tiny_model(), device=torch.device("cpu"), out=tmp_path, compile_layers=True)
    loss, _ = trainer.gradients(some_batch(80))
    assert not torch._dynamo.utils.counters["frames"]
    kept = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad(set_to_none=True)
    monkeypatch.setattr(trainers, "KEEP_TOKENS", 100)
    again, _ = trainer.gradients(some_batch(80))
    assert again == loss
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, kept[name], atol=1e-6, rtol=1e-4)


def test_accuracy_is_counted_by_family() -> None:
    counts = FamilyAccuracy(torch.device("cpu"))
    batch = Batch(random_ids(3, 10), torch.tensor([1, 4, 12, 25, 26]), torch.zeros(5), ("vt", "needles", "vt"))
    counts.add(batch, torch.tensor([True, False, True, True, True]))
    assert counts.read() == {"needles": 1.0, "vt": 0.75}
    assert counts.read() == {}


def test_a_fresh_model_passes_the_guard(trainer: trainers.Trainer) -> None:
    assert trainer.check_against_stock(some_batch()) < 1e-4


def sees_the_future(q_BQTD, k_BHTD, v_BHTD, *, window: int, scale: float) -> torch.Tensor:
    del window
    return torch.nn.functional.scaled_dot_product_attention(q_BQTD, k_BHTD, v_BHTD, scale=scale, enable_gqa=True)


def sees_everything_before(q_BQTD, k_BHTD, v_BHTD, *, window: int, scale: float) -> torch.Tensor:
    del window
    return torch.nn.functional.scaled_dot_product_attention(
        q_BQTD, k_BHTD, v_BHTD, scale=scale, is_causal=True, enable_gqa=True
    )


@pytest.mark.parametrize("tampered", [sees_the_future, sees_everything_before])
def test_the_guard_finds_attention_that_sees_too_much(
    trainer: trainers.Trainer, monkeypatch: pytest.MonkeyPatch, tampered: Any
) -> None:
    monkeypatch.setattr(attention, "sliding_attention", tampered)
    with pytest.raises(RuntimeError, match="differs from the stock model's"):
        trainer.check_against_stock(some_batch())


def test_the_guard_finds_layers_switched_to_another_implementation(trainer: trainers.Trainer) -> None:
    """The bug it was written for: without a mask, stock sdpa lets local layers see the whole row."""
    trainer.model.config._attn_implementation = "sdpa"
    with pytest.raises(RuntimeError, match="differs from the stock model's"):
        trainer.check_against_stock(some_batch())


def test_saving_and_checking_leave_training_s_attention_alone(
    trainer: trainers.Trainer, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Building the copy to be saved once switched the trainer's own local layers to full attention."""
    with torch.no_grad():
        before = trainer._behind_layers(some_batch().ids_BT)
    trainer.save(tokenizer, seed=0)
    trainer.check_against_stock(some_batch())
    assert trainer.model.config._attn_implementation == attention.NAME
    assert {layer.self_attn.config._attn_implementation for layer in trainer.model.model.layers} == {attention.NAME}
    with torch.no_grad():
        assert torch.equal(trainer._behind_layers(some_batch().ids_BT), before)
    saved = AutoModelForCausalLM.from_pretrained(trainer.out)
    assert saved.config._attn_implementation == "sdpa"
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value.to(torch.bfloat16).to(saved.state_dict()[name].dtype)), name


def test_a_failing_source_of_data_leaves_a_checkpoint(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(data: Any, *, workers: int) -> Iterator[Batch]:
        del workers
        yield data[0]
        yield data[1]
        raise OSError("a worker died")

    monkeypatch.setattr(train, "batches", failing)
    tokenizer.save_pretrained(tmp_path)
    shape = Shape(tokens=64, rows=2, questions=2)
    phase = Phase(name="broken", shapes=(shape,), steps=5, lr=(1e-2, 1e-2), copy_share=1.0)
    with pytest.raises(OSError, match="a worker died"):
        train.train(out=tmp_path, phases=(phase,), seed=3, config=reference_config(layers=2, hidden=128))
    state = json.loads((tmp_path / trainers.STATE_FILE).read_text(encoding="utf-8"))
    assert (state["step"], state["phases"][-1]["steps_done"], state["phases"][-1]["name"]) == (2, 2, "broken")
    learned = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    fresh = build_model(reference_config(layers=2, hidden=128), seed=3).state_dict()
    changed = [name for name in fresh if not torch.equal(learned[name], fresh[name].to(torch.bfloat16).float())]
    assert any("q_proj" in name for name in changed)
    assert any("embed_tokens" in name for name in changed)
