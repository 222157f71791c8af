"""DeepSeek-V4's step of fixed addresses gives what its eager step does; on a GPU it is captured and replayed."""

import pytest
import torch
from compressed_tiny import random_model
from kernel_tools import DEVICE
from reads_back import ReadsBack
from sessions import Single
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as stock

from kvscope.harness.backends.deepseek_v4 import one_step as stand_ins
from kvscope.harness.backends.deepseek_v4.one_step import experts_name, mixing, normed, one_step, rotated
from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.models import wrap_model
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.reference_model.v4.architecture import v4_config
from kvscope.methods.registry import create_method

N_STEPS = 20  # five entries of 4 tokens, and one of 32
SYNTHETIC = "lsa:selection=synthetic,recency_tokens=40"
SPECS = [
    "dense",
    "recency:recency_tokens=40",
    "random:fraction=0.3,recency_tokens=40",
    f"{SYNTHETIC},budget_fraction=0.5,tau=4",
    f"{SYNTHETIC},budget_fraction=0.5,tau=7,refresh=stale1",
    "lsa:selection=synthetic,recency_tokens=0,sink_tokens=0,budget_tokens=0",
]
TRAINED = [
    "recency_tokens=40,tau=4",
    "recency_tokens=40,tau=3,refresh=stale1",
    "recency_tokens=40,tau=4,threshold=0.6,fallback_ratio=0.3",
    "recency_tokens=40,tau=4,policy=pages,page_tokens=16,pages=6",
    "recency_tokens=40,tau=4,policy=pages,page_tokens=16,pages=6,refresh=sync",
]


def run(loaded, spec, prompt, tokens, *, decode_graph, reserve_tokens=N_STEPS):
    """Logits of every step; then residency, footprint, bytes by kind, version of the addresses and how steps ran."""
    method = create_method(spec)
    with Single(loaded, method, prompt, reserve_tokens=reserve_tokens, decode_graph=decode_graph) as session:
        logits = torch.stack([session.step(token).float().cpu().clone() for token in tokens])  # overwritten by the next
        held = session.sequence
        seen = held.residency(), held.footprint(), held.bytes_by_kind(), held.static_version, session.step_backend
    return logits, *seen


def both(loaded, spec, prompt, tokens, **options):
    """Eager steps, and one that was recorded at its capture: as in a CUDA graph its operations alone are done again."""
    eager = run(loaded, spec, prompt, tokens, decode_graph="off", **options)
    static = run(loaded, spec, prompt, tokens, decode_graph="recorded", **options)
    torch.testing.assert_close(static[0], eager[0], atol=2e-5, rtol=0)
    assert static[1] == eager[1]
    assert static[2].without_spare().kv_bytes == eager[2].kv_bytes
    assert static[2].host_bytes == eager[2].host_bytes
    assert static[2].metadata_bytes == eager[2].metadata_bytes
    return eager, static


@pytest.mark.parametrize("spec", SPECS)
def test_fixed_addresses_change_nothing(loaded, prompt, ids, spec):
    eager, static = both(loaded, spec, prompt, ids[:N_STEPS])
    assert static[4] == 0
    if spec != "dense":
        dense = run(loaded, "dense", prompt, ids[:3], decode_graph="off")[0]
        assert (dense - static[0][:3]).abs().max() > 1e-2
    # Entries outside the top-k are read by the eager step and not by this one.
    assert static[2].bytes_read_per_step <= eager[2].bytes_read_per_step


