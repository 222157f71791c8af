"""The accuracy pass with captured steps: the same rows as with eager ones, and each says how its steps ran.

Without a GPU a stand-in for the capture runs the step of fixed addresses at every replay.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from lsa_tools import random_indexer
from sessions import captured_here
from tiny import MakeConfig
from tiny_models import save_model

from kvscope.harness.engine import decode_graph
from kvscope.harness.engine.decode_graph import GraphStep
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.session import Session
from kvscope.harness.passes.answering import Prompt
from kvscope.harness.passes.sweep import run
from kvscope.methods.lsa import sequence as lsa_sequence
from kvscope.methods.shape import ModelShape
from kvscope.results.columns import SURROUNDINGS_COLUMNS, TIME_COLUMNS

PAGE_TOKENS = 16
N_TOKENS = 14
FIXED = ["dense", "recency:recency_tokens=128", "sliding_window:window=100", "random:fraction=0.3,recency_tokens=64"]
CHOOSING = ["quest", "moba", "msa", "dsa:indexer=oracle"]
BY_ATTENTION = "lsa:indexer=attention,chunk_tokens=16,recency_tokens=64"
#: What differs from one time to the next, and the column under test.
UNLIKE = TIME_COLUMNS | SURROUNDINGS_COLUMNS | {"step_backend"}
#: What a step of fixed addresses holds besides.
HELD = ["resident_kv_bytes", "metadata_bytes"]
ON_HOST = "eager: a step that chooses blocks needs the kernels, which a GPU has"


def lsa_rules(threshold: float) -> list[str]:
    """Return options of lsa: what decides how much is chosen, and when it arrives."""
    rules = ("budget_fraction=0.4", f"threshold={threshold}")
    return [f"{rule},tau=3,refresh={refresh}" for rule in rules for refresh in ("sync", "stale1")]


Rows = tuple[pd.DataFrame, pd.DataFrame]
Runs = tuple[pd.DataFrame, pd.DataFrame, ModelShape]


def both_ways(values: dict[str, Any], folder: Path) -> Rows:
    """Return the sample rows of a run with eager steps and of one with captured ones, by method and prompt."""
    frames = []
    for graph in (False, True):
        out = str(folder / ("graph" if graph else "eager"))
        frame = run({**values, "batch": 1, "accuracy_graph": graph, "out": out}, progress=False).samples
        assert set(frame["status"]) == {"ok"}, frame["reason"].tolist()
        frames.append(frame.set_index(["method_label", "task", "length_tokens", "sample"]).sort_index())
    return frames[0], frames[1]


def assert_same_rows(eager: pd.DataFrame, graph: pd.DataFrame) -> None:
    """Answers, scores, what was chosen and recalled, every mean of the ledger: all but ``HELD``, which see below."""
    columns = [name for name in eager.columns if name not in (*UNLIKE, *HELD, "answer_nll", "least_logit_gap")]
    pd.testing.assert_frame_equal(graph[columns], eager[columns])
    pd.testing.assert_frame_equal(graph[["answer_nll"]], eager[["answer_nll"]], rtol=1e-3)
    pd.testing.assert_series_equal(graph["least_logit_gap"], eager["least_logit_gap"], atol=1e-4)


def backends(frame: pd.DataFrame) -> dict[str, set[str]]:
    """Return, by method, how steps ran."""
    return {str(label): set(rows) for label, rows in frame.groupby("method_label")["step_backend"]}


TWO_LAYERS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2},
    "afmoe": {"num_hidden_layers": 2, "num_dense_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.fixture(scope="module", params=[("llama", 0.52), ("afmoe", 0.5)], ids=["llama", "afmoe"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every kind of method on the same prompts, both ways; afmoe has sliding-window layers of its own.

    Prompts without repeated text: chunks of equal scores would be told apart by rounding.
    """
    family, threshold = request.param
    folder = tmp_path_factory.mktemp(family)
    model = save_model(folder / "model", family, **TWO_LAYERS[family])
    shape = load_model(model, device="cpu", page_tokens=PAGE_TOKENS).shape
    indexer = random_indexer(folder / "indexer", shape, seed=3)
    lsa = [f"lsa:indexer={indexer},recency_tokens=64,{rule}" for rule in lsa_rules(threshold)]
    values = {
        "model": model, "methods": [*FIXED, *lsa, *CHOOSING, BY_ATTENTION], "tasks": ["niah_multikey_2", "cwe"],
        "lengths_tokens": [640], "samples": 1, "max_new_tokens": N_TOKENS, "answer_nll": True, "footprint": False,
        "device": "cpu", "page_tokens": PAGE_TOKENS, "prefill_chunk_tokens": 256,
    }  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        captures = captured_here(monkeypatch)
        eager, graph = both_ways(values, folder)
    torch.set_num_threads(threads)
    n_opened = 3  # for both answers, and for the likelihood of the longer one
    # More than once where a choice outgrew the slots.
    assert len(captures) > n_opened * (len(FIXED) + len(lsa))
    return eager, graph, shape


