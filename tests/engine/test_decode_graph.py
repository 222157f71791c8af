"""The step of fixed addresses: as it is on any device (``uncaptured``), replayed as a CUDA graph on a GPU."""

import copy

import pytest
import torch
from compressed_tiny import random_model
from masked import masking
from reads_back import ReadsBack
from sequences import prefilled
from sessions import Single
from tiny_models import build_stock, loaded_model, prompt_ids

from kvscope.errors import UsageError
from kvscope.harness.backends.deepseek_v4 import one_step
from kvscope.harness.engine import decode_graph, static_stock
from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.models import wrap_model
from kvscope.harness.engine.prefill import prefill
from kvscope.methods import attention, resident
from kvscope.methods.attention import Partial
from kvscope.methods.kernels.host_gather import kernel as gather_kernel
from kvscope.methods.kernels.index_topk import kernel as topk_kernel
from kvscope.methods.kernels.select import kernel as select_kernel
from kvscope.methods.lsa import sequence as lsa_sequence
from kvscope.methods.lsa import slots
from kvscope.methods.registry import create_method
from kvscope.methods.sliding_window import sequence as streaming

SYNTHETIC = "lsa:selection=synthetic"
RESIDENT = [
    "dense",
    "sliding_window:window=20",
    "recency:recency_tokens=40",
    "random:chunk_tokens=5,recency_tokens=7,fraction=0.3",
]
LSA = [
    f"{SYNTHETIC},budget_fraction=0.5,tau=1,chunk_tokens=16,recency_tokens=20",
    f"{SYNTHETIC},budget_fraction=0.6,tau=4,chunk_tokens=12,recency_tokens=7,sink_tokens=0",
    f"{SYNTHETIC},budget_tokens=90,tau=1000,chunk_tokens=32,recency_tokens=0",
    f"{SYNTHETIC},budget_fraction=0.7,tau=3,chunk_tokens=5,refresh=stale1,recency_tokens=10",
    f"{SYNTHETIC},budget_fraction=0.4,tau=2,chunk_tokens=16,refresh=stale1,recency_tokens=16",
    f"{SYNTHETIC},budget_tokens=0,tau=2,chunk_tokens=16,recency_tokens=16",
]
#: Sets that differ by head, and layers of unequal size.
EVICTION = ["pyramidkv:budget_tokens=40,window_tokens=6,beta=4"]
#: Stores in fewer bits; pages of 16 fill, and are packed, within the steps.
PACKED = ["dense:kv=int8", "recency:recency_tokens=150,kv=fp8", f"{LSA[0]},kv=int4", f"{EVICTION[0]},kv=kivi2"]
FAMILIES = ["llama", "qwen3", "smollm3", "gemma3", "afmoe"]


def run(loaded, spec, prompt, tokens, *, reserve_tokens=None, method=None, **options):
    """Logits of every step, then what the session knows at the end."""
    method = create_method(spec) if method is None else method
    reserve_tokens = len(tokens) if reserve_tokens is None else reserve_tokens
    with Single(loaded, method, prompt, reserve_tokens=reserve_tokens, **options) as session:
        logits = torch.stack([session.step(token).float().cpu() for token in tokens])
        sequence = session.sequence
        return logits, sequence.residency(), sequence.footprint(), session


LENGTHS_TOKENS = [10, 150, 160]
#: Each method on each family, and each of both at each length.
EVERY_PAIR = [
    (family, spec, LENGTHS_TOKENS[(i + j) % len(LENGTHS_TOKENS)])
    for i, family in enumerate(FAMILIES)
    for j, spec in enumerate([*RESIDENT, *LSA])
]


@pytest.mark.parametrize(("family", "spec", "n_tokens"), EVERY_PAIR)
def test_fixed_addresses_change_nothing(family, spec, n_tokens):
    loaded = loaded_model(family)
    prompt = prefilled(loaded, prompt_ids(n_tokens), [spec], chunk_tokens=64, seed=4)
    # From 10 tokens past the window of the sliding layers, and the ring's 32 places; from others past a page.
    tokens = prompt_ids(24 if n_tokens == 10 else 18, seed=8)
    eager, record, footprint, _ = run(loaded, spec, prompt, tokens)
    fixed, fixed_record, fixed_footprint, session = run(loaded, spec, prompt, tokens, decode_graph="uncaptured")
    torch.testing.assert_close(fixed, eager, atol=2e-5, rtol=0)
    assert fixed_record == record
    assert fixed_footprint.bytes_read_per_step == footprint.bytes_read_per_step
    assert fixed_footprint.host_bytes == footprint.host_bytes
    assert session.captures == 0


