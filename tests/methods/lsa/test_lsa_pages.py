"""policy=pages: the deployed rule against its formula, against masking, and in shared steps against single ones."""

from dataclasses import replace

import pytest
import torch
from lsa_tools import prefilled, random_indexer, run_steps
from masked import masking
from tiny_models import loaded_model, prompt_ids

from kvscope.errors import UsageError
from kvscope.harness.engine.batch_decode import BatchDecode
from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.decoding import Request
from kvscope.methods.lsa.indexer import logit
from kvscope.methods.lsa.layout import ChunkLayout
from kvscope.methods.lsa.rule import Rule, densest_pages
from kvscope.methods.registry import create_method

N_TOKENS = 331
"""Neither whole pages nor whole chunks."""


def by_formula(logits, threshold, page_chunks, n_pages):
    """Chunks of the densest pages, counted one by one."""
    pages = [logits[start : start + page_chunks] for start in range(0, len(logits), page_chunks)]
    counts = [sum(1 / (1 + torch.exp(-each).item()) >= threshold for each in page) for page in pages]
    best = sorted(sorted(range(len(pages)), key=lambda page: (-counts[page], page))[:n_pages])
    return [chunk for page in best for chunk in range(page * page_chunks, (page + 1) * page_chunks)]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
@pytest.mark.parametrize(("page_chunks", "n"), [(1, 7), (2, 8), (4, 24), (16, 64)])
def test_the_rule_is_its_formula(page_chunks, n, threshold):
    for seed in range(5):
        logits = torch.randn(n, generator=torch.Generator().manual_seed(seed))
        for n_pages in {0, 1, n // page_chunks // 2, n // page_chunks}:
            rule = Rule(threshold=threshold, n_chunks=n_pages * page_chunks, page_chunks=page_chunks)
            assert rule.of_logits(logits).tolist() == by_formula(logits, threshold, page_chunks, n_pages)


def test_it_is_another_rule_than_the_best_chunks():
    """One chunk far over the threshold loses against a page of three that just reach it."""
    logits = torch.tensor([9.0, -1, -1, -1, 0.1, 0.1, 0.1, -1])
    assert Rule(threshold=0.5, n_chunks=4, page_chunks=4).of_logits(logits).tolist() == [4, 5, 6, 7]
    assert 0 in Rule(n_chunks=4).of_logits(logits).tolist()
    assert densest_pages(logits < -100, page_chunks=4, n_pages=1).tolist() == [0, 1, 2, 3], "equal scores in order"
    with pytest.raises(ValueError, match="no whole pages"):
        densest_pages(logits[:7] > 0, page_chunks=4, n_pages=1)


@pytest.mark.parametrize("sink_tokens", [0, 3, 40])
@pytest.mark.parametrize("n_tokens", [0, 31, 32, 100, 331])
def test_candidates_are_whole_pages(n_tokens, sink_tokens):
    layout = ChunkLayout(n_tokens=n_tokens, chunk_tokens=8, sink_tokens=sink_tokens, recency_tokens=20, page_chunks=4)
    assert layout.n_candidates % 4 == layout.first % 4 == 0
    assert layout.n_candidates >= 0
    kept = sum(end - start for start, end in layout.static_ranges)
    assert kept == layout.static_tokens == n_tokens - layout.candidate_tokens
    if layout.n_candidates:
        assert layout.first * 8 >= sink_tokens
        assert n_tokens - layout.last * 8 >= 20


def paged(tmp_path, loaded, **options):
    folder = tmp_path / "indexer"
    if not folder.exists():
        random_indexer(folder, loaded.shape, chunk_tokens=8)
    given = {"policy": "pages", "page_tokens": 32, "tau": 2, "recency_tokens": 20, **options}
    return create_method({"name": "lsa", "indexer": str(folder), **given})


@pytest.mark.parametrize("options", [
    {"pages": 3},
    {"pages": 3, "refresh": "sync"},
    {"budget_fraction": 0.5, "sink_tokens": 4, "threshold": 0.4},
    {"pages": 0},
], ids=["stale1", "sync", "budget", "no page"])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_evicting_equals_masking(tmp_path, family, options):
    loaded = loaded_model(family)
    method = paged(tmp_path, loaded, **options)
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), method, chunk_tokens=64)
    tokens = prompt_ids(7, seed=8)
    evicted, record, footprint = run_steps(loaded, method, prompt, tokens)
    masked, masked_record, _ = run_steps(loaded, masking(method), prompt, tokens)
    torch.testing.assert_close(evicted, masked, atol=1e-5, rtol=0)
    assert record == masked_record
    dense, _, _ = run_steps(loaded, create_method("dense"), prompt, tokens)
    assert (evicted - dense).abs().max() > 1e-4, "something was left out, or this shows nothing"
    if family == "llama":  # the others' steps are never captured
        fixed, fixed_record, _ = run_steps(loaded, method, prompt, tokens, decode_graph="uncaptured")
        torch.testing.assert_close(fixed, evicted, atol=1e-5, rtol=0)
        assert fixed_record == record
    if method.config.effective_refresh == "sync":
        assert footprint == method.predict(loaded.shape, N_TOKENS, len(tokens))
    config = method.effective_config(N_TOKENS, loaded.shape)
    held = config["always_resident_tokens"] + 32 * config["pages"]
    assert record.resident_tokens[0] == held
    assert all(held <= tokens <= held + 32 * config["pages"] for tokens in record.resident_tokens)


