"""``indexer=hindsight``: two decodes, the second with what the first one's steps attended to."""

from dataclasses import replace

import pytest
import torch
from lsa_tools import prefilled, run_steps
from masked import masking
from sessions import UNCAPTURED
from tiny_models import PAGE_TOKENS, build_stock, loaded_model, prompt_ids, stock_model

from kvscope.errors import UsageError
from kvscope.harness.engine.decode import answer_nll, decode
from kvscope.harness.engine.decoding import Request
from kvscope.harness.engine.models import wrap_model
from kvscope.harness.engine.rehearsal import rehearsed
from kvscope.methods.kernels.dispatch import triton_version
from kvscope.methods.registry import create_method

SIZES = "chunk_tokens=16,recency_tokens=20,sink_tokens=4"
N_TOKENS = 150


def second_decode(loaded, method, prompt, fed):
    """The method as a first decode left it that was fed these tokens."""
    return rehearsed(loaded, Request(method=method, prompt=prompt, forced_ids=fed, max_new_tokens=1)).method


def played(method, n_tokens):
    """The sets that it plays back."""
    return [chosen.tolist() for chosen in method.selector(None, None, method.layout(n_tokens))._sets]


def stock_masses(family, layout, fed, layers):
    """Attention of each step and layer to the candidate chunks, by transformers' eager attention over all at once."""
    with torch.no_grad():
        out = stock_model(family)(torch.tensor([[*prompt_ids(layout.n_tokens), *fed]]), output_attentions=True)
    C, steps = layout.chunk_tokens, slice(layout.n_tokens, None)
    middle = slice(layout.first * C, layout.last * C)
    return torch.stack(
        [out.attentions[layer][0, :, steps, middle].mean(0).unflatten(-1, (-1, C)).sum(-1) for layer in layers], 1
    )


def fewest(mass_n, share):
    """The largest entries, one by one, until they hold a share of the sum."""
    found, held = set(), 0.0
    for chunk in mass_n.argsort(descending=True).tolist():
        if held >= share * float(mass_n.sum()):
            break
        found.add(chunk)
        held += float(mass_n[chunk])
    return found


@pytest.mark.parametrize("tau", [1, 3, 64])
@pytest.mark.parametrize("family", ["llama", "smollm3", "gpt_oss"])
def test_what_is_kept_is_what_the_stock_models_next_steps_attend_to(family, tau):
    loaded, fed = loaded_model(family), prompt_ids(8, seed=8)
    by_threshold = create_method(f"lsa:indexer=hindsight,tau={tau},threshold=0.6,{SIZES}")
    by_budget = create_method(f"lsa:indexer=hindsight,tau={tau},budget_tokens=90,{SIZES}")
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), by_threshold)
    layout = by_threshold.layout(N_TOKENS)
    masses_SLn = stock_masses(family, layout, fed, loaded.shape.layers)
    intervals = [masses_SLn[start : start + tau] for start in range(0, len(fed), tau)]
    needed = [sorted(set().union(*(fewest(row, 0.6) for row in each.flatten(0, 1)))) for each in intervals]
    assert played(second_decode(loaded, by_threshold, prompt, fed), N_TOKENS) == needed
    n_chunks = layout.budgeted_chunks(90)
    assert 0 < n_chunks < layout.n_candidates
    best = [each.amax((0, 1)).topk(n_chunks).indices.sort().values.tolist() for each in intervals]
    assert played(second_decode(loaded, by_budget, prompt, fed), N_TOKENS) == best


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_cap_keeps_the_best_of_what_is_needed(family):
    loaded, fed = loaded_model(family), prompt_ids(8, seed=8)
    options = f"indexer=hindsight,tau=4,threshold=0.9,{SIZES}"
    whole, capped = (create_method(f"lsa:{options}{more}") for more in ("", ",cap_tokens=90"))
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), whole)
    layout = whole.layout(N_TOKENS)
    every = played(second_decode(loaded, whole, prompt, fed), N_TOKENS)
    kept = played(second_decode(loaded, capped, prompt, fed), N_TOKENS)
    most = layout.budgeted_chunks(90)
    assert max(map(len, every)) > most
    assert [len(each) for each in kept] == [min(most, len(each)) for each in every]
    assert all(set(few) <= set(many) for few, many in zip(kept, every, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_least_share_fills_up_what_is_needed(family):
    """All that is needed stays, and the most attended of the others."""
    loaded, fed = loaded_model(family), prompt_ids(8, seed=8)
    options = f"indexer=hindsight,tau=1,threshold=0.05,{SIZES}"
    whole, filled = (create_method(f"lsa:{options}{more}") for more in ("", ",least_tokens=135"))
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), whole)
    layout = whole.layout(N_TOKENS)
    masses_SLn = stock_masses(family, layout, fed, loaded.shape.layers)
    needed = played(second_decode(loaded, whole, prompt, fed), N_TOKENS)
    kept = played(second_decode(loaded, filled, prompt, fed), N_TOKENS)
    least = layout.budgeted_chunks(135)
    assert min(map(len, needed)) < least < layout.n_candidates
    for interval, (few, many) in enumerate(zip(needed, kept, strict=True)):
        most_n = masses_SLn[interval].amax(0)
        others = [chunk for chunk in most_n.argsort(descending=True).tolist() if chunk not in few]
        assert many == sorted(few + others[: max(0, least - len(few))])


