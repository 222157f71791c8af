"""Sequences that decode together: what each gives alone, in bytes, choices, reads, texts and ends."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from sessions import UNCAPTURED, new_session
from tiny_models import loaded_model, prompt_ids, runnable_methods, save_tiny, stock_model

from kvscope.harness.engine import batch_decode
from kvscope.harness.engine import batch_noise as noise
from kvscope.harness.engine.batch_decode import BatchDecode
from kvscope.harness.engine.batch_noise import batch_noise
from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.decoding import DecodeResult, Decoding, Request
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.models import load_model, wrap_model
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.engine.session import Session
from kvscope.methods.base import union_collectors
from kvscope.methods.registry import create_method

#: What tells how a sequence was stepped.
STEPPING = {"open_s": 0.0, "decode_s": 0.0, "step_s": [], "batch": 1, "least_logit_gap": 0.0, "captures": 0,
            "capture_s": 0.0}  # fmt: skip


def requests_of(loaded: LoadedModel, specs: list[str], lengths_tokens: list[int]) -> list[Request]:
    """Sequences of every method on prompts of several lengths, with questions and answers of several lengths."""
    methods = [create_method(spec) for spec in specs]
    for method in methods:
        assert method.unsupported(loaded.shape, loaded.device) == []
    found = []
    for n_tokens in lengths_tokens:
        ids = prompt_ids(n_tokens, seed=n_tokens)
        collectors = union_collectors(methods, loaded.shape.layers)
        prompt = prefill(loaded, ids, collectors=collectors, chunk_tokens=64)
        for method in methods:
            n = len(found)
            found.append(
                Request(method=method, prompt=prompt, forced_ids=ids[: 1 + n % 3], max_new_tokens=2 + (5 * n) % 7)
            )
    return found


def alone(loaded: LoadedModel, request: Request) -> DecodeResult:
    return decode(
        loaded,
        request.method,
        request.prompt,
        request.forced_ids,
        max_new_tokens=request.max_new_tokens,
        stop_strings=request.stop_strings,
        stop_at_eos=request.stop_at_eos,
    )


def together(batch: BatchDecode, requests: list[Request], *, rows: int) -> list[DecodeResult]:
    """Decode them, a new one entering as soon as one has left; return the results in the order of the requests."""
    waiting, entered = list(requests), []
    while waiting or batch.under_way:
        while waiting and batch.n_rows < rows:
            entered.append(batch.add(waiting.pop(0)))
        batch.step()
    assert all(row.error is None for row in entered)
    return [row.result for row in entered if row.result is not None]


def plain(result: DecodeResult) -> DecodeResult:
    return replace(result, **STEPPING)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_sequences_that_come_and_go_give_what_each_gives_alone(family: str) -> None:
    loaded = loaded_model(family)
    requests = requests_of(loaded, runnable_methods(), [150, 90])
    with BatchDecode(loaded) as batch:
        found = together(batch, requests, rows=5)
    own = [alone(loaded, request) for request in requests]
    assert [plain(result) for result in found] == [plain(result) for result in own]
    assert len({len(result.ids) for result in found}) > 3
    assert {result.batch for result in own} == {1}
    assert max(result.batch for result in found) == 5
    for result, expected in zip(found, own, strict=True):
        assert len(result.step_s) == len(expected.step_s)
        assert result.least_logit_gap == pytest.approx(expected.least_logit_gap, abs=1e-3)


def test_formats_of_the_store_mix_in_a_session() -> None:
    loaded = loaded_model("llama")
    specs = [
        "dense", "dense:kv=int8", "dense:kv=kivi2", "recency:budget_fraction=0.5,kv=int4",
        "snapkv:budget_tokens=60,kv=fp8",
        "quest:budget_tokens=32,kv=int8", "lsa:budget_fraction=0.5,chunk_tokens=16,selection=synthetic,kv=int4",
    ]  # fmt: skip
    requests = requests_of(loaded, specs, [150, 90])
    with BatchDecode(loaded) as batch:
        found = together(batch, requests, rows=5)
    assert [plain(result) for result in found] == [plain(alone(loaded, request)) for request in requests]


def test_steps_of_fixed_addresses_share_a_session_too(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_model("llama")
    requests = requests_of(loaded, ["dense", "recency:recency_tokens=40", "random:fraction=0.5"], [150, 90])
    monkeypatch.setattr(batch_decode, "Session", lambda *_, **__: new_session(loaded, UNCAPTURED))
    with BatchDecode(loaded, decode_graph="on") as batch:
        found = together(batch, requests, rows=3)
    assert [result.ids for result in found] == [alone(loaded, request).ids for request in requests]


class CapturedSession(Session):
    """As a session whose step is a graph: rows rest where they are."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.resting: list[Any] = []
        self.removed: list[Any] = []

    @property
    def captured(self) -> bool:
        return True

    def rest(self, member: Any) -> None:
        assert member in self.members
        self.resting.append(member)

    def remove(self, member: Any) -> None:
        assert member in self.resting
        self.removed.append(member)
        super().remove(member)