@pytest.mark.parametrize("spec", ["dense", LSA[0], "snapkv:budget_tokens=32,window_tokens=6"])
def test_pages_grow_past_the_reserve(spec):
    loaded = loaded_model("llama")
    prompt = prefilled(loaded, prompt_ids(160), [spec])
    tokens = prompt_ids(20, seed=8)
    eager, *_ = run(loaded, spec, prompt, tokens, reserve_tokens=0)
    fixed, _, _, session = run(loaded, spec, prompt, tokens, reserve_tokens=0, decode_graph="uncaptured")
    torch.testing.assert_close(fixed, eager, atol=1e-5, rtol=0)
    assert session.sequence.static_version == 2  # the first token found no page, the seventeenth neither


@pytest.mark.parametrize("name", ["dense", LSA[0]])
def test_a_prompt_of_one_token(name):
    loaded = loaded_model("afmoe")
    prompt = prefilled(loaded, [], [name])
    eager, *_ = run(loaded, name, prompt, prompt_ids(30, seed=8))
    fixed, *_ = run(loaded, name, prompt, prompt_ids(30, seed=8), decode_graph="uncaptured")
    torch.testing.assert_close(fixed, eager, atol=2e-5, rtol=0)


def test_on_a_cpu_auto_is_eager_and_says_why_and_on_is_refused():
    loaded = wrap_model(copy.deepcopy(build_stock("llama")).cpu(), None, page_tokens=16)
    prompt = prefilled(loaded, prompt_ids(40), ["dense"])
    result = decode(loaded, create_method("dense"), prompt, [3], max_new_tokens=2, decode_graph="auto")
    assert result.step_backend == "eager: the device is cpu"
    assert (result.captures, result.capture_s) == (0, 0.0)
    with pytest.raises(UsageError, match="cannot be a CUDA graph here: the device is cpu"):
        decode(loaded, create_method("dense"), prompt, [3], max_new_tokens=2, decode_graph="on")


@pytest.mark.parametrize(("family", "spec", "reason"), [
    ("llama", "quest", "a step that chooses blocks needs the kernels"),
    ("llama", "lsa:indexer=attention,chunk_tokens=16,recency_tokens=16", "chosen by the attention of the step itself"),
    ("gpt_oss", "dense", "which experts a token goes to"),
])  # fmt: skip
def test_every_step_that_cannot_be_fixed_says_why(family, spec, reason):
    loaded = loaded_model(family)
    prompt = prefilled(loaded, prompt_ids(100), [spec])
    with pytest.raises(UsageError, match=reason):
        run(loaded, spec, prompt, [3], decode_graph="uncaptured")
    _, _, _, session = run(loaded, spec, prompt, [3], decode_graph="auto")
    assert reason in session.step_backend


def test_a_masked_sequence_is_not_fixed():
    loaded = loaded_model("llama")
    prompt = prefilled(loaded, prompt_ids(100), ["recency"])
    for spec in ("recency", LSA[0]):
        prompt = prefilled(loaded, prompt_ids(100), [spec])
        with pytest.raises(UsageError, match=r"masked|counts that only the host knows"):
            run(loaded, spec, prompt, [3], method=masking(create_method(spec)), decode_graph="uncaptured")


def test_positions_computed_from_the_host_are_a_reason():
    model = copy.deepcopy(build_stock("llama"))
    loaded = wrap_model(model, None, page_tokens=16)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "longrope"}
    sequence = create_method("dense").open(prefilled(loaded, prompt_ids(40), ["dense"]), "cpu")
    assert decode_graph.static_reasons(loaded, sequence) == [
        "rotary positions of type longrope are computed from the host"
    ]


