"""The model of a sweep's cost: it finds known costs again, and what is committed holds within 15 %."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def scale_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import scale_model

    return scale_model


def test_known_costs_are_found_again(scale_model: Any) -> None:
    truth = {"s": 3.0, "p": 0.2, "a": 1e-4, "b": 4e-9, "c": 0.05, "d": 2e-6}
    rows, seconds = [], []
    for length in (1024, 2048, 4096, 8192):
        for n in (1, 4):
            works = {name: n * (at + 3) for at, name in enumerate(scale_model.METHODS)}
            work = scale_model.Work(
                n_prompts=n, tokens=n * length, tokens2=n * length**2, steps=works,
                step_tokens={name: k * length for name, k in works.items()},
            )  # fmt: skip
            rows.append(work.row())
            steps = sum(works.values())
            seconds.append(
                truth["s"] + n * (truth["p"] + truth["a"] * length + truth["b"] * length**2)
                + steps * (truth["c"] + truth["d"] * length)
            )  # fmt: skip
    factors = scale_model.fitted(rows, seconds)
    assert np.dot(rows, factors) == pytest.approx(seconds, rel=1e-6)
    assert (factors >= 0).all()


def test_what_was_held_out_is_predicted_within_15_percent(scale_model: Any) -> None:
    committed = json.loads(scale_model.FILE.read_text())
    checked = [
        *scale_model.cpu_model(committed["cpu"])["runs"],
        *scale_model.prefill_model()["checked"],
        *scale_model.step_model()["checked"],
    ]
    held_out = [each for each in checked if each["held_out"]]
    assert len(held_out) >= 8
    assert max(abs(each["off"]) for each in held_out) <= 0.15


def test_a_million_prompts_are_multiplied_out(scale_model: Any) -> None:
    found = scale_model.million(gpus=64)
    assert found["gpu_hours"] == pytest.approx(found["prompt_s"] * 1e6 / 3600, rel=1e-3)
    assert found["days"] == pytest.approx(found["gpu_hours"] / 64 / 24, rel=1e-2)
    assert scale_model.million(gpus=32)["days"] == pytest.approx(2 * found["days"], rel=1e-2)


def test_the_writer_is_the_real_one(scale_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import scale_writer

    monkeypatch.setattr(scale_writer, "ROWS", (400,))
    (found,) = scale_writer.writer_figures()
    assert found["rows"] == 400
    assert found["cpu_ms_per_row"] > 0
    assert found["file_bytes_per_row"] > 500