@pytest.mark.slow
def test_rows_are_those_of_eager_steps(runs: Runs) -> None:
    eager, graph, _ = runs
    assert_same_rows(eager, graph)
    assert graph["output"].nunique() > 8
    assert (graph["decode_tokens"] == N_TOKENS).any()
    assert graph["answer_nll"].notna().all()
    varying = [row["resident_tokens"] for row in graph["residency"].dropna()]
    assert any(len(set(tokens)) > 2 for tokens in varying)


def test_rows_say_how_their_steps_ran(runs: Runs) -> None:
    eager, graph, _ = runs
    assert set(eager["step_backend"]) == {"eager"}
    told = backends(graph)
    assert {label: told[label] for label in FIXED} == {label: {"cuda graph"} for label in FIXED}
    by_indexer = [label for label in told if label.startswith("lsa") and "attention" not in label]
    assert len(by_indexer) == 4
    assert all(told[label] == {"cuda graph"} for label in by_indexer)
    for name in ("quest", "moba", "msa", "dsa"):
        [texts] = [told[label] for label in told if label.startswith(name)]
        assert all(text.startswith(ON_HOST) for text in texts)
    (by_attention,) = (label for label in told if "indexer=attention" in label)
    assert told[by_attention] == {"eager: chunks are chosen by the attention of the step itself"}


def test_captured_steps_hold_what_they_must_and_the_ledger_counts_it(runs: Runs) -> None:
    """Rings of whole pages in the model's own layers, lsa's tables, and its spare slots unless every choice is as large
    as the first and nothing arrives late."""
    eager, graph, shape = runs
    window, n_layers = shape.sliding_window, len(shape.sliding_layers)
    ring_bytes = n_layers * (-window % PAGE_TOKENS) * shape.layer_bytes_per_token
    more = graph[HELD] - eager[HELD]
    replayed = graph["step_backend"] == "cuda graph"
    assert (more[~replayed] == 0).all(axis=None)
    method, labels = graph["method"], graph.index.get_level_values("method_label")
    assert (more[replayed & (method != "lsa")] == [ring_bytes, 0]).all(axis=None)
    lsa = replayed & (method == "lsa")
    assert (more[lsa]["metadata_bytes"] > 0).all()
    spare = labels.str.contains("stale1") | ~labels.str.contains("budget")
    assert (more[lsa & ~spare]["resident_kv_bytes"] == ring_bytes).all()
    assert (more[lsa & spare]["resident_kv_bytes"] > ring_bytes).all()