@pytest.mark.parametrize("spec", ["dense", "sliding_window:window=20", LSA[0]])
@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "qwen2", "phi3", "olmo2"])
def test_nothing_in_a_fixed_step_reads_back(family, spec, monkeypatch):
    """Attention aside, whose kernel reads counts on the device: the models' own forwards, hooks and caches."""
    no_tokens = Partial(torch.zeros(1), torch.zeros(1))
    monkeypatch.setattr(streaming, "stored_partial", lambda q_BQ1D, store, **options: no_tokens)
    monkeypatch.setattr(streaming, "merge_partials", lambda parts, q_BQ1D, **options: torch.zeros_like(q_BQ1D))
    for module in (resident, lsa_sequence, static_stock):
        monkeypatch.setattr(module, "stored_attention", lambda call, stores: torch.zeros_like(call.query))
    loaded = loaded_model(family)
    prompt = prefilled(loaded, prompt_ids(160), [spec])
    with Single(
        loaded, create_method(spec), prompt, reserve_tokens=2, decode_graph="uncaptured"
    ) as session, ReadsBack() as seen, torch.inference_mode():  # fmt: skip
        session.session._step._forward()
    assert seen.found == []


def test_what_reads_back_is_seen():
    with ReadsBack() as seen:
        float(torch.ones(1))
        torch.ones(3).nonzero()
    assert len(seen.found) == 2


def kernels_in_the_interpreter(monkeypatch):
    """Let the fixed step and its refresh run the kernels on the CPU, as they do on a GPU."""
    monkeypatch.setattr(attention, "kernel_runs", lambda q_BQ1D, pages: True)
    for name in ("select", "diff", "apply", "write_table"):
        monkeypatch.setattr(slots.ops, name, getattr(select_kernel, name))

    def gather(self, chunks, chunk_slots, n):
        layers_L2 = gather_kernel.layer_distances(self._mirrors, self._slots)
        options = {"layers_L2": layers_L2, "units_per_chunk": self._per_chunk, "n_programs": 3}
        gather_kernel.gather(self._mirrors[0], self._slots[0], chunks, chunk_slots, n, **options)

    monkeypatch.setattr(slots.LayersGather, "__call__", gather)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here: the tests of replays run them")
@pytest.mark.parametrize("spec", [
    "dense",
    "sliding_window:window=20",
    f"{SYNTHETIC},budget_fraction=0.5,tau=2,chunk_tokens=16,recency_tokens=20",
    f"{SYNTHETIC},budget_fraction=0.6,tau=2,chunk_tokens=12,recency_tokens=7,refresh=stale1",
])  # fmt: skip
def test_the_kernels_run_a_fixed_step(spec, monkeypatch):
    """Counts, tables, lists and slots as the kernels take them, in Triton's interpreter."""
    loaded = loaded_model("afmoe")
    prompt = prefilled(loaded, prompt_ids(120), [spec], chunk_tokens=64)
    tokens = prompt_ids(5, seed=8)
    eager, record, *_ = run(loaded, spec, prompt, tokens)
    kernels_in_the_interpreter(monkeypatch)
    fixed, fixed_record, *_ = run(loaded, spec, prompt, tokens, decode_graph="uncaptured")
    torch.testing.assert_close(fixed, eager, atol=2e-4, rtol=0)
    assert fixed_record == record


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here: the tests of replays run them")
@pytest.mark.parametrize("spec", ["dense", f"{SYNTHETIC},recency_tokens=40,budget_fraction=0.5,tau=4"])
def test_the_native_topk_runs_a_fixed_step_of_deepseek_v4(spec, monkeypatch):
    loaded = wrap_model(random_model(), None, name="tiny")
    prompt = prefill(loaded, prompt_ids(403), chunk_tokens=100)
    tokens, calls = prompt_ids(9, seed=8), []
    eager, record, *_ = run(loaded, spec, prompt, tokens)

    def counted(*arguments, **options):
        calls.append(options["k"])
        return topk_kernel.index_topk(*arguments, **options)

    monkeypatch.setattr(one_step, "index_topk", counted)
    fixed, fixed_record, *_ = run(loaded, spec, prompt, tokens, decode_graph="uncaptured")
    torch.testing.assert_close(fixed, eager, atol=2e-5, rtol=0)
    assert fixed_record == record
    assert calls == [24] * 2 * 10  # two layers, nine steps and the trial run


# -- on a GPU


def gpu_model(family, dtype):
    return wrap_model(copy.deepcopy(build_stock(family)).to("cuda", dtype), None, page_tokens=16)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [*RESIDENT, *LSA, *EVICTION, *PACKED])
