"""DeepSeek-V4 under a resident set: stock with everything resident, masks without, bytes as the formula."""

import pytest
import torch
from compressed_plain import plain_logits
from compressed_tiny import N_NEW, N_TOKENS, masked, random_model
from sessions import Single
from tiny_models import cache_kwarg
from transformers import DynamicCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING

from kvscope.errors import UsageError
from kvscope.harness.backends.deepseek_v4.cache import ResidentCSA
from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.models import wrap_model
from kvscope.harness.engine.prefill import prefill
from kvscope.methods.compressed_bytes import stock_shape
from kvscope.methods.lsa.compressed import stored_keys
from kvscope.methods.registry import create_method

LSA = "lsa:selection=synthetic,recency_tokens=40"
SPARSE = [
    "recency:recency_tokens=40",
    "recency:budget_bytes=9000",
    "random:fraction=0.3,recency_tokens=40",
    f"{LSA},budget_fraction=0.5,tau=4",
    f"{LSA},budget_fraction=0.3,tau=1",
    f"{LSA},budget_fraction=0.5,tau=999",
    "lsa:selection=synthetic,recency_tokens=0,sink_tokens=0,budget_tokens=0",
]


def session(loaded, spec, prompt, n_steps=N_NEW + 1):
    return Single(loaded, create_method(spec), prompt, reserve_tokens=n_steps)


def logits_of(loaded, spec, prompt, tokens):
    with session(loaded, spec, prompt, len(tokens)) as running:
        return torch.stack([running.step(token) for token in tokens])


@pytest.fixture(scope="module")
def answer(stock_model, ids):
    """What stock generate says, with its own cache and its own attention."""
    out = stock_model.generate(torch.tensor([ids]), max_new_tokens=N_NEW, do_sample=False)
    return out[0, len(ids) :].tolist()


def test_everything_resident_generates_what_stock_generates(loaded, whole_prompt, ids, answer):
    result = decode(loaded, create_method("dense"), whole_prompt, ids[-1:], max_new_tokens=N_NEW)
    assert result.ids == answer
    assert len(set(answer)) > 3


@pytest.mark.parametrize(
    "spec", ["dense", f"{LSA},budget_fraction=1.0,tau=4", "random:fraction=1.0,chunk_tokens=4", "random:fraction=1.0"]
)
def test_logits_with_everything_resident_are_stock_bit_for_bit(loaded, stock_model, whole_prompt, ids, answer, spec):
    tokens = [ids[-1], *answer]
    with torch.inference_mode():
        cache = DynamicCache(config=stock_model.config)
        stock_model(torch.tensor([ids[:-1]]), **cache_kwarg(stock_model, cache), use_cache=True)
        steps = [
            stock_model(torch.tensor([[token]]), **cache_kwarg(stock_model, cache), use_cache=True) for token in tokens
        ]
        expected = torch.stack([step.logits[0, -1] for step in steps])
    assert torch.equal(logits_of(loaded, spec, whole_prompt, tokens), expected)


@torch.inference_mode()
def test_stock_generate_over_our_cache_is_stock_generate_bit_for_bit(loaded, stock_model, whole_prompt, ids):
    options = {"max_new_tokens": N_NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    theirs = DynamicCache(config=stock_model.config)
    stock_model(torch.tensor([ids[:-1]]), **cache_kwarg(stock_model, theirs), use_cache=True)
    expected = stock_model.generate(torch.tensor([ids]), **cache_kwarg(stock_model, theirs), **options)
    with session(loaded, "dense", whole_prompt) as running:
        cache = running.sequence.model_cache
        ours = stock_model.generate(torch.tensor([ids]), **cache_kwarg(stock_model, cache), **options)
    assert torch.equal(ours.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.logits, expected.logits, strict=True))


def test_a_second_sequence_is_refused_and_the_first_goes_on(loaded, whole_prompt, ids, answer):
    """The stock cache holds one sequence."""
    with session(loaded, "dense", whole_prompt) as running:
        with pytest.raises(UsageError, match="brings its own cache, which holds one sequence"):
            running.session.add(create_method("dense"), whole_prompt, reserve_tokens=1)
        assert int(running.step(ids[-1]).argmax()) == answer[0]


