"""A method without captured steps leaves those of the others captured, and answers as it does alone."""

from pathlib import Path
from typing import Any

import pytest
from sessions import TogetherStep, captured_here
from tiny import MakeConfig

from kvscope.harness.engine import lanes
from kvscope.harness.engine.decoding import Request
from kvscope.harness.engine.lanes import Lanes
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.session import Session
from kvscope.harness.engine.synthetic import synthetic_prompt
from kvscope.harness.passes.sweep import run
from kvscope.methods.base import union_collectors
from kvscope.methods.registry import create_method

CAPTURED = ["dense", "recency:recency_tokens=128", "snapkv:budget_tokens=96"]
EAGER = ["adakv:budget_tokens=96", "h2o:budget_tokens=96", "tova:budget_tokens=96"]


def rows_of(config: Any) -> dict[tuple[str, int], dict[str, Any]]:
    frame = run(config, progress=False).samples
    assert set(frame["status"]) == {"ok"}, frame["reason"].tolist()
    return {(row["method_label"], row["sample"]): row for row in frame.to_dict("records")}


@pytest.mark.parametrize("order", [CAPTURED + EAGER, EAGER + CAPTURED])
def test_steps_of_the_others_stay_captured(
    small: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, order: list[str]
) -> None:
    values: dict[str, Any] = {"methods": order, "samples": 2, "lengths_tokens": [512], "max_new_tokens": 6}
    eager = rows_of(small(**values, out=str(tmp_path / "eager")))
    captures = captured_here(monkeypatch)
    opened: list[str] = []
    add = lanes.BatchDecode.add

    def counted(self: Any, request: Any) -> Any:
        opened.append(request.method.label)
        return add(self, request)

    monkeypatch.setattr(lanes.BatchDecode, "add", counted)
    found = rows_of(small(**values, accuracy_graph=True, out=str(tmp_path / "captured")))
    assert captures
    for (label, sample), row in found.items():
        assert row["step_backend"].startswith("cuda graph" if label in CAPTURED else "eager: "), label
        other = eager[label, sample]
        assert {key: row[key] for key in ("output", "score", "prompt_sha256", "metadata_bytes")} == {
            key: other[key] for key in ("output", "score", "prompt_sha256", "metadata_bytes")
        }
    # Turned away once, and known from then on.
    assert {label: opened.count(label) for label in EAGER} == dict.fromkeys(EAGER, 3)
    assert {label: opened.count(label) for label in CAPTURED} == dict.fromkeys(CAPTURED, 2)


def test_a_length_that_has_no_captured_step_leaves_the_others_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A context of 120 tokens outgrows a budget of 128 while it decodes, and one of 200 tokens has done so before."""
    monkeypatch.setattr(Session, "graph_step", TogetherStep)
    loaded, method = load_model("preset:tiny", device="cpu", dtype="float32"), create_method("quest:budget_tokens=128")
    collectors = union_collectors([method], loaded.shape.layers)
    short, long = (synthetic_prompt(loaded, n, mirror=False, collectors=collectors) for n in (120, 200))
    with Lanes(loaded, counts_spare=False, spare_share=1.0, step_rows=None) as both:
        both.set_graph("auto")
        for prompt in (short, short, long):
            both.add(Request(method=method, prompt=prompt, forced_ids=[5], max_new_tokens=16))
        assert (both._eager.n_rows, both._first.n_rows) == (2, 1)


def test_a_model_that_has_no_captured_step_has_one_lane(small: MakeConfig) -> None:
    """On a CPU nothing is captured: all step together, and say why."""
    found = rows_of(small(methods=["dense", EAGER[0]], samples=2, lengths_tokens=[512], accuracy_graph=True))
    assert {row["batch"] for row in found.values()} == {4}
    assert all("the device is cpu" in row["step_backend"] for row in found.values())