@pytest.mark.parametrize("options", ["tau=3,threshold=0.2", "tau=4,budget_tokens=80", "tau=64,budget_fraction=0.5"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_the_second_decode_evicts_as_a_mask_would(family, options):
    loaded, fed = loaded_model(family), prompt_ids(8, seed=8)
    method = create_method(f"lsa:indexer=hindsight,{options},{SIZES}")
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), method)
    second = second_decode(loaded, method, prompt, fed)
    evicted, record, _ = run_steps(loaded, second, prompt, fed)
    masked, masked_record, _ = run_steps(loaded, masking(second), prompt, fed)
    torch.testing.assert_close(evicted, masked, atol=1e-5, rtol=0)
    assert record == masked_record
    assert min(record.resident_tokens) < N_TOKENS


@pytest.mark.parametrize("family", ["llama", "smollm3", "gpt_oss"])
def test_a_threshold_near_one_is_dense(family):
    loaded, fed = loaded_model(family), prompt_ids(9, seed=8)
    method = create_method(f"lsa:indexer=hindsight,threshold=0.9999999,tau=9,{SIZES}")
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), method)
    logits, record, _ = run_steps(loaded, second_decode(loaded, method, prompt, fed), prompt, fed)
    dense, _, _ = run_steps(loaded, create_method("dense"), prompt, fed)
    torch.testing.assert_close(logits, dense, atol=1e-5, rtol=0)
    assert set(record.resident_tokens) == {N_TOKENS}


@pytest.mark.parametrize("seed", [8, 9, 10])
def test_it_is_nearer_to_dense_than_the_attention_of_one_step(seed):
    """One layer whose heads attend to few tokens: what the first of four steps reads is not what all four read."""
    stock = build_stock("llama", num_hidden_layers=1)
    with torch.no_grad():
        stock.model.layers[0].self_attn.q_proj.weight.mul_(40.0)
    loaded, fed = wrap_model(stock, None, name="sharp", page_tokens=PAGE_TOKENS), prompt_ids(20, seed=seed)
    options = "tau=4,budget_tokens=160,chunk_tokens=8,recency_tokens=0,sink_tokens=0"
    hindsight, attention = (create_method(f"lsa:indexer={each},{options}") for each in ("hindsight", "attention"))
    prompt = prefilled(loaded, prompt_ids(320), hindsight)
    dense, _, _ = run_steps(loaded, create_method("dense"), prompt, fed)
    off = []
    for method in (second_decode(loaded, hindsight, prompt, fed), attention):
        logits, record, _ = run_steps(loaded, method, prompt, fed)
        assert set(record.resident_tokens) == {160}
        off.append(float((logits - dense).square().mean()))
    assert off[0] < 0.2 * off[1]


