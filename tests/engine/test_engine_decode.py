"""Decoding: where it stops, what it reports, forks that do not touch each other, and clear refusals."""

import hashlib

import pytest
import torch
from sequences import prefilled
from sessions import Single
from tiny_models import loaded_model, prompt_ids, runnable_methods, save_tiny, stock_model

from kvscope.errors import UsageError
from kvscope.harness.engine.decode import answer_nll, decode
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.prefill import prefill
from kvscope.methods.base import Footprint
from kvscope.methods.registry import create_method


@pytest.fixture(scope="module")
def loaded():
    return loaded_model("llama")


@pytest.fixture(scope="module")
def ids():
    return prompt_ids(200, seed=11)


@pytest.fixture(scope="module")
def prompt(loaded, ids):
    return prefill(loaded, ids[:-1])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return load_model(str(save_tiny(tmp_path_factory.mktemp("models") / "tiny")))


def test_steps_are_forced_tokens_and_all_but_the_last_generated(loaded, prompt, ids):
    result = decode(loaded, create_method("dense"), prompt, [*ids[-1:], 7, 8], max_new_tokens=5)
    assert len(result.ids) == 5
    assert len(result.step_s) == 3 + 5 - 1
    assert result.decode_s == pytest.approx(sum(result.step_s))
    assert min(result.step_s) > 0
    assert result.open_s > 0
    assert result.bytes_recalled == 0


