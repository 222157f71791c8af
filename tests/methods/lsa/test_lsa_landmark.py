"""``indexer=landmark``: the model's own last queries against summaries of each chunk's keys."""

import pytest
import torch
from lsa_tools import prefilled, run_steps
from masked import masking
from sessions import TOGETHER, UNCAPTURED, Single, new_session
from tiny_models import PAGE_TOKENS, build_stock, loaded_model, prompt_ids

from kvscope.errors import UsageError
from kvscope.harness.engine.models import wrap_model
from kvscope.harness.engine.synthetic import synthetic_prompt
from kvscope.methods.base import AttentionCall, union_collectors
from kvscope.methods.kernels.dispatch import triton_version
from kvscope.methods.lsa.landmark import N_QUERIES, landmark_collectors
from kvscope.methods.lsa.layout import ChunkLayout
from kvscope.methods.registry import create_method
from kvscope.methods.shape import ModelShape
from kvscope.methods.store import PromptKV

SIZES = "chunk_tokens=16,recency_tokens=20,sink_tokens=4"
N_TOKENS = 150
SHAPE = ModelShape(
    layers=(1, 2), n_layers=3, n_q_heads=6, n_kv_heads=2, head_dim=8, hidden_size=5, element_bytes=4, page_tokens=16
)


def random_prompt(chunk_tokens, n_tokens):
    """A prompt of random keys and queries, heard in parts, with the keys [H, N, D] and queries [Q, N, D] by layer."""
    draws = torch.Generator().manual_seed(3)
    prompt = PromptKV(shape=SHAPE, n_tokens=n_tokens, pages={}, dtype=torch.float32)
    truth = {}
    for layer in SHAPE.layers:
        keys = torch.randn((1, 2, n_tokens, 8), generator=draws)
        queries = 3 * torch.randn((1, 6, n_tokens, 8), generator=draws)
        for collector in landmark_collectors(layer, chunk_tokens):
            collector.begin(n_tokens)
            for start in range(0, n_tokens, 50):
                part = slice(start, min(start + 50, n_tokens))
                k = keys[:, :, part]
                if collector.hears_attention:
                    call = AttentionCall(query=queries[:, :, part], key=k, value=k, scale=0.3)
                    collector.attention(call, start_tokens=start)
                collector.chunk(k, k, torch.empty((1, k.shape[2], 5)), start_tokens=start)
            prompt.metadata.setdefault(collector.name, {})[layer] = collector.finish()
        truth[layer] = (keys[0], queries[0])
    return prompt, truth


def upper_bound(q_D, chunk_CD):
    """The most that a key between a chunk's least and greatest could give, one dimension after the other."""
    bounds = zip(q_D, chunk_CD.amin(0), chunk_CD.amax(0), strict=True)
    return sum(max(float(q * low), float(q * high)) for q, low, high in bounds)