@pytest.mark.skipif(not triton_version()[0], reason="steps of fixed addresses take Triton")
@pytest.mark.parametrize("options", ["tau=3,threshold=0.2", "tau=4,budget_tokens=80"])
def test_a_step_of_fixed_addresses_reads_the_same(options):
    loaded, fed = loaded_model("llama"), prompt_ids(8, seed=8)
    method = create_method(f"lsa:indexer=hindsight,{options},{SIZES}")
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), method)
    second = second_decode(loaded, method, prompt, fed)
    eager, record, _ = run_steps(loaded, second, prompt, fed)
    static, static_record, _ = run_steps(loaded, second, prompt, fed, decode_graph=UNCAPTURED)
    torch.testing.assert_close(static, eager, atol=1e-5, rtol=0)
    assert static_record == record


def test_an_answer_that_outlasts_the_first_decode_keeps_the_last_set():
    loaded, fed = loaded_model("llama"), prompt_ids(4, seed=8)
    method = create_method(f"lsa:indexer=hindsight,tau=2,budget_tokens=80,{SIZES}")
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), method)
    second = second_decode(loaded, method, prompt, fed)
    _, record, _ = run_steps(loaded, second, prompt, prompt_ids(10, seed=9))
    assert len(record.resident_tokens) == 5
    assert record.recalled_bytes[2:] == (0, 0, 0)


def test_decode_and_likelihood_rehearse_by_themselves():
    loaded, forced = loaded_model("llama"), prompt_ids(3, seed=8)
    method = create_method(f"lsa:indexer=hindsight,threshold=0.9999999,{SIZES}")
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), method)
    found, dense = (decode(loaded, each, prompt, forced, max_new_tokens=6) for each in (method, create_method("dense")))
    assert found.ids == dense.ids
    assert found.residency is not None
    assert found.residency.tau == 64
    few = create_method(f"lsa:indexer=hindsight,budget_tokens=60,{SIZES}")
    likely = [answer_nll(loaded, each, prompt, forced, found.ids) for each in (method, create_method("dense"), few)]
    assert likely[0] == pytest.approx(likely[1], abs=1e-5)
    assert likely[2] != pytest.approx(likely[1], abs=1e-4)


@pytest.mark.parametrize("n_tokens", [0, 1, 17])
def test_a_prompt_without_chunks_to_choose_from_is_dense(n_tokens):
    loaded, method = loaded_model("smollm3"), create_method(f"lsa:indexer=hindsight,{SIZES}")
    prompt = prefilled(loaded, prompt_ids(n_tokens), method)
    found, dense = (
        decode(loaded, each, prompt, prompt_ids(2, seed=8), max_new_tokens=4)
        for each in (method, create_method("dense"))
    )
    assert found.ids == dense.ids


def test_rows_say_what_chose_and_other_orders_are_refused():
    loaded = loaded_model("llama")
    method = create_method(f"lsa:indexer=hindsight,{SIZES}")
    assert method.selection == "free"
    assert method.effective_config(N_TOKENS, loaded.shape)["indexer"] == "hindsight"
    assert method.trained_part(loaded.shape) is None
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), method)
    with pytest.raises(UsageError, match="plays back what a first decode of the prompt attended to"):
        method.open(prompt, "cpu")
    with pytest.raises(UsageError, match="one interval late; leave it out"):
        create_method("lsa:indexer=hindsight,refresh=stale1")
    with pytest.raises(UsageError, match="indexer cannot be given"):
        create_method("lsa:indexer=hindsight,selection=synthetic,budget_tokens=64")
    assert create_method("lsa:indexer=attention").rehearsal() is None


def test_the_older_spelling_of_attention_goes_on():
    """Folders of versions to 0.2 have rows of this label."""
    loaded, tokens = loaded_model("llama"), prompt_ids(6, seed=8)
    found = {}
    for name in ("oracle", "attention"):
        method = create_method(f"lsa:indexer={name},budget_tokens=80,tau=2,chunk_tokens=16,recency_tokens=20")
        assert method.selection == "free"
        found[name] = run_steps(loaded, method, prefilled(loaded, prompt_ids(N_TOKENS), method), tokens)
    torch.testing.assert_close(found["oracle"][0], found["attention"][0], atol=0, rtol=0)
    assert found["oracle"][1:] == found["attention"][1:]
    assert create_method("lsa:indexer=oracle").label == "lsa:indexer=oracle"
    assert "indexer" not in create_method("lsa:indexer=oracle").effective_config(N_TOKENS, loaded.shape)
    assert replace(create_method("lsa:indexer=oracle").config, indexer="attention").indexed is False
