"""The resident set: evicting equals masking, all equals dense, memory really falls, the record says what happened."""

import pytest
import torch
from lsa_tools import prefilled, random_indexer, run_steps
from masked import masking
from sessions import Single, side_by_side
from tiny_models import loaded_model, prompt_ids

from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.prefill import prefill
from kvscope.methods.lsa import pool
from kvscope.methods.lsa.method import Lsa
from kvscope.methods.lsa.options import LsaConfig
from kvscope.methods.lsa.selection import ScriptedSelector
from kvscope.methods.registry import create_method
from kvscope.methods.shape import tensor_bytes

FAMILIES = ["llama", "qwen3", "mistral", "smollm3", "gpt_oss"]
SYNTHETIC = "lsa:selection=synthetic"
# tau: 1, inside, past the end. Chunks: a page, less, more, and sizes that do not divide one.
CORNERS = [
    f"{SYNTHETIC},budget_fraction=0.5,tau=1,chunk_tokens=16,recency_tokens=20",
    f"{SYNTHETIC},budget_fraction=0.6,tau=4,chunk_tokens=12,recency_tokens=7,sink_tokens=0",
    f"{SYNTHETIC},budget_tokens=90,tau=1000,chunk_tokens=32,recency_tokens=0",
    f"{SYNTHETIC},budget_fraction=0.7,tau=3,chunk_tokens=5,refresh=stale1,recency_tokens=10",
    "lsa:indexer=attention,tau=1,threshold=0.3,chunk_tokens=8,recency_tokens=10",
    "lsa:indexer=attention,tau=5,budget_fraction=0.4,chunk_tokens=16,recency_tokens=10,refresh=stale1",
]


