"""Comparisons over a run: pairing, scopes, Holm within a scope, and the sentence of an open case."""

import pytest
from synthetic_rows import KINDS, demo_rows, make_rows, wide_rows

from kvscope.errors import UsageError
from kvscope.results.comparisons import baseline_label, cluster_names, compare_methods, pairs
from kvscope.results.frames import Run, make_run
from kvscope.results.statistics import holm


def demo() -> Run:
    samples, footprints, info = demo_rows()
    return make_run(samples, footprints, info=info, folder=".")


def test_every_scope_compares_every_method_once() -> None:
    run = demo()
    found = compare_methods(run.samples, info=run.info)
    scopes = ["all prompts", "1024 tokens", "2048 tokens", "4096 tokens", "8192 tokens"]
    scopes += ["niah_single_1", "niah_multikey_2"]
    assert [(c.scope, c.method_label) for c in found] == [
        (scope, label) for scope in scopes for label in ("sliding_window", "recency", "random")
    ]
    pooled = found[:3]
    assert all(c.paired.n_pairs == 40 for c in pooled)
    assert [c.p_holm for c in pooled] == pytest.approx(holm([c.paired.p_value for c in pooled]))
    assert all(c.verdict == "worse" for c in pooled)
    mean = run.samples[run.samples["method_label"] == "recency"]["score"].mean()
    assert found[1].method_mean == pytest.approx(mean)


def test_only_common_prompts_are_paired() -> None:
    run = demo()
    kept = run.samples.drop(index=run.samples[run.samples["method_label"] == "random"].index[:7])
    assert len(pairs(kept, method="random", baseline="dense")) == 33
    failed = run.samples.copy()
    failed.loc[failed["method_label"] == "dense", "status"] = "failed"
    assert compare_methods(failed, info=run.info) == []


def test_different_prompts_are_never_compared() -> None:
    run = demo()
    run.samples.loc[0, "prompt_sha256"] = "0" * 64
    with pytest.raises(UsageError, match="answered different prompts at niah_single_1, 1024 tokens, sample 0"):
        compare_methods(run.samples, info=run.info)


def test_an_open_case_says_what_would_do() -> None:
    samples, footprints, info = make_rows(
        ["dense", "quest"], tasks=("niah_single_1",), lengths=(2048,), samples=5, footprint_lengths=()
    )
    run = make_run(samples, footprints, info=info, folder=".")
    (only,) = compare_methods(run.samples, info=run.info)
    assert only.scope == "all prompts"
    assert only.verdict == "inconclusive"
    assert only.sentence == ("inconclusive: 0 of 5 pairs differ, at least 6 are needed; about 42 pairs would do")


def test_no_dense_no_comparison() -> None:
    samples, footprints, info = make_rows(
        ["recency", "random"], tasks=("niah_single_1",), lengths=(2048,), samples=5, footprint_lengths=()
    )
    assert baseline_label(info) is None
    assert compare_methods(make_run(samples, footprints, info=info, folder=".").samples, info=info) == []


def test_out_of_memory_rows_leave_the_other_prompts_compared() -> None:
    samples, footprints, info = wide_rows()
    run = make_run(samples, footprints, info=info, folder=".")
    found = {(c.scope, c.method_label): c for c in compare_methods(run.samples, info=run.info)}
    pooled = found["all prompts", "recency"]
    assert pooled.paired.n_pairs == 7 * 3 * 20
    assert ("524288 tokens", "recency") not in found
    assert set(KINDS) - {"dense"} == {label for scope, label in found if scope == "all prompts"}


def test_nll_is_compared_where_both_have_it() -> None:
    run = demo()
    samples = run.samples.copy()
    samples.loc[samples["method_label"] == "dense", "answer_nll"] = 0.5
    samples.loc[samples["method_label"] == "recency", "answer_nll"] = 0.75
    found = {c.method_label: c for c in compare_methods(samples, info=run.info) if c.scope == "all prompts"}
    recency = found["recency"].nll
    assert recency is not None
    assert (recency.mean, recency.low, recency.high, recency.n) == pytest.approx((0.25, 0.25, 0.25, 40))
    assert found["random"].nll is None


def test_clusters_name_shared_contexts_and_keep_the_rest_apart() -> None:
    assert cluster_names(["a", None, "a", None]) == ["context a", "row 1", "context a", "row 3"]
    names = cluster_names(["row 1", None])
    assert names is not None
    assert len(set(names)) == 2, "a context of such a name is no other row's"
    assert cluster_names([None, None]) is None
