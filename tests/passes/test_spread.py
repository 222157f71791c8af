"""``--device-map``: what is planned, refused and written of a model on several devices, pretended on a CPU."""

import io
import json
from typing import Any

import pytest
import torch
from pretended import Pretended, spread

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.engine import device_map, models
from kvscope.harness.engine.device_map import AskedMap
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.facts import describe_model
from kvscope.harness.passes.measurement import measure
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.sweep import run
from kvscope.results.frames import records

TWO = ("cpu:1", "cpu:2")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices, as far as a map is asked for, and models that are loaded by one."""
    own_load = models.load_model

    def load(spec: str, *, modules: Any = None, device: str, **options: Any) -> Any:
        loaded = own_load(spec, device="cpu", **options)
        if modules is None:
            return loaded
        names = {"spec": spec, "name": loaded.name, "revision": loaded.revision}
        return models.wrap_model(
            spread(loaded.model, dict(modules)), loaded.tokenizer, page_tokens=loaded.shape.page_tokens, **names
        )

    monkeypatch.setattr(models, "load_model", load)
    monkeypatch.setattr(device_map, "read_device_map", lambda asked: AskedMap(None, TWO))
    monkeypatch.setattr("kvscope.harness.engine.devices.resolve_device", torch.device)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"device": "cuda:1"}, "device: it says where all of a model is"),
        ({"gpus": "all"}, "gpus: each of them would hold a whole model"),
        ({"jobs": 2}, "jobs: each process would hold a whole model"),
        ({"gpu_budget_bytes": "1GiB"}, "gpu_budget_bytes: it is of one GPU's memory"),
        ({"find_max": True, "tasks": []}, "find_max: it searches in one GPU's memory"),
        ({"throughput": True, "tasks": []}, "throughput: its steps are captured, on one GPU"),
        ({"decode_graph": "on"}, "decode_graph: on: a captured step is of one device"),
        ({"model": "http://127.0.0.1:9/v1", "tokenizer": "reference"}, "device_map: it is about a model that kvscope"),
    ],
)
def test_what_is_of_one_device_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError) as error:
        make_config({**values, "device_map": "balanced"})
    assert str(error.value).startswith(sentence)


def test_the_command_refuses_before_anything_is_measured(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["run", "--out", str(tmp_path / "run"), "--device-map"]
    assert cli.run_cli([*asked, "nowhere.json"]) == 2
    assert "There is no file 'nowhere.json'. Give --device-map auto, balanced or a JSON" in capsys.readouterr().err
    assert cli.run_cli(["plan", "--target", "h100", "--device-map", "auto"]) == 2
    assert "leave out --device-map" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_map_of_one_device_is_that_device(tiny_model: str, tmp_path: Any, small: Any) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"": "cpu"}))
    found = describe_model(tiny_model, device_map=str(path))
    assert (found.device, found.devices, found.where, found.placement) == ("cpu", ("cpu",), "cpu", "cpu")
    assert (found.device_map, found.shape.devices) == (None, ())
    path.write_text(json.dumps({"model.layers.0": "cpu"}))
    with pytest.raises(UsageError, match=r"The device map says nothing of 'model.embed_tokens.weight'"):
        describe_model(tiny_model, device_map=str(path))


@pytest.mark.usefixtures("pretended")
def test_what_runs_on_one_device_alone_says_so(monkeypatch: pytest.MonkeyPatch, tiny_model: str) -> None:
    with pytest.raises(
        UsageError, match=r"'preset:deepseek-v4-flash' cannot be on several devices: .* keeps its cache"
    ):
        describe_model("preset:deepseek-v4-flash", dtype="bfloat16", device_map="auto")
    monkeypatch.setattr("kvscope.harness.engine.without_weights.model_without_weights", lambda *args, **options: None)
    with pytest.raises(UsageError, match=r"its modules are known only when it has loaded; leave out --device-map"):
        describe_model(tiny_model, device_map="auto")


@pytest.mark.usefixtures("pretended")
def test_a_plan_says_which_layers_are_where(small: Any) -> None:
    one, two = (make_plan(small(**values)) for values in ({}, {"device": "auto", "device_map": "auto"}))
    text = "cpu:1 (layer 0), cpu:2 (layer 1)"
    assert two.facts.placement == two.values()["device"] == text
    assert f"on {text}," in " ".join(two.text().split())
    assert (two.facts.where, two.facts.shape.devices) == ("cpu:1, cpu:2", TWO)
    assert [cell.predicted_kv_bytes for cell in two.cells] == [cell.predicted_kv_bytes for cell in one.cells]
    parts = two.facts.device_parts()
    assert [part.cache_share for part in parts] == [0.5, 0.5]
    assert sum(part.weights_bytes for part in parts) == two.facts.weights_bytes == one.facts.weights_bytes


@pytest.mark.usefixtures("pretended", "one_thread")
def test_rows_are_those_of_one_device_and_name_all(small: Any, tmp_path: Any) -> None:
    methods = ["dense", "recency:recency_tokens=128", "snapkv:budget_tokens=128", "dense:kv=int8"]
    one = run(small(methods=methods), progress=False)
    with Pretended():
        two = run(small(methods=methods, device="auto", device_map="auto"), out=tmp_path / "two", progress=False)
    spread_rows = records(two.samples)
    assert {row["device"] for row in spread_rows} == {"cpu:1, cpu:2"}
    assert two.info.environment["device"] == two.info.identity["device"] == "cpu:1 (layer 0), cpu:2 (layer 1)"
    rows = {(row["method_label"], row["sample"]): row for row in records(one.samples)}
    assert len(rows) == len(spread_rows)
    for row in spread_rows:
        expected = rows[row["method_label"], row["sample"]]
        assert row["status"] == "ok"
        assert row["step_backend"].startswith("eager")
        for key in ("output", "score", "resident_kv_bytes", "metadata_bytes", "dense_kv_bytes"):
            assert row[key] == expected[key], key


@pytest.mark.usefixtures("pretended", "one_thread")
def test_a_footprint_cell_is_measured_over_all_devices(small: Any) -> None:
    values = {"methods": ["dense", "quest"], "footprint": True, "footprint_decode_tokens": 4}
    rows = {}
    for key, asked in (("one", {}), ("two", {"device": "auto", "device_map": "auto"})):
        plan = make_plan(small(**values, **asked))
        for method in plan.methods:
            job = plan.passes[1].job(plan, method, 512)
            assert type(job).model_validate_json(job.model_dump_json()) == job
            with Pretended():
                rows[key, method.label] = measure(job, say=io.StringIO())
    for label in ("dense", "quest"):
        found, expected = rows["two", label], rows["one", label]
        assert (found.status, expected.status) == ("ok", "ok"), found.reason
        assert found.device == "cpu:1, cpu:2"
        assert "the model is on 2 devices, and a graph is of one" in found.step_backend
        assert found.resident_kv_bytes == expected.resident_kv_bytes == found.predicted_kv_bytes
        assert found.metadata_bytes == expected.metadata_bytes