@pytest.mark.parametrize("options", TRAINED)
def test_what_an_indexer_chooses_is_the_same(loaded, prompt, ids, weights, options):
    _, static = both(loaded, f"lsa:indexer={weights},{options}", prompt, ids[:N_STEPS])
    resident = static[1].resident_tokens
    assert len(resident) == -(-N_STEPS // static[1].tau)
    if "pages" not in options:  # sets of many sizes
        assert len(set(resident)) > 3


@pytest.mark.parametrize("n_tokens", [0, 1, 3, 4, 31, 32, 33, 130])
def test_prompts_that_end_anywhere(loaded, ids, n_tokens):
    """Within an entry of either kind, at its end, before the first one and before the window is full."""
    prompt = prefill(loaded, ids[:n_tokens], chunk_tokens=64)
    both(loaded, SPECS[3], prompt, ids[200:234])


@pytest.mark.parametrize("spec", ["dense", SPECS[3]])
def test_buffers_grow_past_the_reserve(loaded, prompt, ids, spec):
    _, static = both(loaded, spec, prompt, ids[:N_STEPS], reserve_tokens=0)
    assert static[4] >= 2


def test_a_set_that_outgrows_its_room_moves(loaded, prompt, ids, weights):
    """A fallback makes everything resident; one that fits again stays where it is."""
    spec = f"lsa:indexer={weights},recency_tokens=40,tau=2,threshold=0.6,fallback_ratio=0.2"
    _, static = both(loaded, spec, prompt, ids[:N_STEPS])
    assert static[1].fallbacks > 0
    assert static[4] == 1


def test_bytes_are_the_live_tensors(loaded, prompt, ids):
    """Everything that is reserved is there from the first step on, and nothing else comes."""
    first = run(loaded, "dense", prompt, ids[:1], decode_graph="uncaptured")
    last = run(loaded, "dense", prompt, ids[:N_STEPS], decode_graph="uncaptured")
    assert first[3] == last[3]
    assert first[2].kv_bytes == sum(first[3].values())
    cache, n = loaded.shape.cache, prompt.n_tokens + N_STEPS
    assert last[3]["csa_kv"] == cache.n_csa * (n // 4 + 1) * cache.entry_bytes
    assert last[3]["indexer_keys"] == cache.n_csa * (n // 4 + 1) * cache.key_bytes
    assert last[3]["hca_kv"] == cache.n_hca * (n // 32 + 1) * cache.entry_bytes
    assert last[3]["window"] == 6 * cache.window_tokens * cache.window_entry_bytes


def test_the_small_reference_architecture():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(v4_config(vocab_size=600), attn_implementation="eager").eval()
    loaded = wrap_model(model, None, name="small")
    ids = torch.randint(2, 500, (140,), generator=torch.Generator().manual_seed(1)).tolist()
    prompt = prefill(loaded, ids[:120], chunk_tokens=64)
    for spec in ("dense", f"{SYNTHETIC},budget_fraction=0.6,tau=8"):
        both(loaded, spec, prompt, ids[120:])


def test_experts_chosen_by_the_token():
    """Hash routing reads the token."""
    model = random_model(mlp_layer_types=["hash_moe"] * 2 + ["moe"] * 4)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            buffer.copy_(torch.stack([torch.randperm(4)[:2] for _ in range(len(buffer))]))
    loaded = wrap_model(model, None, name="hashed")
    ids = torch.randint(2, 500, (130,), generator=torch.Generator().manual_seed(1)).tolist()
    both(loaded, "dense", prefill(loaded, ids[:110], chunk_tokens=64), ids[110:])


def test_in_bf16_a_fixed_step_is_no_further_from_fp32_than_an_eager_one():
    ids = torch.randint(2, 500, (180,), generator=torch.Generator().manual_seed(1)).tolist()
    exact = wrap_model(random_model(hc_sinkhorn_iters=20), None, name="whole")
    half = wrap_model(random_model(hc_sinkhorn_iters=20).to(torch.bfloat16), None, name="half")
    logits = [
        run(loaded, "dense", prefill(loaded, ids[:110], chunk_tokens=64), ids[110:], decode_graph=mode)[0]
        for loaded, mode in ((exact, "off"), (half, "off"), (half, "uncaptured"))
    ]
    eager, static = ((each - logits[0]).abs().amax(1).mean() for each in logits[1:])
    assert 0 < static < 1.25 * eager < 0.3 * logits[0].abs().max()


@pytest.mark.parametrize("spec", ["dense", SPECS[3]])
def test_nothing_in_a_fixed_step_reads_back(loaded, prompt, ids, spec):
    with Single(loaded, create_method(spec), prompt, reserve_tokens=4, decode_graph="uncaptured") as session:
        session.step(ids[0])
        # In inference mode a composite operation is one, whatever it does inside; a set that was recalled there stays.
        mode = torch.no_grad() if spec == "dense" else torch.inference_mode()
        with ReadsBack() as seen, mode:
            session.session._step._forward()
    assert seen.found == []


def test_a_step_that_runs_twice_leaves_what_it_leaves_once(loaded, prompt, ids):
    """A capture is preceded by a trial run, at every position: at the ends of entries, too."""
    once = run(loaded, SPECS[3], prompt, ids[:40], decode_graph="uncaptured")[0]
    with Single(loaded, create_method(SPECS[3]), prompt, reserve_tokens=N_STEPS, decode_graph="uncaptured") as session:
        twice = []
        for token in ids[:40]:
            session.session._step.prepare()
            twice.append(session.step(token))
    assert torch.equal(torch.stack(twice), once)


def test_the_model_is_as_before_afterwards(loaded):
    before = [dict(vars(module)) for module in loaded.model.modules()]
    implementation, rotary = loaded.model.config._attn_implementation, stock.apply_rotary_pos_emb
    with one_step(loaded.model):
        assert loaded.model.config._attn_implementation != implementation
    with pytest.raises(IndexError), one_step(loaded.model):
        [].pop()
    assert stock.apply_rotary_pos_emb is rotary
    assert loaded.model.config._attn_implementation == implementation
    assert [list(vars(module)) for module in loaded.model.modules()] == [list(each) for each in before]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_rotations_are_the_stock_ones(dtype):
    draws = torch.Generator().manual_seed(5)
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}
    x = torch.randn(1, 1, 4, 32, generator=draws).to(dtype).transpose(1, 2)
    weighted, plain = stock.DeepseekV4RMSNorm(32).to(dtype), stock.DeepseekV4UnweightedRMSNorm()
    with torch.no_grad():
        weighted.weight.copy_(torch.randn(32, generator=draws))
        for norm in (weighted, plain):
            torch.testing.assert_close(normed(norm, x), norm(x), **tolerance)
    cos, sin = (torch.randn(1, 1, 8, generator=draws).to(dtype) for _ in range(2))
    for at in (1, 2):
        expected = stock.apply_rotary_pos_emb(x, cos, sin, at)
        torch.testing.assert_close(rotated(x, cos, sin, at), expected, **tolerance)
        assert torch.equal(rotated(x, cos, sin, at)[..., :16], x[..., :16])


@pytest.mark.parametrize("streams", [1, 2, 4])
def test_streams_are_mixed_as_by_the_stock_module(streams):
    mixer = random_model(hc_mult=streams).model.layers[0].attn_hc
    hidden = torch.randn(1, 1, streams, 64, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        for found, expected in zip(mixing(mixer, hidden), mixer(hidden), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_three_streams_stay_the_stock_modules_own():
    loaded = wrap_model(random_model(hc_mult=3), None, name="three")
    ids = torch.randint(2, 500, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    both(loaded, "dense", prefill(loaded, ids[:40], chunk_tokens=64), ids[40:])


@pytest.mark.parametrize("name", ["batched_mm", "grouped_mm"])
def test_experts_that_wait_for_nothing_give_what_the_stock_loop_does(name):
    """Every token's experts one after the other, as the stock class has them, against the form that is captured."""
    model = random_model()
    experts, router = model.model.layers[0].mlp.experts, model.model.layers[0].mlp.gate
    hidden = torch.randn(9, 64, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        _, weights, chosen = router(hidden)
        model.set_experts_implementation("eager")
        expected = experts(hidden, chosen, weights)
        found = stand_ins.ALL_EXPERTS_FUNCTIONS[name](experts, hidden, chosen, weights)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert len(chosen.unique()) > 2


def test_a_row_says_how_steps_ran(loaded, prompt, ids):
    result = decode(loaded, create_method("dense"), prompt, ids[:1], max_new_tokens=3, decode_graph="auto")
    if DEVICE.type == "cpu":
        assert result.step_backend == "eager: the device is cpu"
    with Single(loaded, create_method("dense"), prompt, reserve_tokens=4, decode_graph="uncaptured") as session:
        topk, attention, experts = session.sequence.backends()
    assert topk.startswith("torch: native top-k (the device is cpu")
    assert attention == "attention to the entries it chose"
    assert experts == "experts: batched_mm"
    assert experts_name(torch.device("cpu"), torch.bfloat16) == "batched_mm"


# -- on a GPU


@pytest.fixture(scope="module")
def on_gpu():
    def made(dtype, **changes):
        return wrap_model(random_model(**changes).to("cuda", dtype), None, name="tiny")

    return made


@pytest.mark.gpu
@pytest.mark.parametrize("spec", SPECS)
def test_replays_give_the_eager_logits(on_gpu, ids, spec):
    loaded = on_gpu(torch.float32)
    prompt = prefill(loaded, ids[:-1], chunk_tokens=100)
    eager = run(loaded, spec, prompt, ids[:N_STEPS], decode_graph="off")
    replayed = run(loaded, spec, prompt, ids[:N_STEPS], decode_graph="on")
    assert replayed[5] == "cuda graph"
    torch.testing.assert_close(replayed[0], eager[0], atol=1e-3, rtol=0)
    assert torch.equal(replayed[0].argmax(1), eager[0].argmax(1))
    assert replayed[1] == eager[1]


@pytest.mark.gpu
@pytest.mark.parametrize("options", TRAINED)
def test_replays_follow_an_indexer(on_gpu, ids, weights, options):
    loaded = on_gpu(torch.float32)
    prompt = prefill(loaded, ids[:-1], chunk_tokens=100)
    spec = f"lsa:indexer={weights},{options}"
    eager = run(loaded, spec, prompt, ids[:N_STEPS], decode_graph="off")
    replayed = run(loaded, spec, prompt, ids[:N_STEPS], decode_graph="on")
    torch.testing.assert_close(replayed[0], eager[0], atol=1e-3, rtol=0)
    assert replayed[1] == eager[1]


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["dense", SPECS[1]])
def test_replays_in_bf16(on_gpu, ids, spec):
    """Experts in the form that is captured in bf16: not one bit is another than without a graph.

    A rounding sends a token to another expert now and then, so single logits of eager steps are as far from fp32's as
    half of the largest. Replays are to be as near to fp32 as eager steps are, and nearer to these than to fp32.
    """
    exact_model, loaded = on_gpu(torch.float32), on_gpu(torch.bfloat16)
    exact = run(exact_model, spec, prefill(exact_model, ids[:-1], chunk_tokens=100), ids[:N_STEPS], decode_graph="off")
    prompt = prefill(loaded, ids[:-1], chunk_tokens=100)
    found = {
        graph: run(loaded, spec, prompt, ids[:N_STEPS], decode_graph=graph) for graph in ("off", "uncaptured", "on")
    }
    assert found["on"][5] == "cuda graph"
    replayed, eager = found["on"][0], found["off"][0]
    assert torch.equal(replayed, found["uncaptured"][0])

    def off(these, those):
        return ((these - those).abs().amax(1) / exact[0].abs().max()).median()

    assert off(replayed, eager) < 0.05
    assert off(replayed, eager) < off(eager, exact[0])
    assert off(replayed, exact[0]) < 1.25 * off(eager, exact[0])


@pytest.mark.gpu
def test_greedy_tokens_are_the_eager_ones(on_gpu, ids):
    loaded = on_gpu(torch.float32)
    prompt = prefill(loaded, ids[:-1], chunk_tokens=100)
    options = {"max_new_tokens": 48, "stop_at_eos": False}
    method = create_method(SPECS[3])
    eager = decode(loaded, method, prompt, ids[-1:], **options)
    replayed = decode(loaded, method, prompt, ids[-1:], **options, decode_graph="on")
    assert replayed.ids == eager.ids
    assert replayed.bytes_recalled == eager.bytes_recalled
    assert replayed.captures == 1
    assert replayed.backends[0] == "triton: index_topk"