@pytest.mark.parametrize("n_tokens", [150, 160])
@pytest.mark.parametrize("spec", CORNERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_evicting_equals_masking(family, spec, n_tokens):
    loaded, method = loaded_model(family), create_method(spec)
    prompt = prefilled(loaded, prompt_ids(n_tokens), method, chunk_tokens=64, seed=4)
    tokens = prompt_ids(12, seed=8)
    methods = [method, masking(method), create_method("dense")]
    evicted, masked, dense = side_by_side(loaded, methods, prompt, tokens)
    torch.testing.assert_close(evicted.logits_TV, masked.logits_TV, atol=1e-5, rtol=0)
    assert evicted.record == masked.record
    assert evicted.footprint.bytes_read_per_step == masked.footprint.bytes_read_per_step
    assert (evicted.logits_TV - dense.logits_TV).abs().max() > 1e-3, "something was left out, or this shows nothing"


@pytest.mark.parametrize("spec", [
    f"{SYNTHETIC},budget_fraction=1,tau=4,chunk_tokens=16,recency_tokens=0,sink_tokens=0",
    f"{SYNTHETIC},budget_tokens=1000000,tau=4,chunk_tokens=12,refresh=stale1",
    "lsa:indexer=attention,threshold=0.999999,tau=1,chunk_tokens=16,recency_tokens=8",
])  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_resident_equals_dense(family, spec):
    loaded, method = loaded_model(family), create_method(spec)
    prompt = prefilled(loaded, prompt_ids(150), method, chunk_tokens=64)
    tokens = prompt_ids(9, seed=8)
    logits, record, footprint = run_steps(loaded, method, prompt, tokens)
    dense, _, _ = run_steps(loaded, create_method("dense"), prompt, tokens)
    torch.testing.assert_close(logits, dense, atol=1e-5, rtol=0)
    assert set(record.resident_tokens) == {150}
    assert footprint.kv_bytes >= loaded.shape.kv_bytes_per_token * 159


@pytest.mark.parametrize("n_tokens", [0, 1, 15, 16, 17])
@pytest.mark.parametrize("spec", [
    f"{SYNTHETIC},budget_tokens=0,chunk_tokens=16,recency_tokens=0,sink_tokens=0",
    f"{SYNTHETIC},budget_fraction=0.5,chunk_tokens=16,tau=2",
    "lsa:indexer=attention,chunk_tokens=16,tau=2,recency_tokens=0,sink_tokens=0,refresh=stale1",
])  # fmt: skip
def test_prompts_around_one_chunk(spec, n_tokens):
    """A prompt of one token is decode step 0 alone: nothing was prefilled."""
    loaded, method = loaded_model("smollm3"), create_method(spec)
    prompt = prefilled(loaded, prompt_ids(n_tokens), method)
    tokens = prompt_ids(5, seed=8)
    evicted, record, _ = run_steps(loaded, method, prompt, tokens)
    masked, masked_record, _ = run_steps(loaded, masking(method), prompt, tokens)
    torch.testing.assert_close(evicted, masked, atol=1e-5, rtol=0)
    assert record == masked_record
    assert len(record.resident_tokens) == (3 if method.layout(n_tokens).n_candidates and "tau=2" in spec else 1)
    if not method.layout(n_tokens).n_candidates:
        dense, _, _ = run_steps(loaded, create_method("dense"), prompt, tokens)
        torch.testing.assert_close(evicted, dense, atol=1e-5, rtol=0)


def test_budget_zero_keeps_sinks_and_window_and_nothing_else():
    loaded = loaded_model("llama")
    method = create_method(f"{SYNTHETIC},budget_tokens=0,chunk_tokens=16,recency_tokens=16,sink_tokens=4")
    prompt = prefilled(loaded, prompt_ids(160), method)
    tokens = prompt_ids(6, seed=8)
    logits, record, footprint = run_steps(loaded, method, prompt, tokens)
    assert record.resident_tokens == (32,)
    assert record.recalled_bytes == (0,)
    masked, _, _ = run_steps(loaded, masking(method), prompt, tokens)
    torch.testing.assert_close(logits, masked, atol=1e-5, rtol=0)
    assert method.effective_config(160, loaded.shape)["chunks_chosen"] == 0
    assert footprint == method.predict(loaded.shape, 160, 6)


def scripted(config, sets):
    """LSA that plays back sets of candidate chunks."""

    class Scripted(Lsa):
        def open(self, prompt, device, *, reserve_tokens=0):
            selector = ScriptedSelector([torch.tensor(chosen, dtype=torch.long) for chosen in sets])
            layout = self.layout(prompt.n_tokens)
            return self.open_with(prompt, device, selector, layout=layout, reserve_tokens=reserve_tokens)

    return Scripted(LsaConfig(indexer="attention", chunk_tokens=16, recency_tokens=16, sink_tokens=16, **config))


def live_slot_bytes(sequence):
    return tensor_bytes(held.slots for held in sequence._pools.values())


def test_evicted_chunks_are_freed_and_only_the_difference_moves():
    """The candidates of 160 tokens are chunks 1 to 8. The set grows, shifts by one, shrinks, and empties."""
    loaded = loaded_model("llama")
    sets = [[0, 1, 2], [1, 2, 3, 4, 5], [2, 3, 4, 5, 6], [3], []]
    method = scripted({"tau": 1}, sets)
    prompt = prefilled(loaded, prompt_ids(160), method)
    chunk_bytes = 16 * loaded.shape.kv_bytes_per_token
    static_bytes = loaded.shape.paged_kv_bytes(32 + 5)
    with Single(loaded, method, prompt, reserve_tokens=5) as session:
        sequence = session.sequence
        for chosen, token in zip(sets, prompt_ids(5, seed=8), strict=True):
            session.step(token)
            footprint = sequence.footprint()
            assert live_slot_bytes(sequence) == len(chosen) * chunk_bytes
            assert footprint.kv_bytes == static_bytes + len(chosen) * chunk_bytes
            assert footprint.host_bytes == loaded.shape.paged_kv_bytes(160)
            for held in sequence._pools.values():
                assert sorted(held.ids.tolist()) == [chunk + 1 for chunk in chosen]
        record = sequence.residency()
    assert record.recalled_bytes == tuple(n * chunk_bytes for n in (3, 3, 1, 0, 0))
    assert sequence.bytes_recalled == 7 * chunk_bytes
    assert record.resident_tokens == tuple(32 + 16 * len(chosen) for chosen in sets)
    assert record.hit_rate == pytest.approx((2 + 4 + 1 + 0) / (5 + 5 + 1 + 0))


def test_slots_hold_what_the_mirror_holds():
    loaded = loaded_model("llama")
    for chunk_tokens in (4, 12, 16, 48):
        config = LsaConfig(indexer="attention", chunk_tokens=chunk_tokens, recency_tokens=0, sink_tokens=0)
        method = Lsa(config)
        prompt = prefilled(loaded, prompt_ids(150), method, chunk_tokens=64)
        layout = method.layout(150)
        sets = [torch.tensor([0, 2]), torch.tensor([1, 2]), torch.tensor([0])]
        selector = ScriptedSelector(sets)
        sequence = method.open_with(prompt, "cpu", selector, layout=layout)
        for wanted in sets:
            if wanted is not sets[0]:
                sequence._refresh(loaded.shape.layers, wanted)
            for layer, held in sequence._pools.items():
                host = prompt.pages[layer].permute(1, 2, 0, 3, 4).flatten(2, 3)  # [H, 2, tokens, D]
                per_chunk = held.slots.unflatten(0, (len(held.ids), -1))
                for chunk, slots in zip(held.ids.tolist(), per_chunk, strict=True):
                    expected = host[:, :, chunk * chunk_tokens : (chunk + 1) * chunk_tokens]
                    assert torch.equal(slots.permute(1, 2, 0, 3, 4).flatten(2, 3), expected)
        sequence.close()


def test_stale1_reads_a_choice_one_interval_late_and_counts_what_is_on_its_way():
    loaded = loaded_model("llama")
    sets = [[0], [1, 2], [3], [3]]
    tokens = prompt_ids(8, seed=8)
    stale, sync = scripted({"tau": 2, "refresh": "stale1"}, sets), scripted({"tau": 2}, [[0], [0], [1, 2], [3]])
    prompt = prefilled(loaded, prompt_ids(160), stale)
    late, record, _ = run_steps(loaded, stale, prompt, tokens)
    same, _, _ = run_steps(loaded, sync, prompt, tokens)
    torch.testing.assert_close(late, same, atol=1e-6, rtol=0)
    # After refresh 1 chunk 0 is read while 1 and 2 arrive; after refresh 2 these are read while 3 arrives.
    assert record.resident_tokens == (32 + 16, 32 + 48, 32 + 48, 32 + 16)
    masked, masked_record, _ = run_steps(loaded, masking(stale), prompt, tokens)
    torch.testing.assert_close(late, masked, atol=1e-5, rtol=0)
    assert record == masked_record


def test_a_failing_copy_is_raised_not_swallowed(monkeypatch):
    loaded = loaded_model("llama")
    method = scripted({"tau": 1, "refresh": "stale1"}, [[0], [1], [2]])
    prompt = prefilled(loaded, prompt_ids(160), method)
    with Single(loaded, method, prompt, reserve_tokens=3) as session:
        session.step(5)

        def broken(self, move):
            raise OSError("the mirror is gone")

        monkeypatch.setattr(pool.ChunkPool, "fetch", broken)
        session.step(6)
        with pytest.raises(OSError, match="the mirror is gone"):
            session.step(7)
        monkeypatch.undo()
        session.sequence._arriving.clear()


def test_fallback_makes_an_interval_dense_and_is_counted():
    loaded = loaded_model("llama")
    sets = [[0], [0, 1, 2, 3, 4], [1], [0, 1, 2, 3]]
    method = scripted({"tau": 2, "fallback_ratio": 0.5}, sets)
    prompt = prefilled(loaded, prompt_ids(160), method)
    tokens = prompt_ids(8, seed=8)
    logits, record, _ = run_steps(loaded, method, prompt, tokens)
    assert record.fallbacks == 1, "five of eight are more than half, four are not"
    assert record.resident_tokens == (48, 160, 48, 96)
    plain = scripted({"tau": 2}, [[0], list(range(8)), [1], [0, 1, 2, 3]])
    same, without, _ = run_steps(loaded, plain, prompt, tokens)
    torch.testing.assert_close(logits, same, atol=1e-6, rtol=0)
    assert without.fallbacks == 0


def test_a_refresh_sees_the_states_of_the_step_before(tmp_path):
    """What the indexer is handed is checked against the hidden states the model really had."""
    loaded = loaded_model("smollm3")
    folder = random_indexer(tmp_path / "indexer", loaded.shape, lookback_tokens=3)
    method = create_method(
        {"name": "lsa", "indexer": str(folder), "tau": 2, "budget_fraction": 0.6, "recency_tokens": 9}
    )
    prompt = prefilled(loaded, prompt_ids(200), method, chunk_tokens=64)
    seen, states = {layer: list(prompt.metadata["last_states_3"][layer]) for layer in loaded.shape.layers}, []
    session = Single(loaded, method, prompt, reserve_tokens=6)
    observe, choose = session.sequence.observe, session.sequence._selector.choose

    def spy(layer, hidden_BM):
        seen[layer].append(hidden_BM[0].clone())
        observe(layer, hidden_BM)

    def note():
        states.append(session.sequence._selector._states_WLM.clone())
        return choose()

    session.sequence.observe, session.sequence._selector.choose = spy, note
    with session:
        for token in prompt_ids(6, seed=8):
            session.step(token)
    assert len(states) == 2, "at steps 2 and 4; the choice of step 0 was made at opening"
    for refresh, held in zip((2, 4), states, strict=True):
        expected = torch.stack([torch.stack(seen[layer][refresh : refresh + 3]) for layer in loaded.shape.layers], 1)
        torch.testing.assert_close(held, expected)


@pytest.mark.parametrize("chunk_tokens", [16, 64, 192])
def test_the_choice_does_not_depend_on_how_the_prompt_was_prefilled(tmp_path, chunk_tokens):
    loaded = loaded_model("smollm3")
    folder = random_indexer(tmp_path / "indexer", loaded.shape, chunk_tokens=24)
    method = create_method({"name": "lsa", "indexer": str(folder), "budget_fraction": 0.6, "recency_tokens": 20})
    prompt = prefilled(loaded, prompt_ids(200), method, chunk_tokens=chunk_tokens)
    whole = prefilled(loaded, prompt_ids(200), method, chunk_tokens=208)
    ids = []
    for each in (prompt, whole):
        sequence = method.open(each, "cpu")
        ids.append(sorted(next(iter(sequence._pools.values())).ids.tolist()))
        sequence.close()
    assert ids[0] == ids[1] != []


def test_a_prompt_without_the_collectors_is_refused(tmp_path):
    loaded = loaded_model("llama")
    method = create_method(f"{SYNTHETIC},budget_fraction=0.5,chunk_tokens=16")
    with pytest.raises(ValueError, match="without this method's collectors"):
        method.open(prefill(loaded, prompt_ids(200)), "cpu")


@pytest.mark.parametrize(("churn", "hit_rate"), [("0", 1.0), ("0.25", 0.75), ("1", 0.0)])
def test_a_synthetic_selection_replaces_the_share_that_was_asked_for(churn, hit_rate):
    loaded = loaded_model("llama")
    options = "chunk_tokens=8,recency_tokens=0,sink_tokens=0,budget_tokens=32,tau=2"
    prompt = prefilled(loaded, prompt_ids(160), create_method(f"{SYNTHETIC},{options}"))
    _, record, _ = run_steps(loaded, create_method(f"{SYNTHETIC},{options},churn={churn}"), prompt, prompt_ids(9))
    assert record.hit_rate == hit_rate
    assert set(record.resident_tokens) == {32}
    again = run_steps(loaded, create_method(f"{SYNTHETIC},{options},churn={churn}"), prompt, prompt_ids(9))
    assert again[1] == record


def test_the_default_churn_is_what_was_measured_at_the_nearest_interval():
    loaded = loaded_model("llama")
    found = {}
    for tau in (1, 4, 20, 64, 1000):
        method = create_method(f"{SYNTHETIC},budget_tokens=64,tau={tau}")
        found[tau] = method.effective_config(512, loaded.shape)["churn"]
    assert found == {1: 0.09, 4: 0.09, 20: 0.24, 64: 0.55, 1000: 0.55}
    assert "churn" not in create_method("lsa:indexer=attention").effective_config(512, loaded.shape)


def test_the_synthetic_indexer_differs_by_seed_and_says_so():
    loaded = loaded_model("llama")
    chosen = []
    for seed in (0, 0, 1):
        method = create_method(f"{SYNTHETIC},budget_fraction=0.5,chunk_tokens=16,recency_tokens=0,seed={seed}")
        prompt = prefilled(loaded, prompt_ids(300), method)
        sequence = method.open(prompt, "cpu")
        chosen.append(sorted(next(iter(sequence._pools.values())).ids.tolist()))
        sequence.close()
        assert method.selection == "synthetic"
    assert chosen[0] == chosen[1] != chosen[2]
    assert create_method("lsa:indexer=attention").selection == "free"
    assert create_method("lsa").selection == "trained"


def test_decode_reports_the_step_that_held_most():
    loaded = loaded_model("llama")
    method = scripted({"tau": 1}, [[0], [0, 1, 2, 3, 4], [1]])
    prompt = prefilled(loaded, prompt_ids(160), method)
    result = decode(loaded, method, prompt, [5], max_new_tokens=3)
    chunk_bytes = 16 * loaded.shape.kv_bytes_per_token
    assert result.footprint_peak.kv_bytes - result.footprint_last.kv_bytes == 4 * chunk_bytes
    assert result.footprint_last.kv_bytes < result.footprint_mean.kv_bytes < result.footprint_peak.kv_bytes


# -- slots at fixed addresses


@pytest.mark.parametrize("refresh", ["sync", "stale1"])
@pytest.mark.parametrize("fallback_ratio", [None, 0.8])
def test_slots_at_fixed_addresses_play_any_script(refresh, fallback_ratio):
    """Sets that grow past the room, shrink, empty, repeat and churn: logits and record as without fixed addresses."""
    loaded = loaded_model("llama")
    sets = [[1, 4], [1, 2, 4], [0, 2, 3, 5, 6], [], [7], list(range(8)), list(range(8)), [3], [4, 5, 6], [0, 1, 2]]
    method = scripted({"tau": 2, "refresh": refresh, "fallback_ratio": fallback_ratio}, sets)
    prompt = prefilled(loaded, prompt_ids(160), method)
    tokens = prompt_ids(20, seed=8)
    moving, record, _ = run_steps(loaded, method, prompt, tokens)
    fixed, fixed_record, footprint = run_steps(loaded, method, prompt, tokens, decode_graph="uncaptured")
    torch.testing.assert_close(fixed, moving, atol=1e-5, rtol=0)
    assert fixed_record == record
    assert fixed_record.fallbacks == (0 if fallback_ratio is None else 2)
    # Room only ever grows: for all eight candidates in the end.
    assert footprint.kv_bytes == loaded.shape.paged_kv_bytes(32 + 20) + 8 * 16 * loaded.shape.kv_bytes_per_token


@pytest.mark.parametrize("refresh", ["sync", "stale1"])
def test_slots_hold_the_mirror_at_every_step_and_spare_ones_wait(refresh):
    loaded = loaded_model("llama")
    sets = [[k % 8] if k % 3 else sorted({k % 8, (k + 3) % 8}) for k in range(12)]
    method = scripted({"tau": 1, "refresh": refresh}, sets)
    prompt = prefilled(loaded, prompt_ids(160), method)
    late = 1 if refresh == "stale1" else 0
    with Single(loaded, method, prompt, reserve_tokens=12, decode_graph="uncaptured") as session:
        slots, versions = session.sequence._slots, set()
        for step, token in enumerate(prompt_ids(12, seed=8)):
            session.step(token)
            read = sets[max(0, step - late)] if step else sets[0]
            store = slots.store(loaded.shape.layers[0])
            assert int(store.n_tokens) == 16 * len(read) == slots.n_tokens
            for layer in loaded.shape.layers:
                for place, chunk in enumerate(read):
                    slot = int(store.page_table[0, 0, place])
                    assert torch.equal(slots.slots[layer][slot], prompt.pages[layer][chunk + 1])
            versions.add(slots.version)
        n_slots = len(slots.slots[loaded.shape.layers[0]])
        assert n_slots == (4 if late else 2)
        assert versions == {0}  # the first set has two chunks: no later one outgrows it


def test_a_threshold_that_lets_more_pass_makes_room_and_says_so(tmp_path):
    loaded = loaded_model("llama")
    folder = random_indexer(tmp_path / "indexer", loaded.shape, chunk_tokens=16, tau=2, key_dim=16)
    method = create_method(
        {"name": "lsa", "indexer": str(folder), "threshold": 0.5, "tau": 2, "recency_tokens": 16, "sink_tokens": 16}
    )
    prompt = prefilled(loaded, prompt_ids(400), method)
    tokens = prompt_ids(16, seed=8)
    moving, record, _ = run_steps(loaded, method, prompt, tokens)
    assert len(set(record.resident_tokens)) > 1, "sets of equal size show nothing"
    fixed, fixed_record, _ = run_steps(loaded, method, prompt, tokens, decode_graph="uncaptured")
    torch.testing.assert_close(fixed, moving, atol=1e-5, rtol=0)
    assert fixed_record == record