def test_in_a_captured_step_a_sequence_that_ended_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_model("llama")
    requests = requests_of(loaded, ["dense", "recency:recency_tokens=40"], [150, 90])
    own = [alone(loaded, request) for request in requests]
    monkeypatch.setattr(batch_decode, "Session", CapturedSession)
    with BatchDecode(loaded) as batch:
        rows = [batch.add(request) for request in requests]
        session: Any = batch._session
        while len(batch.resting) < 2:
            batch.step()
        assert batch.n_rows == 4
        assert len(session.resting) == len(batch.resting)
        assert all(row.result is not None for row in batch.resting)
        batch.remove_resting()
        assert batch.n_rows == len(batch.under_way) == 4 - len(session.removed)
        while batch.under_way:
            batch.step()
        assert batch.n_rows == 0
    assert [plain(row.result) for row in rows if row.result is not None] == [plain(result) for result in own]


def test_a_sequence_that_cannot_enter_leaves_the_others() -> None:
    loaded = loaded_model("llama")
    first, second = requests_of(loaded, ["dense"], [150, 90])
    own = alone(loaded, first)
    with BatchDecode(loaded) as batch:
        row = batch.add(first)
        with pytest.raises(Exception, match="At least one token"):
            batch.add(replace(second, forced_ids=[]))
        assert batch.n_rows == 1
        while batch.under_way:
            assert batch.step() in ([], [row])
    assert row.result is not None
    assert plain(row.result) == plain(own)


def test_scores_that_are_not_finite_fail_their_sequence_alone() -> None:
    loaded = loaded_model("llama")
    requests = requests_of(loaded, ["quest:budget_tokens=64", "dense"], [150, 90])
    own = [alone(loaded, request) for request in requests[1:]]
    for layers in requests[0].prompt.metadata.values():
        for layer, kept in layers.items():
            layers[layer] = torch.full_like(kept, torch.nan)
    with BatchDecode(loaded) as batch:
        rows: list[Decoding] = [batch.add(request) for request in requests]
        assert batch.step()[0] is rows[0]
        while batch.under_way:
            batch.step()
    assert "at decode step 0 scores that the method chooses by are not finite" in str(rows[0].error)
    assert [plain(row.result) for row in rows[1:] if row.result is not None] == [plain(result) for result in own]


def test_stop_strings_end_answers_of_a_batch(tmp_path: Any) -> None:
    loaded = load_model(str(save_tiny(tmp_path)), device="cpu", page_tokens=16)
    prompt = prefill(loaded, prompt_ids(90))
    free = decode(loaded, create_method("dense"), prompt, [5], max_new_tokens=12, stop_at_eos=False)
    stop = free.text[3:5]
    request = Request(method=create_method("dense"), prompt=prompt, forced_ids=[5], max_new_tokens=12,
                      stop_strings=(stop,), stop_at_eos=False)  # fmt: skip
    with BatchDecode(loaded) as batch:
        first, second = together(batch, [request, replace(request, stop_strings=())], rows=2)
    assert (first.stop_reason, first.text) == ("stop", free.text[: free.text.find(stop)])
    assert (second.stop_reason, second.text) == ("length", free.text)


def test_noise_is_a_little_and_not_nothing() -> None:
    loaded = loaded_model("llama")
    found = batch_noise(loaded, rows=8)
    assert 0 <= found.logit_noise < 1e-2
    assert found.is_rounding


def test_what_rounding_explains_is_measured_on_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = wrap_model(copy.deepcopy(stock_model("llama")).to(torch.bfloat16), None, page_tokens=16)
    heard: list[list[int]] = []

    def own_noise(loaded: Any, ids: list[int]) -> float:
        heard.append(ids)
        return 0.05

    monkeypatch.setattr(noise, "own_noise", own_noise)
    found = batch_noise(loaded, rows=4, text=[3, 1, 4, 1, 5])
    assert heard == [[3, 1, 4, 1, 5] * 51 + [3]]
    assert found.tolerance == pytest.approx(4 * 0.05)
    monkeypatch.setattr(noise, "own_noise", lambda *_: 1.0)
    assert batch_noise(loaded, rows=4, text=[3, 1]).tolerance == 0.3, "a model that differs as a whole is not noisy"


def test_a_model_that_takes_positions_from_its_cache_shares_no_step() -> None:
    """The longest sequence's length is the only one that a cache of several tells."""
    config = transformers.BartConfig(
        vocab_size=257, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, decoder_ffn_dim=64,
        max_position_embeddings=2048, is_decoder=True, is_encoder_decoder=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BartForCausalLM(config).eval()
    loaded = wrap_model(model, None, page_tokens=16)
    assert not batch_noise(loaded, rows=4).is_rounding
