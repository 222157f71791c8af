"""Plans for another machine: held to what was measured on it, and to the committed files that they name."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.facts import ModelFacts, describe_model
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.target import LAYER_S, LAYER_SOURCE, TARGETS, parse_target
from kvscope.harness.passes.target_plan import TargetCell, TargetPlan

ROOT = Path(__file__).parents[2]
H100 = ROOT / "results/reference/h100"
FOLDERS = ["footprint-llama-3.1-8b-synthetic", "footprint-llama-2-7b-synthetic", "footprint-qwen3-0.6b-synthetic"]


def committed(name: str) -> dict[str, Any]:
    return dict(json.loads((ROOT / "benchmarks/results" / name).read_text()))


def planned(target: str, model: str, **values: Any) -> TargetPlan:
    config = make_config({"model": model, "tasks": [], "kv": "synthetic", **values})
    plan = make_plan(config, parse_target(target))
    return plan.elsewhere  # type: ignore[attr-defined,no-any-return]


def only(plan: TargetPlan) -> TargetCell:
    (cell,) = plan.cells
    return cell


def test_bandwidths_are_those_of_the_files_that_are_named() -> None:
    kernels = committed("kernels.json")
    copies = [row["gb_per_s"] for row in kernels["rows"] if row["op"] == "copy"]
    bus = [row["gb_per_s"] for row in kernels["rows"] if row["case"].endswith("(the bus)")]
    h100, h200 = TARGETS["h100"], TARGETS["h200"]
    assert h100.memory_bytes == kernels["environment"]["gpu_memory_bytes"]
    assert h100.copy_bytes_per_s == pytest.approx(1e9 * max(copies), rel=1e-4)
    assert h100.bus_bytes_per_s == pytest.approx(1e9 * max(bus), rel=1e-3)
    shared = committed("shared_steps_h200.json")["throughput"]
    assert h200.memory_bytes == committed("decode_step_h200.json")["environment"]["gpu_memory_bytes"]
    assert h200.copy_bytes_per_s == pytest.approx(shared[0]["copy_bytes_per_s"], rel=1e-4)
    assert h200.bus_bytes_per_s == pytest.approx(shared[0]["bus_bytes_per_s"], rel=1e-2)
    for target in (h100, h200):
        for source in (target.memory_source, target.copy_source, target.bus_source):
            assert (ROOT / source.rpartition(" ")[2]).exists()
    assert (ROOT / LAYER_SOURCE).is_dir()


@pytest.mark.parametrize("folder", FOLDERS)
def test_steps_measured_on_an_h100_lie_in_the_range(folder: str) -> None:
    rows = pd.read_parquet(H100 / folder / "footprint.parquet")
    rows = rows[rows["step_backend"] == "cuda graph"]
    shares = []
    for row in rows.itertuples():
        plan = planned("h100", row.model, methods=[row.method_label], lengths_tokens=[row.length_tokens])
        cell = only(plan)
        assert cell.least_step_s is not None
        assert cell.most_step_s is not None
        assert cell.least_step_s <= row.tpot_s <= cell.most_step_s, row.method_label
        shares.append((row.tpot_s - cell.least_step_s) / (cell.most_step_s - cell.least_step_s))
    assert len(shares) >= 3
    if folder == Path(LAYER_SOURCE).name:
        assert max(shares) == pytest.approx(1, abs=0.03)  # the range is as wide as it has to be, and no wider


def test_the_batch_and_the_step_that_were_measured_on_an_h200() -> None:
    measured = committed("shared_steps_h200.json")["throughput"][0]
    assert (measured["method_label"], measured["batch_bound"]) == ("dense", "device")
    cell = only(planned("h200", "preset:llama-3.1-8b", methods=["dense"], lengths_tokens=["128k"]))
    assert cell.largest_batch == measured["largest_batch"]
    assert cell.least_batch_step_s == pytest.approx(measured["floor_s"], rel=1e-3)
    assert cell.least_batch_step_s <= measured["step_s"] <= (cell.most_batch_step_s or 0)


def test_the_longest_context_that_was_found_on_an_h100() -> None:
    found = pd.read_parquet(H100 / "longest-llama-3.1-8b/max_context.parquet").iloc[0]
    plan = planned("h100", "preset:llama-3.1-8b", methods=["dense"], lengths_tokens=["32k"])
    assert plan.longest_tokens["dense"] == pytest.approx(found["longest_tokens"], rel=0.03)


def test_host_memory_bounds_what_is_recalled_from_it() -> None:
    values = {
        "model": "preset:llama-3.1-8b",
        "tasks": [],
        "methods": ["lsa:selection=synthetic,budget_tokens=16384"],
        "lengths_tokens": ["128k"],
    }
    found = {}
    for host in (None, "64GiB", "8GiB"):
        plan = make_plan(make_config(values), parse_target("h100", host_memory=host))
        cell = only(plan.elsewhere)  # type: ignore[attr-defined]
        found[host] = cell.largest_batch
        assert cell.refresh_s == (pytest.approx(0.039, abs=0.001) if host != "8GiB" else None)
    assert found == {None: 30, "64GiB": 4, "8GiB": 0}
    assert "not held against" in parse_target("h100").lines()[-1]


def test_a_data_sheet_gives_lower_bounds_and_a_size_none() -> None:
    sheet = planned("a100-40", "preset:llama-3.1-8b", methods=["dense"], lengths_tokens=["32k"])
    assert only(sheet).least_step_s == pytest.approx((15.01e9 + 4.295e9) / 1.555e12, rel=0.01)
    assert only(sheet).most_step_s is None
    text = "\n".join([*sheet.target.lines(), *sheet.text()])
    assert "over 12.4" in text
    assert "data sheet" in text
    size = planned("24GiB", "preset:llama-3.1-8b", methods=["dense"], lengths_tokens=["32k", "128k"])
    assert [(cell.largest_batch, cell.least_step_s) for cell in size.cells] == [(2, None), (0, None)]
    assert "OOM" in "\n".join(size.text())
    assert "not known" in "\n".join(size.text())
    assert LAYER_S > 0


def test_packed_pages_have_no_upper_end_and_a_mirror_beside_the_prompt() -> None:
    plan = planned("h200", "preset:llama-3.1-8b", methods=["dense", "dense:kv=int4"], lengths_tokens=["128k"])
    raw, packed = plan.cells
    assert raw.most_step_s is not None
    assert (packed.most_step_s, packed.most_batch_step_s) == (None, None)
    assert packed.least_step_s is not None and packed.least_step_s < (raw.least_step_s or 0)  # noqa: PT018
    assert "Packed pages (kv) are unpacked as they are read" in "\n".join(plan.text())
    values = {"model": "preset:llama-3.1-8b", "tasks": [], "lengths_tokens": ["128k"], "page_tokens": 64}
    label = "lsa:selection=synthetic,budget_tokens=16384,kv=int4"
    for host, batch in (("24GiB", 1), ("20GiB", 0), ("64GiB", 10)):
        made = make_plan(make_config({**values, "methods": [label]}), parse_target("h200", host_memory=host))
        cell = only(made.elsewhere)  # type: ignore[attr-defined]
        assert cell.largest_batch == batch, host
        (longest_tokens,) = made.elsewhere.longest_tokens.values()  # type: ignore[attr-defined]
        assert (longest_tokens >= 128 * 1024) == bool(batch)


def test_experts_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from kvscope.harness.passes import plan as module

    def of_experts(*args: Any, **options: Any) -> ModelFacts:
        return dataclasses.replace(describe_model(*args, **options), step_weights_bytes=None)

    monkeypatch.setattr(module, "describe_model", of_experts)
    plan = planned("h100", "preset:tiny", methods=["dense"], lengths_tokens=["1k"])
    assert only(plan).least_step_s is None
    assert "which experts' weights a step reads" in "\n".join(plan.text())
    assert describe_model("preset:deepseek-v4-flash", elsewhere=True).step_weights_bytes is None


def test_the_accuracy_pass_is_planned_for_that_machine_too(tiny_model: str) -> None:
    values: dict[str, Any] = {"model": tiny_model, "methods": ["dense"], "tasks": ["niah_single_1"], "samples": 200}
    values |= {"lengths_tokens": [512]}
    plan: Any = make_plan(make_config(values), parse_target("h100", host_memory="128GiB"))
    assert (plan.facts.device, plan.facts.dtype) == ("cuda:0", "bfloat16")
    assert plan.batch_rows(512) == 144
    assert "bfloat16 on h100" in plan.text()
    narrow = plan.text(width=60)
    assert max(map(len, narrow.split("\n"))) <= 60
    small: Any = make_plan(make_config(values), parse_target("910MiB"))
    assert 1 < small.batch_rows(512) < 144


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--target", "h300"], "--target: 'h300' is no machine: write h100, h200, a100-40 or a size as 24GiB."),
        (["--target", "24"], "--target: '24' is no machine"),
        (["--target", "0"], "--target: '0' is no machine"),
        (["--target", "h100", "--host-memory", "much"], "--host-memory: 'much' is no size"),
        (["--host-memory", "8GiB"], "give that, too"),
        (["--target", "h100", "--device", "cpu"], "leave out --device"),
        (["--target", "h100", "--gpus", "0"], "leave out --gpus"),
        (["--target", "h100", "--model", "http://127.0.0.1:9/v1", "--tokenizer", "reference"], "nobody knows a server"),
    ],
)
def test_bad_targets_are_one_sentence(options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_cli(["plan", *options]) == UsageError.exit_code
    assert sentence in capsys.readouterr().err


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model", "preset:tiny", "-m", "dense", "-l", "1k", "--target", "h100", "--json"]
    assert cli.run_cli(["plan", *options]) == 0
    values = json.loads(capsys.readouterr().out)["elsewhere"]
    assert values["target"]["name"] == "h100"
    assert values["longest_tokens"]["dense"] > 1024
    assert values["cells"][0]["least_step_s"] < values["cells"][0]["most_step_s"]