def test_chunks_of_the_prefill_change_nothing(loaded, prompt, whole_prompt, ids, answer):
    for layer, tensors in whole_prompt.host.items():
        for name, entries in tensors.items():
            torch.testing.assert_close(prompt.host[layer][name], entries, atol=5e-5, rtol=1e-4)
    ours, theirs = (logits_of(loaded, "dense", made, [ids[-1], *answer]) for made in (prompt, whole_prompt))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("spec", SPARSE)
def test_evicting_equals_masking_and_differs_from_dense(loaded, prompt, ids, answer, spec):
    tokens = [ids[-1], *answer]
    physical, sets = [], []
    with session(loaded, spec, prompt) as running:
        for token in tokens:
            physical.append(running.step(token))
            sets.append({layer: cache.resident.clone() for layer, cache in running.sequence.layers.items()})
    simulated = []
    with session(loaded, "dense", prompt) as running:
        for token, resident in zip(tokens, sets, strict=True):
            kept = {layer: torch.zeros(prompt.n_entries, dtype=torch.bool) for layer in loaded.shape.layers}
            for layer, entries in resident.items():
                kept[layer][entries] = True
            with masked(loaded, kept):
                simulated.append(running.step(token))
    torch.testing.assert_close(torch.stack(physical), torch.stack(simulated), atol=1e-5, rtol=1e-5)
    dense = logits_of(loaded, "dense", prompt, tokens)
    assert (torch.stack(physical) - dense).abs().max() > 1e-2
    assert all(len(entries) < prompt.n_entries for resident in sets for entries in resident.values())


def test_the_native_top_k_acts_inside_the_resident_set(loaded, prompt, ids):
    """More entries are resident than the model's own indexer takes, and what it takes is among them."""
    taken = []
    indexer = loaded.model.model.layers[1].self_attn.compressor.indexer
    handle = indexer.register_forward_hook(lambda module, args, out: taken.append(out))
    with session(loaded, f"{LSA},budget_fraction=0.5", prompt) as running:
        running.step(ids[-1])
        held = running.sequence.layers[1].compressed_kv["compressor"].shape[1]
    handle.remove()
    assert taken[0].shape[-1] == loaded.model.config.index_topk < held < prompt.n_entries
    assert taken[0].min() >= 0
    assert taken[0].max() < held


def test_lsa_chooses_anew_every_tau_steps_and_recalls_only_what_is_new(loaded, prompt, ids, answer):
    with session(loaded, f"{LSA},budget_fraction=0.4,tau=5", prompt) as running:
        for token in [ids[-1], *answer]:
            running.step(token)
        sequence, residency = running.sequence, running.sequence.residency()
        assert len(residency.recalled_bytes) == -(-(1 + N_NEW) // 5)
        layers, entry_bytes = loaded.shape.layers, loaded.shape.cache.entry_bytes + loaded.shape.cache.key_bytes
        first = (residency.resident_tokens[0] - prompt.n_tokens % 4) // 4
        assert residency.recalled_bytes[0] == len(layers) * first * entry_bytes
        assert 0 < residency.hit_rate < 1
        chosen = first - len(sequence._fixed)
        missed = round((1 - residency.hit_rate) * chosen * (len(residency.recalled_bytes) - 1))
        assert sum(residency.recalled_bytes[1:]) == len(layers) * missed * entry_bytes
        assert sequence.bytes_recalled == sum(residency.recalled_bytes)
        assert sequence.footprint().host_bytes == prompt.host_bytes > 0


def test_a_refresh_keeps_what_the_plain_formula_scores_highest(loaded, prompt, ids, weights, request):
    """From the states that entered attention at the step before, at that step's position, max over the layers."""
    spec, tau = f"lsa:indexer={weights},recency_tokens=40,budget_fraction=0.4", 3
    method = loaded.backend.form_of(create_method(f"{spec},tau={tau}"), loaded.shape)
    states = {}
    hooks = [
        loaded.model.model.layers[layer].self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, layer=layer: states.update({layer: args[0][0, -1].clone()}),
            with_kwargs=True,
        )
        for layer in loaded.shape.layers
    ]
    cos, sin = prompt.angles(1)
    inv_freq = torch.atan2(sin, cos)
    layout, indexer = method.layout(prompt.n_tokens), method.compressed_indexer()
    refreshes = 0
    for hook in hooks:
        request.addfinalizer(hook.remove)
    with Single(loaded, method, prompt, reserve_tokens=9) as running:
        for step, token in enumerate(ids[:9]):
            before = dict(states)
            position = running.sequence.n_tokens - 1
            running.step(token)
            if step == 0 or step % tau:
                continue
            refreshes += 1
            scores = []
            for layer, weights in indexer.layers.items():
                codes, scale = stored_keys(prompt.host[layer]["indexer"][0, layout.first : layout.last])
                keys = codes.double() * scale[:, None]
                scores.append(plain_logits(weights, before[layer], position, keys, inv_freq))
            best = torch.stack(scores).amax(0)
            resident = running.sequence.layers[loaded.shape.layers[0]].resident
            chosen = resident[(resident >= layout.first) & (resident < layout.last)] - layout.first
            dropped = torch.ones(len(best), dtype=torch.bool)
            dropped[chosen] = False
            assert 0 < len(chosen) < len(best)
            assert best[chosen].min() > best[dropped].max() - 1e-5
    assert refreshes == 2