def test_every_page_is_dense(tmp_path):
    loaded = loaded_model("llama")
    method = paged(tmp_path, loaded, pages=1000)
    assert method.is_noop(N_TOKENS, loaded.shape)
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), method, chunk_tokens=64)
    tokens = prompt_ids(5, seed=8)
    logits, _, _ = run_steps(loaded, method, prompt, tokens)
    dense, _, _ = run_steps(loaded, create_method("dense"), prompt, tokens)
    torch.testing.assert_close(logits, dense, atol=1e-5, rtol=0)


def test_what_is_chosen_are_the_densest_pages_of_the_indexers_scores(tmp_path):
    loaded = loaded_model("llama")
    first = paged(tmp_path / "first", loaded, pages=3)
    prompt = prefilled(loaded, prompt_ids(N_TOKENS), first, chunk_tokens=64)
    layout = first.layout(N_TOKENS)
    logits = first.selector(prompt, torch.device("cpu"), layout).logits().amax(0)
    threshold = float(torch.sigmoid(logits.median()))
    method = paged(tmp_path / "first", loaded, pages=3, threshold=threshold)
    selector = method.selector(prompt, torch.device("cpu"), layout)
    reached = [value >= logit(threshold) for value in logits.tolist()]
    assert 0 < sum(reached) < len(reached)
    counts = [sum(reached[start : start + 4]) for start in range(0, len(reached), 4)]
    best = sorted(sorted(range(len(counts)), key=lambda page: (-counts[page], page))[:3])
    assert selector.choose().tolist() == [chunk for page in best for chunk in range(4 * page, 4 * page + 4)]
    assert selector.n_chosen == 12


def test_shared_steps_give_what_each_gives_alone(tmp_path):
    loaded = loaded_model("llama")
    methods = [paged(tmp_path / str(n), loaded, pages=n) for n in (1, 4)]
    requests = []
    for n_tokens in (N_TOKENS, 150):
        ids = prompt_ids(n_tokens, seed=n_tokens)
        for method in methods:
            prompt = prefilled(loaded, ids, method, chunk_tokens=64)
            requests.append(Request(method=method, prompt=prompt, forced_ids=ids[:1], max_new_tokens=7))
    with BatchDecode(loaded) as batch:
        rows = [batch.add(request) for request in requests]
        while batch.under_way:
            batch.step()
    for row, request in zip(rows, requests, strict=True):
        own = decode(loaded, request.method, request.prompt, request.forced_ids, max_new_tokens=7)
        assert row.result is not None
        assert row.result.ids == own.ids
        assert row.result.residency == own.residency
        assert row.result.footprint_mean == own.footprint_mean


def test_the_deployed_numbers():
    """96, 192 and 384 pages at 256K, 512K and 1M tokens, no sinks, one interval late; a budget sets the number too."""
    method = create_method("lsa:policy=pages,indexer=reference,recency_tokens=8192")
    pages = {n: method.effective_config(n * 1024)["pages"] for n in (256, 512, 1024)}
    assert pages == {256: 96, 512: 192, 1024: 384}
    config = method.effective_config(64 * 1024)
    assert (config["mode"], config["sink_tokens"], config["refresh"], config["page_tokens"]) == (
        "pages",
        0,
        "stale1",
        256,
    )
    budgeted = create_method("lsa:policy=pages,indexer=reference,recency_tokens=1024,budget_tokens=4k")
    assert budgeted.effective_config(64 * 1024)["pages"] == 12
    plain = create_method("lsa:indexer=reference").effective_config(64 * 1024)
    assert "pages" not in plain
    assert (plain["refresh"], plain["sink_tokens"]) == ("sync", 4)


def test_what_holds_anyway_changes_no_label():
    assert create_method("lsa:refresh=sync,sink_tokens=4,policy=threshold").label == "lsa"
    assert create_method("lsa:policy=pages,refresh=stale1,sink_tokens=0").label == "lsa:policy=pages"
    assert create_method("lsa:policy=pages,refresh=sync").label == "lsa:policy=pages,refresh=sync"


@pytest.mark.parametrize(("options", "why"), [
    ("policy=page", "policy must be threshold or pages"),
    ("pages=3", "belong to policy=pages"),
    ("policy=pages,indexer=attention", "needs the scores of a trained indexer"),
    ("policy=pages,selection=synthetic,budget_tokens=10", "needs the scores of a trained indexer"),
    ("policy=pages,cap_tokens=10", "do not apply"),
    ("policy=pages,least_tokens=10", "a least share and fallback_ratio do not apply"),
    ("policy=pages,fallback_ratio=0.4", "do not apply"),
    ("policy=pages,pages=2,budget_tokens=10", "pages or a budget"),
    ("policy=pages,pages=-1", "0 or more"),
    ("policy=pages,page_tokens=0", "1 or more"),
])  # fmt: skip
def test_options_that_cannot_be(options, why):
    with pytest.raises(UsageError, match=why):
        create_method(f"lsa:{options}")


def test_pages_of_no_whole_chunks_are_unsupported(tmp_path):
    loaded = loaded_model("llama")
    method = paged(tmp_path, loaded, page_tokens=20)
    (reason,) = method.unsupported(loaded.shape, loaded.device)
    assert "page_tokens=20 is no multiple of the indexer's chunks of 8 tokens" in reason
    assert replace(method.config, page_tokens=24).page_tokens == 24