def test_a_stop_string_ends_the_same_answers(
    small: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = small(max_new_tokens=24).model_dump()
    captured_here(monkeypatch)
    eager, _ = both_ways(values, tmp_path / "whole")
    stop = eager["output"].iloc[0][8:10]
    built = Prompt.__init__

    def with_stop(self: Prompt, plan: Any, loaded: Any, task: Any, sample: Any, progress: Any) -> None:
        built(self, plan, loaded, task, dataclasses.replace(sample, stop=(stop,)), progress)

    monkeypatch.setattr(Prompt, "__init__", with_stop)
    cut, graph = both_ways(values, tmp_path / "cut")
    assert_same_rows(cut, graph)
    assert set(graph["step_backend"]) == {"cuda graph"}
    assert graph["stop_reason"].iloc[0] == "stop"
    assert graph["decode_tokens"].iloc[0] < eager["decode_tokens"].iloc[0]


@pytest.mark.parametrize(("max_new_tokens", "backend"), [
    (4, "eager: 4 steps at most, and a capture pays from 5"),
    (5, "cuda graph"),
])  # fmt: skip
def test_answers_that_must_be_short_are_not_worth_a_capture(
    max_new_tokens: int, backend: str, small: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last new token is never fed: five of them are the prompt's last token and four more steps."""
    captures = captured_here(monkeypatch)
    frame = run(small(batch=1, accuracy_graph=True, max_new_tokens=max_new_tokens), progress=False).samples
    assert set(frame["step_backend"]) == {backend}
    assert len(captures) == (4 if backend == "cuda graph" else 0)


@pytest.mark.parametrize(("pays_from", "captured"), [(4, True), (5, False)])
def test_a_likelihood_is_captured_by_its_own_steps(
    pays_from: int, captured: bool, small: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The needle's value is four tokens, of which three are fed behind the prompt's last."""
    captures = captured_here(monkeypatch)
    monkeypatch.setattr(decode_graph, "PAYS_FROM_STEPS", pays_from)
    run(small(batch=1, accuracy_graph=True, max_new_tokens=8, answer_nll=True, methods=["dense"]), progress=False)
    assert len(captures) == 2 * (2 if captured else 1)


def test_on_a_cpu_rows_say_why(small: MakeConfig) -> None:
    frame = run(small(batch=1, accuracy_graph=True, max_new_tokens=24), progress=False).samples
    assert set(frame["step_backend"]) == {"eager: the device is cpu"}
    assert set(frame["status"]) == {"ok"}


def test_a_model_with_experts_runs_eager_and_says_so(
    small: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured_here(monkeypatch)
    model = save_model(tmp_path / "model", "gpt_oss")
    eager, graph = both_ways(small(model=model, methods=["dense"], max_new_tokens=8).model_dump(), tmp_path)
    assert_same_rows(eager, graph)
    assert set(graph["step_backend"]) == {"eager: which experts a token goes to is known to the device alone"}


def test_without_triton_lsa_runs_eager_and_says_so(
    small: MakeConfig, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured_here(monkeypatch)
    monkeypatch.setattr(lsa_sequence, "triton_version", lambda: (None, "Triton is not installed"))
    shape = load_model(tiny_model, device="cpu").shape
    indexer = random_indexer(tmp_path / "indexer", shape)
    config = small(methods=["dense", f"lsa:indexer={indexer},budget_fraction=0.5,recency_tokens=64"], max_new_tokens=8)
    eager, graph = both_ways(config.model_dump(), tmp_path)
    assert_same_rows(eager, graph)
    told = backends(graph)
    assert told.pop("dense") == {"cuda graph"}
    assert list(told.values()) == [{"eager: Triton is not installed"}]


def test_a_capture_that_fails_leaves_the_eager_row(
    small: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured_here(monkeypatch)

    def fail(self: GraphStep) -> None:
        self._forward()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Session.graph_step, "_capture", fail)
    eager, graph = both_ways(small(max_new_tokens=8, answer_nll=True).model_dump(), tmp_path)
    assert_same_rows(eager, graph)
    pd.testing.assert_frame_equal(graph[HELD], eager[HELD])
    assert set(graph["step_backend"]) == {
        "eager: the model's step cannot be captured (operation not permitted when stream is capturing)"
    }


# -- on a GPU


@pytest.mark.gpu
@pytest.mark.slow
def test_captured_rows_of_the_reference_model_are_the_eager_ones(tmp_path: Path) -> None:
    lsa = [f"lsa:recency_tokens=128,{rule}" for rule in lsa_rules(0.5)]
    values = {
        "model": "reference", "methods": [*FIXED, *lsa, "quest", "moba", "msa", "dsa", BY_ATTENTION],
        "tasks": ["niah_multikey_2", "niah_multikey_3"], "lengths_tokens": [2048], "samples": 3, "answer_nll": True,
        "footprint": False, "device": "cuda", "dtype": "float32",
    }  # fmt: skip
    eager, graph = both_ways(values, tmp_path)
    assert_same_rows(eager, graph)
    for label, told in backends(graph).items():
        by_attention = {"eager: chunks are chosen by the attention of the step itself"}
        assert told == (by_attention if "indexer=attention" in label else {"cuda graph"})
    # The model's window is whole pages, so that a ring holds no more than its stock cache.
    others = graph["method"] != "lsa"
    pd.testing.assert_frame_equal(graph[others][HELD], eager[others][HELD])