@pytest.mark.parametrize(("churn", "hit_rate"), [("0", 1.0), ("0.25", 0.75), ("1", 0.0)])
def test_a_synthetic_selection_replaces_the_share_that_was_asked_for(loaded, prompt, ids, churn, hit_rate):
    with session(loaded, f"{LSA},budget_fraction=0.4,tau=2,churn={churn}", prompt) as running:
        for token in ids[:7]:
            running.step(token)
        residency = running.sequence.residency()
    assert len(residency.recalled_bytes) == 4
    assert residency.hit_rate == pytest.approx(hit_rate, abs=0.03)


def test_a_full_choice_falls_back_and_is_counted(loaded, prompt, ids):
    with session(loaded, f"{LSA},budget_fraction=0.8,fallback_ratio=0.2,tau=2", prompt) as running:
        for token in ids[:4]:
            running.step(token)
        residency = running.sequence.residency()
    assert residency.fallbacks == 2
    assert residency.resident_tokens == (prompt.n_tokens, prompt.n_tokens)


@pytest.mark.parametrize("reserve", [0, 9])
def test_slots_hold_what_the_mirror_holds(prompt, reserve):
    layer = ResidentCSA.opened(prompt.rest.layers[1], prompt.host[1], torch.device("cpu"), reserve_entries=reserve)
    draws, decoded = torch.Generator().manual_seed(3), {name: [] for name in prompt.host[1]}
    for share in (0.5, 0.5, 0.0, 1.0, 0.2):
        chosen = (torch.rand(prompt.n_entries, generator=draws) < share).nonzero()[:, 0]
        before = set(layer.resident.tolist())
        copied = layer.set_resident(chosen)
        for name, host in prompt.host[1].items():
            decoded[name].append(torch.rand(1, 1, host.shape[2], generator=draws))
            layer.update_compressor_states(name, decoded[name][-1])
            assert torch.equal(layer.compressed_kv[name], torch.cat([host[:, chosen], *decoded[name]], 1))
        fresh = len(set(chosen.tolist()) - before)
        assert copied == fresh * sum(host.shape[2] * host.element_size() for host in prompt.host[1].values())
        assert layer.entry_count["compressor"] == prompt.n_entries + len(decoded["compressor"])


def test_a_fork_sees_nothing_of_another(loaded, prompt, ids, answer):
    spec, tokens = SPARSE[0], [ids[-1], *answer]
    first = logits_of(loaded, spec, prompt, tokens)
    logits_of(loaded, "dense", prompt, [7] * 9)
    assert torch.equal(first, logits_of(loaded, spec, prompt, tokens))