@pytest.mark.parametrize("family", ["llama", "afmoe"])
def test_replays_give_the_eager_logits(family, spec):
    loaded = gpu_model(family, torch.float32)
    prompt = prefilled(loaded, prompt_ids(300), [spec], chunk_tokens=64, seed=4)
    tokens = prompt_ids(40, seed=8)
    eager, record, footprint, _ = run(loaded, spec, prompt, tokens)
    replayed, replayed_record, replayed_footprint, session = run(loaded, spec, prompt, tokens, decode_graph="on")
    assert session.step_backend == "cuda graph"
    assert session.captures == 1
    torch.testing.assert_close(replayed, eager, atol=1e-3, rtol=0)
    assert torch.equal(replayed.argmax(1), eager.argmax(1))
    assert replayed_record == record
    assert replayed_footprint.bytes_read_per_step == footprint.bytes_read_per_step


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [*RESIDENT, LSA[2], *PACKED[:2]])  # one choice: rounding may not lead to another
@pytest.mark.parametrize("family", ["llama", "afmoe"])
def test_replays_give_the_eager_logits_in_bf16(family, spec):
    loaded = gpu_model(family, torch.bfloat16)
    prompt = prefilled(loaded, prompt_ids(300), [spec], chunk_tokens=64, seed=4)
    tokens = prompt_ids(40, seed=8)
    eager, *_ = run(loaded, spec, prompt, tokens)
    replayed, *_ = run(loaded, spec, prompt, tokens, decode_graph="on")
    # One kernel over the same pages gives the same bits; chunks in another order, or a ring, another order of sums.
    exact = family == "llama" and not any(name in spec for name in ("lsa", "sliding", "kv="))
    tolerance = 1e-3 if exact else 0.05 * float(eager.abs().max())
    torch.testing.assert_close(replayed, eager, atol=tolerance, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["dense", LSA[0], LSA[4]])
def test_greedy_tokens_are_the_eager_ones(spec):
    loaded = gpu_model("llama", torch.float32)
    prompt = prefilled(loaded, prompt_ids(300), [spec], chunk_tokens=64)
    method, options = create_method(spec), {"max_new_tokens": 48, "stop_at_eos": False}
    eager = decode(loaded, method, prompt, [5], **options)
    replayed = decode(loaded, method, prompt, [5], **options, decode_graph="on")
    assert replayed.ids == eager.ids
    assert replayed.bytes_recalled == eager.bytes_recalled
    assert replayed.capture_s > 0


@pytest.mark.gpu
def test_a_pool_that_moves_is_captured_again():
    loaded = gpu_model("llama", torch.float32)
    prompt = prefilled(loaded, prompt_ids(160), ["dense"])
    tokens = prompt_ids(40, seed=8)
    eager, *_ = run(loaded, "dense", prompt, tokens, reserve_tokens=0)
    replayed, _, _, session = run(loaded, "dense", prompt, tokens, reserve_tokens=0, decode_graph="on")
    torch.testing.assert_close(replayed, eager, atol=1e-3, rtol=0)
    assert session.captures == 3


@pytest.mark.gpu
def test_a_second_capture_takes_its_memory_from_the_first():
    """What a capture reserves stays with the model, and the next capture finds it there."""
    loaded = gpu_model("llama", torch.bfloat16)
    prompt = prefilled(loaded, prompt_ids(300), ["dense"])
    reserved = []
    for _ in range(4):
        run(loaded, "dense", prompt, [3, 4], decode_graph="on")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1:] == [reserved[1]] * 3


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_an_eager_session(monkeypatch):
    loaded = gpu_model("llama", torch.float32)
    prompt = prefilled(loaded, prompt_ids(160), ["dense"])
    tokens = prompt_ids(6, seed=8)
    eager, *_ = run(loaded, "dense", prompt, tokens)
    before = torch.cuda.current_stream()
    forward = decode_graph.GraphStep._forward

    def reading_back(self):
        logits = forward(self)
        float(logits[0, 0])
        return logits

    monkeypatch.setattr(decode_graph.GraphStep, "_forward", reading_back)
    logits, _, _, session = run(loaded, "dense", prompt, tokens, decode_graph="auto")
    assert session.step_backend.startswith("eager: the model's step cannot be captured (")
    assert torch.equal(logits, eager)
    assert torch.cuda.current_stream() == before
    torch.randn(3, device="cuda")  # the default generator is out of the capture, too