def plain_scores(truth, layout):
    """The same scores with nothing batched."""
    best, C = torch.zeros(layout.n_candidates), layout.chunk_tokens
    for keys_HND, queries_QND in truth.values():
        chunks = [keys_HND[:, c * C : (c + 1) * C] for c in range(layout.first, layout.last)]
        for token in range(layout.n_tokens - N_QUERIES, layout.n_tokens):
            shares = []
            for head in range(6):
                logits = [upper_bound(0.3 * queries_QND[head, token], chunk[head // 3]) for chunk in chunks]
                shares.append(torch.tensor(logits).softmax(0))
            best = torch.maximum(best, torch.stack(shares).mean(0))
    return best


@pytest.mark.parametrize(("chunk_tokens", "n_tokens"), [(12, 111), (32, 200)])
def test_scores_are_those_of_the_plain_formula_and_the_best_are_chosen(chunk_tokens, n_tokens):
    prompt, truth = random_prompt(chunk_tokens, n_tokens)
    options = f"indexer=landmark,chunk_tokens={chunk_tokens},sink_tokens=3,recency_tokens=9"
    method = create_method(f"lsa:{options},budget_fraction=0.7")
    layout = method.layout(n_tokens)
    selector = method.selector(prompt, torch.device("cpu"), layout)
    expected = plain_scores(truth, layout)
    torch.testing.assert_close(selector.scores(), expected, atol=1e-6, rtol=1e-5)
    n_chosen = layout.budgeted_chunks(int(0.7 * n_tokens))
    assert 0 < n_chosen < layout.n_candidates
    assert selector.choose().tolist() == expected.topk(n_chosen).indices.sort().values.tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_a_query_is_the_same_from_the_prefill_and_from_a_step(family):
    """One layout, and the last tokens of the context prefilled or fed: the queries kept are the same 16."""
    loaded, ids = loaded_model(family), prompt_ids(N_TOKENS)
    method = create_method(f"lsa:indexer=landmark,{SIZES}")
    kept = []
    for n_fed in (0, 3, 20):
        prompt = prefilled(loaded, ids[: N_TOKENS - n_fed], method, chunk_tokens=64)
        with Single(loaded, method, prompt, reserve_tokens=n_fed) as session:
            selector = session.sequence._selector
            before_fed = selector._queries_LWQD.clone()
            # Everything stays, so what the steps attend to is what the prefill attended to.
            selector.n_chosen = session.sequence._layout.n_candidates
            for layer in loaded.shape.layers:
                session.sequence._place(layer, torch.arange(selector.n_chosen) + session.sequence._layout.first)
            for token in ids[N_TOKENS - n_fed :]:
                session.step(token)
            queries = selector._queries_LWQD.roll(-selector._oldest, 1)
            assert n_fed == 0 or not torch.equal(queries, before_fed)
            kept.append(queries.clone())
    torch.testing.assert_close(kept[1], kept[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(kept[2], kept[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", ["tau=1", "tau=3,refresh=stale1", "tau=4"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_it_evicts_as_a_mask_would_and_chooses_anew(family, options):
    loaded, fed = loaded_model(family), prompt_ids(9, seed=8)
    method = create_method(f"lsa:indexer=landmark,budget_tokens=90,{options},{SIZES}")
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), method)
    evicted, record, _ = run_steps(loaded, method, prompt, fed)
    masked, masked_record, _ = run_steps(loaded, masking(method), prompt, fed)
    torch.testing.assert_close(evicted, masked, atol=1e-5, rtol=0)
    assert record == masked_record
    assert record.resident_tokens[0] <= 90
    assert record.hit_rate > 0, "what stays is not copied again"
    if family == "llama":  # there the steps' queries move the choice
        assert sum(record.recalled_bytes[1:]) > 0
    assert record.indexer is None


@pytest.mark.skipif(not triton_version()[0], reason="steps of fixed addresses take Triton")
@pytest.mark.parametrize("options", ["tau=2", "tau=3,refresh=stale1"])
def test_a_step_of_fixed_addresses_chooses_the_same(options):
    loaded, fed = loaded_model("llama"), prompt_ids(7, seed=8)
    method = create_method(f"lsa:indexer=landmark,budget_tokens=90,{options},{SIZES}")
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), method)
    eager, record, _ = run_steps(loaded, method, prompt, fed)
    static, static_record, _ = run_steps(loaded, method, prompt, fed, decode_graph=UNCAPTURED)
    torch.testing.assert_close(static, eager, atol=1e-5, rtol=0)
    assert static_record == record
    assert sum(record.recalled_bytes[1:]) > 0


@pytest.mark.skipif(not triton_version()[0], reason="steps of fixed addresses take Triton")
def test_one_launch_for_several_sequences_leaves_each_its_own_queries():
    """One layer and few tokens: the kernels are interpreted here."""
    loaded = wrap_model(build_stock("llama", num_hidden_layers=1), None, name="flat", page_tokens=PAGE_TOKENS)
    method = create_method("lsa:indexer=landmark,tau=1,budget_tokens=12,chunk_tokens=4,recency_tokens=4,sink_tokens=0")
    prompts = [prefilled(loaded, prompt_ids(n, seed=n), method) for n in (32, 24)]
    eager = [run_steps(loaded, method, prompt, prompt_ids(2, seed=8)) for prompt in prompts]
    with new_session(loaded, TOGETHER) as session:
        for prompt in prompts:
            session.add(method, prompt, reserve_tokens=2)
        logits = [session.step([token] * 2).clone() for token in prompt_ids(2, seed=8)]
        assert session.attends_together
        kept = [member.cache._selector._queries_LWQD.clone() for member in session.members]
        records = [member.cache.residency() for member in session.members]
    for row, (expected, record, _) in enumerate(eager):
        torch.testing.assert_close(torch.stack([step[row] for step in logits]), expected, atol=1e-4, rtol=0)
        assert records[row] == record
    assert not torch.equal(kept[0], kept[1])


def test_defaults_hold_a_quarter_and_rows_say_what_chose():
    loaded = loaded_model("gemma3")
    method = create_method("lsa:indexer=landmark")
    effective = method.effective_config(4000, loaded.shape)
    assert (effective["indexer"], effective["budget_fraction"]) == ("landmark", 0.25)
    assert (effective["mode"], effective["threshold"], effective["chunk_tokens"]) == ("budget", None, 64)
    assert effective["always_resident_tokens"] + effective["chunks_chosen"] * 64 in range(1000 - 63, 1001)
    assert method.selection == "free"
    assert method.trained_part(loaded.shape) is None
    # The least and the greatest key of each chunk of one managed layer, 17 queries of 4 heads of 32, in float32.
    summaries, queries = effective["chunks_to_choose_from"] * 2 * 2 * 32 * 4, 17 * 4 * 32 * 4
    assert method.predict(loaded.shape, 4000).metadata_bytes == summaries + queries


def test_bounds_that_quest_keeps_are_collected_once():
    methods = [create_method("lsa:indexer=landmark,chunk_tokens=32"), create_method("quest:block_tokens=32")]
    names = [collector.name for collector in union_collectors(methods, [3])]
    assert names == ["key_min_max_32", "last_queries_16"]


def test_a_prompt_nobody_prefilled_has_queries_to_choose_by():
    loaded, method = loaded_model("llama"), create_method(f"lsa:indexer=landmark,tau=2,{SIZES}")
    collectors = union_collectors([method], loaded.shape.layers)
    prompt = synthetic_prompt(loaded, 320, mirror=True, collectors=collectors, chunk_tokens=64)
    _, record, footprint = run_steps(loaded, method, prompt, prompt_ids(5, seed=8))
    assert len(record.resident_tokens) == 3
    assert footprint == method.predict(loaded.shape, 320, 5)


@pytest.mark.parametrize("n_tokens", [0, 1, 17, 60])
def test_a_prompt_shorter_than_its_queries_or_without_chunks_is_served(n_tokens):
    loaded = loaded_model("llama")
    method = create_method("lsa:indexer=landmark,chunk_tokens=4,recency_tokens=2,sink_tokens=2,budget_fraction=1.0")
    prompt = prefilled(loaded, prompt_ids(n_tokens), method)
    logits, _, _ = run_steps(loaded, method, prompt, prompt_ids(3, seed=8))
    dense, _, _ = run_steps(loaded, create_method("dense"), prompt, prompt_ids(3, seed=8))
    torch.testing.assert_close(logits, dense, atol=5e-6, rtol=0)


def test_scores_that_are_no_numbers_are_told():
    prompt, _ = random_prompt(16, N_TOKENS)
    prompt.metadata["last_queries_16"][2][-1] = torch.nan
    method = create_method("lsa:indexer=landmark,chunk_tokens=16,recency_tokens=20")
    selector = method.selector(prompt, torch.device("cpu"), method.layout(N_TOKENS))
    selector.choose()
    assert not bool(selector.scored.isfinite())


def test_a_prompt_without_what_it_collects_is_refused():
    loaded = loaded_model("llama")
    method = create_method(f"lsa:indexer=landmark,{SIZES}")
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), create_method("quest:block_tokens=16"))
    with pytest.raises(ValueError, match="prefilled without this method's collectors"):
        method.open(prompt, "cpu")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("indexer=landmark,threshold=0.3", "no threshold, no cap and no least share of one apply; give budget"),
        ("indexer=landmark,mode=threshold", "no threshold, no cap and no least share of one apply"),
        ("indexer=landmark,least_fraction=0.1", "no threshold, no cap and no least share of one apply"),
        ("indexer=landmark,cap_tokens=64", "no threshold, no cap and no least share of one apply"),
        ("indexer=landmark,selection=synthetic,budget_tokens=64", "indexer cannot be given"),
    ],
)
def test_options_that_make_no_sense_are_one_sentence(options, why):
    with pytest.raises(UsageError, match=why) as caught:
        create_method(f"lsa:{options}")
    assert "\n" not in str(caught.value)


def test_a_layout_is_that_of_every_lsa():
    method = create_method(f"lsa:indexer=landmark,{SIZES}")
    expected = ChunkLayout(n_tokens=N_TOKENS, chunk_tokens=16, sink_tokens=4, recency_tokens=20)
    assert method.layout(N_TOKENS) == expected