@pytest.mark.parametrize("n_tokens", [0, 3, 31, 33, 130, 401])
@pytest.mark.parametrize("spec", ["dense", "recency:recency_tokens=40", f"{LSA},budget_fraction=0.5,tau=4"])
def test_bytes_by_kind_are_the_formula_and_predicted(loaded, ids, spec, n_tokens):
    prompt = prefill(loaded, ids[:n_tokens], chunk_tokens=64)
    method = loaded.backend.form_of(create_method(spec), loaded.shape)
    cache = stock_shape(loaded.model.config, element_bytes=4)
    if n_tokens and spec == "dense":
        with session(loaded, spec, prompt, 0) as running:
            assert running.sequence.bytes_by_kind() == cache.by_kind(n_tokens)
            assert running.sequence.footprint() == method.predict(loaded.shape, n_tokens)
    for n_steps in (1, 34 - n_tokens % 32):  # past the ends of entries of 4 tokens and of one of 32
        result = decode(loaded, method, prompt, ids[:1], max_new_tokens=n_steps)
        total = n_tokens + n_steps
        resident = method.n_kept(n_tokens) + total // 4 - n_tokens // 4
        assert result.bytes_by_kind == cache.by_kind(total, n_resident_entries=resident, during_step=True)
        assert sum(result.bytes_by_kind.values()) == result.footprint_last.kv_bytes
        predicted = method.predict(loaded.shape, n_tokens, n_steps)
        assert result.footprint_mean.kv_bytes == pytest.approx(predicted.kv_bytes, abs=1)
        assert result.footprint_mean.metadata_bytes == predicted.metadata_bytes
        assert result.footprint_mean.host_bytes == predicted.host_bytes
        assert result.footprint_mean.bytes_read_per_step == pytest.approx(predicted.bytes_read_per_step, abs=1)
        assert result.footprint_mean.attention_flops_per_step == pytest.approx(
            predicted.attention_flops_per_step, abs=1
        )
        if spec == "dense":
            assert predicted.kv_bytes == loaded.shape.dense_kv_bytes(n_tokens, n_steps)


def test_bytes_of_a_bf16_model_are_the_formula_with_two_byte_elements(tmp_path, ids):
    from transformers import AutoModelForCausalLM

    random_model().save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    loaded = wrap_model(half, None, name="half")
    prompt = prefill(loaded, ids[:130], chunk_tokens=64)
    result = decode(loaded, create_method("dense"), prompt, ids[:1], max_new_tokens=7)
    cache = stock_shape(half.config, element_bytes=2)
    assert (cache.entry_bytes, cache.key_bytes) == (64, 32)
    assert result.bytes_by_kind == cache.by_kind(137, during_step=True)


def test_a_budget_in_bytes_is_kept_in_entries(loaded, prompt):
    method = loaded.backend.form_of(create_method("recency:budget_bytes=9000"), loaded.shape)
    entry_bytes = len(loaded.shape.layers) * (loaded.shape.cache.entry_bytes + loaded.shape.cache.key_bytes)
    # The window may begin inside an entry, which is kept whole.
    assert 0 <= method.n_kept(prompt.n_tokens) - 9000 // entry_bytes <= 1


def test_the_stock_layer_types_are_left_alone():
    assert DYNAMIC_LAYER_TYPE_MAPPING["compressed_sparse_attention"].__name__ == "DeepseekV4CSACache"


def test_the_prompt_is_long_enough_for_all_of_this(loaded):
    assert loaded.model.config.index_topk * 4 < N_TOKENS


def test_a_set_that_grows_leaves_room_for_what_was_decoded_into_the_spare(prompt):
    """Past the reserve decoded entries fill the spare room of a resident set; the next set may need that again."""
    layer, host = prompt.shape.layers[0], prompt.host
    csa = ResidentCSA.opened(prompt.rest.layers[layer], host[layer], torch.device("cpu"))
    csa.keep_buffers(0.5, reserve_entries=1)
    csa.set_resident(torch.arange(40))
    decoded = torch.arange(8.0)[None, :, None]
    for name in ("compressor", "indexer"):
        csa.buffers[name][:, 40:48] = decoded
    for _ in range(8):
        csa.count_entry()
    csa.set_resident(torch.arange(58))
    for name in ("compressor", "indexer"):
        held = csa.compressed_kv[name]
        assert torch.equal(held[:, :58], host[layer][name][:, :58])
        assert torch.equal(held[:, 58:], decoded.expand(1, 8, held.shape[2]))