def test_footprint_mean_is_the_mean_over_the_steps(loaded, prompt, ids):
    method = create_method("recency:recency_tokens=32")
    seen = []
    with Single(loaded, method, prompt, reserve_tokens=0) as session:
        for token in prompt_ids(40):
            session.step(token)
            seen.append(session.sequence.footprint())
    page_bytes = loaded.shape.page_tokens * loaded.shape.kv_bytes_per_token
    # 32 tokens fill two pages of 16; without a reserve the pool grows page by page.
    assert [footprint.kv_bytes // page_bytes for footprint in seen] == [3] * 16 + [4] * 16 + [5] * 8
    result = decode(loaded, method, prompt, ids[-1:], max_new_tokens=40)
    assert result.footprint_last == method.predict(loaded.shape, prompt.n_tokens, 40)
    assert result.footprint_mean.kv_bytes == result.footprint_last.kv_bytes
    reads = [loaded.shape.read_bytes(32 + step) for step in range(1, 41)]
    assert result.footprint_mean.bytes_read_per_step == round(sum(reads) / 40)
    assert Footprint() + result.footprint_last == result.footprint_last


def test_stops_at_eos_unless_told_not_to(loaded, prompt, ids):
    free = decode(loaded, create_method("dense"), prompt, ids[-1:], max_new_tokens=6)
    ends = free.ids[3]
    first = free.ids.index(ends)
    changed = type(loaded)(**{**vars(loaded), "eos_ids": frozenset({ends})})
    stopped = decode(changed, create_method("dense"), prompt, ids[-1:], max_new_tokens=6)
    assert (stopped.ids, stopped.stop_reason) == (free.ids[: first + 1], "eos")
    on = decode(changed, create_method("dense"), prompt, ids[-1:], max_new_tokens=6, stop_at_eos=False)
    assert (on.ids, on.stop_reason) == (free.ids, "length")


def test_stops_at_a_string_and_cuts_it_off(saved):
    ids = prompt_ids(60)
    prompt = prefill(saved, ids[:-1])
    free = decode(saved, create_method("dense"), prompt, ids[-1:], max_new_tokens=12, stop_at_eos=False)
    assert free.text == saved.tokenizer.decode(free.ids, skip_special_tokens=True)
    stop = free.text[5]
    result = decode(
        saved,
        create_method("dense"),
        prompt,
        ids[-1:],
        max_new_tokens=12,
        stop_strings=("\0no", stop),
        stop_at_eos=False,
    )
    assert result.stop_reason == "stop"
    assert result.text == free.text[: free.text.index(stop)]
    assert len(result.ids) < len(free.ids)
    assert stop in saved.tokenizer.decode(result.ids)


def test_eos_comes_from_the_generation_config_and_the_tokenizer(saved):
    assert saved.eos_ids == {saved.tokenizer.eos_token_id}


def test_answer_nll_equals_the_stock_cross_entropy(loaded, prompt, ids):
    answer = [9, 10, 11, 12]
    with torch.no_grad():
        logits = stock_model("llama")(torch.tensor([[*ids, *answer]])).logits[0, len(ids) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item()
    assert answer_nll(loaded, create_method("dense"), prompt, ids[-1:], answer) == pytest.approx(expected, abs=1e-5)
    assert answer_nll(loaded, create_method("recency:recency_tokens=20"), prompt, ids[-1:], answer) != pytest.approx(
        expected, abs=1e-3
    )


def fingerprint(prompt):
    tensors = list(prompt.pages.values())
    for state in prompt.stock.values():
        tensors += [state.keys, state.values]
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


@pytest.mark.parametrize("name", ["llama", "gemma3", "afmoe"])
@pytest.mark.parametrize("method", runnable_methods())
def test_a_prompt_serves_every_method_unchanged_and_forks_are_independent(name, method):
    loaded = loaded_model(name)
    ids = prompt_ids(170, seed=13)
    prompt = prefilled(loaded, ids[:-1], [method])
    before = fingerprint(prompt)
    alone = decode(loaded, create_method(method), prompt, ids[-1:], max_new_tokens=10)
    with (
        Single(loaded, create_method(method), prompt, reserve_tokens=2) as one,
        Single(loaded, create_method(method), prompt, reserve_tokens=2) as two,
    ):
        tokens = [ids[-1], *alone.ids]
        for token, expected in zip(tokens, alone.ids, strict=False):
            two.step(3)
            assert int(one.step(token).argmax()) == expected
    assert fingerprint(prompt) == before
    assert decode(loaded, create_method(method), prompt, ids[-1:], max_new_tokens=10).ids == alone.ids


def test_observed_layers_are_seen_at_every_step_and_hooks_go(loaded, prompt, ids):
    class Watching(type(create_method("dense"))):
        def observed_layers(self, shape):
            return (0, 3)

        def open(self, prompt, device, **options):
            sequence = super().open(prompt, device, **options)
            sequence.observe = lambda layer, hidden_BM: seen.append((layer, hidden_BM.clone()))
            return sequence

    seen = []
    decode(loaded, Watching(), prompt, ids[-1:], max_new_tokens=2)
    assert [layer for layer, _ in seen] == [0, 3, 0, 3]
    with torch.no_grad():
        stock = stock_model("llama")(torch.tensor([ids]), output_hidden_states=True).hidden_states
    for layer, hidden_BM in seen[:2]:
        torch.testing.assert_close(hidden_BM, stock[layer][:, -1], atol=1e-5, rtol=0)
    decode(loaded, create_method("dense"), prompt, ids[-1:], max_new_tokens=1)
    assert len(seen) == 4
    with pytest.raises(RuntimeError, match="boom"), Single(loaded, Watching(), prompt, reserve_tokens=1):
        raise RuntimeError("boom")
    assert not any(layer._forward_pre_hooks for layer in loaded.model.model.layers)


def test_closing_frees_the_tensors(loaded, prompt):
    with Single(loaded, create_method("dense"), prompt, reserve_tokens=1) as session:
        session.step(5)
        assert session.sequence.pool.n_bytes > 0
    assert not session.sequence.pool.pages


def test_bad_requests_are_refused(loaded, prompt, ids):
    dense = create_method("dense")
    with pytest.raises(UsageError, match="At least one token"):
        decode(loaded, dense, prompt, [], max_new_tokens=3)
    with pytest.raises(UsageError, match="at least one token, got 0"):
        decode(loaded, dense, prompt, ids[-1:], max_new_tokens=0)
    with pytest.raises(UsageError, match="takes 16384"):
        decode(loaded, dense, prompt, ids[-1:], max_new_tokens=16384)
    with pytest.raises(UsageError, match="no tokenizer"):
        decode(loaded, dense, prompt, ids[-1:], max_new_tokens=3, stop_strings=("\n",))
    with pytest.raises(UsageError, match="got 0"):
        answer_nll(loaded, dense, prompt, ids[-1:], [])
    with pytest.raises(ValueError, match="another shape"):
        decode(loaded_model("qwen3"), dense, prompt, ids[-1:], max_new_tokens=3)


def test_every_reason_against_a_method_is_given(loaded, prompt, ids):
    class Refusing(type(create_method("dense"))):
        def unsupported(self, shape, device):
            return ["it is Monday", "it rains"]

    with pytest.raises(UsageError, match="it is Monday; it rains"):
        decode(loaded, Refusing(), prompt, ids[-1:], max_new_tokens=3)
