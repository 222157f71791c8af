"""Batches: the same tokens as one by one, the largest that fits, and its row."""

from typing import Any

import pytest
import torch
from in_process import MIB, run_here

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.engine import batch, decode_graph
from kvscope.harness.engine.batch import BatchSession
from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.synthetic import synthetic_prompt
from kvscope.harness.passes.sweep import failures, run
from kvscope.methods.base import union_collectors
from kvscope.methods.dense.method import Dense
from kvscope.methods.registry import create_method
from kvscope.methods.resident import ResidentSequence

LSA = "lsa:tau=2,budget_tokens=512,recency_tokens=128,selection=synthetic"
VALUES = {
    "model": "preset:tiny",
    "methods": ["dense", LSA],
    "throughput": True,
    "lengths_tokens": ["2k"],
    "device": "cpu",
    "footprint_decode_tokens": 6,
    "max_batch": 8,
}


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("preset:tiny", device="cpu")


@pytest.mark.parametrize("graph", ["off", "auto", "uncaptured"])
@pytest.mark.parametrize("spec", ["dense", "recency", "sliding_window", "quest:budget_tokens=256", LSA])
def test_a_batch_decodes_what_each_sequence_decodes_alone(tiny: LoadedModel, spec: str, graph: Any) -> None:
    fixed = graph == "uncaptured"  # the step of a CUDA graph, run as it is
    if fixed and spec.startswith("quest"):
        pytest.skip("quest has no step of fixed addresses")
    method = create_method(spec)
    assert method.unsupported(tiny.shape, tiny.device) == []
    prompt = synthetic_prompt(tiny, 1500, mirror=True, collectors=union_collectors([method], tiny.shape.layers), seed=1)
    firsts, n_steps = [5, 77, 200], 5
    alone = [decode(tiny, method, prompt, [first], max_new_tokens=n_steps) for first in firsts]
    with BatchSession(tiny, method, prompt, reserve_tokens=n_steps, decode_graph=graph) as session:
        for _ in firsts:
            session.add()
        tokens_B, rows = torch.tensor(firsts), []
        for _ in range(n_steps):
            tokens_B = session.step(tokens_B)
            rows.append(tokens_B.tolist())
        total, recalled_bytes = session.footprint(), session.bytes_recalled()
        backend = session.step_backend
    assert backend.partition(";")[0] == ("eager: the device is cpu" if graph == "auto" else "eager")
    assert [list(column) for column in zip(*rows, strict=True)] == [result.ids for result in alone]
    assert len({tuple(result.ids) for result in alone}) > 1
    # A step of fixed addresses holds spare slots beside what it reads.
    held_bytes = sum(result.footprint_last.kv_bytes for result in alone)
    assert total.kv_bytes == held_bytes or (fixed and spec == LSA and total.kv_bytes > held_bytes)
    assert recalled_bytes == sum(result.bytes_recalled for result in alone)
    assert (recalled_bytes > 0) == (spec == LSA)
    assert total.host_bytes == alone[0].footprint_last.host_bytes
    assert session.sequences == []


def test_a_graph_that_is_demanded_and_cannot_be_had_is_refused(tiny: LoadedModel) -> None:
    prompt = synthetic_prompt(tiny, 100, mirror=False, seed=1)
    with (
        BatchSession(tiny, Dense(), prompt, reserve_tokens=2, decode_graph="on") as session,
        pytest.raises(UsageError, match="the device is cpu"),
    ):
        session.add()
    assert session.sequences == []


def test_a_sequence_that_does_not_fit_leaves_the_batch_as_it_was(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory may end after a sequence was opened, where its addresses are fixed: it must not decode with the others."""
    make_static = ResidentSequence.make_static
    asked: list[ResidentSequence] = []

    def third_fails(self: ResidentSequence) -> None:
        asked.append(self)
        if len(asked) == 3:
            raise torch.OutOfMemoryError("no room for it")
        make_static(self)

    monkeypatch.setattr(ResidentSequence, "make_static", third_fails)
    prompt = synthetic_prompt(tiny, 700, mirror=False, seed=1)
    with BatchSession(tiny, Dense(), prompt, reserve_tokens=2, decode_graph="uncaptured") as session:
        session.add()
        session.add()
        held_bytes = session.footprint().kv_bytes
        with pytest.raises(torch.OutOfMemoryError, match="no room"):
            session.add()
        assert session.sequences == asked[:2]
        assert asked[2].pool.n_bytes == 0
        assert session.step(torch.tensor([5, 77])).shape == (2,)
        assert session.footprint().kv_bytes == held_bytes > 0


def test_a_forward_that_cannot_be_captured_opens_the_batch_anew(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``auto`` on a GPU meets a model that reads back inside its forward."""
    monkeypatch.setattr(batch, "graph_reasons", batch.static_reasons)
    monkeypatch.setattr(decode_graph.StaticStep, "_capture", _refuse)
    prompt = synthetic_prompt(tiny, 700, mirror=False, seed=1)
    alone = decode(tiny, Dense(), prompt, [9], max_new_tokens=4)
    with BatchSession(tiny, Dense(), prompt, reserve_tokens=4, decode_graph="auto") as session:
        for _ in range(3):
            session.add()
        tokens_B, rows = torch.tensor([9, 9, 9]), []
        for _ in range(4):
            tokens_B = session.step(tokens_B)
            rows.append(tokens_B.tolist())
        assert len(session.sequences) == 3
        assert session.step_backend == "eager: the model's step cannot be captured (it reads back)"
    assert rows == [[token] * 3 for token in alone.ids]
    with BatchSession(tiny, Dense(), prompt, reserve_tokens=4, decode_graph="on") as session:
        session.add()
        with pytest.raises(RuntimeError, match="reads back"):
            session.step(torch.tensor([9]))


def test_a_batch_whose_pages_grow_is_captured_again(tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what stands in for the graph runs the forward again, at the addresses of its capture."""
    captures = []

    class Replays:
        def __init__(self, step: Any) -> None:
            self.step = step

        def replay(self) -> None:
            self.step._logits_BV = self.step._forward()

    def capture(self: Any) -> None:
        self.release()
        self._forward()
        self._graph, self._versions = Replays(self), self._static_versions()
        captures.append(len(self._sequences))

    monkeypatch.setattr(batch, "graph_reasons", batch.static_reasons)
    monkeypatch.setattr(decode_graph.StaticStep, "_capture", capture)
    prompt, n_steps = synthetic_prompt(tiny, 6 * 64 - 3, mirror=False, seed=1), 8
    alone = [decode(tiny, Dense(), prompt, [first], max_new_tokens=n_steps) for first in (5, 77)]
    with BatchSession(tiny, Dense(), prompt, reserve_tokens=0, decode_graph="on") as session:
        session.add()
        session.add()
        tokens_B, rows = torch.tensor([5, 77]), []
        for _ in range(n_steps):
            tokens_B = session.step(tokens_B)
            rows.append(tokens_B.tolist())
        assert session.step_backend == "cuda graph"
    assert [list(column) for column in zip(*rows, strict=True)] == [result.ids for result in alone]
    assert captures == [2, 2]  # before the first step, and where the fourth token found no room


def _full_while_capturing(self: Any) -> None:
    try:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
    finally:
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def _full_in_other_words(self: Any) -> None:
    raise RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize("capture", [_full_while_capturing, _full_in_other_words])
def test_memory_that_ends_in_a_capture_is_no_reason_to_go_eager(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, capture: Any
) -> None:
    """A smaller batch is tried then; an eager one of this size would be another measurement."""
    monkeypatch.setattr(batch, "graph_reasons", batch.static_reasons)
    monkeypatch.setattr(decode_graph.StaticStep, "_capture", capture)
    prompt = synthetic_prompt(tiny, 100, mirror=False, seed=1)
    with BatchSession(tiny, Dense(), prompt, reserve_tokens=2, decode_graph="auto") as session:
        session.add()
        with pytest.raises(RuntimeError, match="out of memory"):
            session.step(torch.tensor([1]))
    assert session.sequences == []


def _refuse(self: Any) -> None:
    raise RuntimeError("it reads back")


def test_sequences_of_one_step_have_to_be_at_one_position(tiny: LoadedModel) -> None:
    prompt = synthetic_prompt(tiny, 100, mirror=False, seed=1)
    with BatchSession(tiny, Dense(), prompt, reserve_tokens=4, decode_graph="uncaptured") as session:
        session.add()
        session.step(torch.tensor([1]))
        other = Dense().open(synthetic_prompt(tiny, 50, mirror=False, seed=1), tiny.device, reserve_tokens=4)
        other.make_static()
        step = decode_graph.StaticStep(
            tiny, [*session.sequences, other], None, before=lambda position: None, captured=False
        )
        with pytest.raises(ValueError, match="one position"):
            step(torch.tensor([1, 2]))
        other.close()


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["dense", "recency", LSA])
def test_a_captured_batch_decodes_what_an_eager_one_does(spec: str) -> None:
    loaded = load_model("preset:tiny", device="cuda")
    method = create_method(spec)
    assert method.unsupported(loaded.shape, loaded.device) == []
    prompt = synthetic_prompt(loaded, 1500, mirror=True, collectors=union_collectors([method], loaded.shape.layers))
    found = {}
    for graph in ("off", "on"):
        with BatchSession(loaded, method, prompt, reserve_tokens=8, decode_graph=graph) as session:
            for _ in range(3):
                session.add()
            tokens_B, rows = torch.tensor([5, 77, 200], device="cuda"), []
            for _ in range(8):
                tokens_B = session.step(tokens_B)
                rows.append(tokens_B.tolist())
            found[graph] = rows, session.bytes_recalled()
            assert session.step_backend == ("cuda graph" if graph == "on" else "eager")
    assert found["on"] == found["off"]


def test_rows_say_how_large_how_fast_and_why_not_more(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The budget holds dense to fewer sequences than lsa."""
    jobs = run_here(monkeypatch)
    values = {**VALUES, "gpu_budget_bytes": "2MiB"}
    result = run(values, out=tmp_path / "run", progress=False)
    assert failures(result) == []
    rows = result.throughput.set_index("method_label")
    dense, lsa = rows.loc["dense"], rows.loc[LSA]
    assert dense["largest_batch"] == (2 * MIB - 140_160) // (32 * 64 * 256) == 3
    assert (dense["batch_bound"], lsa["batch_bound"]) == ("device_budget", "max_batch")
    assert lsa["largest_batch"] == 8
    assert (dense["mirror"], lsa["mirror"]) == ("none", "shared")
    assert (dense["selection"], lsa["selection"]) == ("free", "synthetic")
    for row in (dense, lsa):
        assert row["tokens_per_s"] == pytest.approx(row["largest_batch"] / row["step_s"])
        assert row["tokens_per_s_at_1"] > 0
        assert (row["steps"], row["prefill"], row["batching"]) == (5, "synthetic", "batched_step")
        assert row["step_backend"] == "eager: the device is cpu"
    assert dense["resident_kv_bytes"] == 3 * 32 * 64 * 256
    assert lsa["host_kv_bytes"] == 32 * 64 * 256
    assert lsa["bytes_recalled"] > 0
    assert [job.kind for job in jobs] == ["throughput", "throughput"]
    run(values, out=tmp_path / "run", progress=False)
    assert len(jobs) == 2


class _StepNeedsRoom(ResidentSequence):
    """A decode step that finds no room once five sequences are open."""

    alive = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        _StepNeedsRoom.alive += 1

    def attend(self, *arguments: Any, **options: Any) -> torch.Tensor:
        if _StepNeedsRoom.alive >= 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return super().attend(*arguments, **options)

    def close(self) -> None:
        _StepNeedsRoom.alive -= 1
        super().close()


def test_a_step_that_does_not_fit_takes_one_sequence_less(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)

    def open_(self: Dense, prompt: Any, device: Any, *, reserve_tokens: int = 0, **options: Any) -> Any:
        ranges = self.resident_ranges(prompt)
        return _StepNeedsRoom(prompt, torch.device(device), ranges=ranges, reserve_tokens=reserve_tokens)

    monkeypatch.setattr(Dense, "open", open_)
    result = run({**VALUES, "methods": ["dense"]}, out=tmp_path / "run", progress=False)
    row = result.throughput.iloc[0]
    assert (row["largest_batch"], row["batch_bound"]) == (4, "device")
    assert _StepNeedsRoom.alive == 0


def test_a_length_where_not_one_fits_is_an_oom_row_and_the_run_goes_on(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(monkeypatch)
    values = {**VALUES, "gpu_budget_bytes": "600KiB", "lengths_tokens": ["1k", "2k"]}
    result = run(values, out=tmp_path / "run", progress=False)
    rows = result.throughput.set_index(["method_label", "length_tokens"])
    assert list(rows["status"]) == ["ok", "ok", "oom", "ok"]
    assert rows.loc[("dense", 2048), "oom_of"] == "device_budget"
    assert failures(result)[0].startswith("throughput: dense: 1 oom: decode: DeviceBudgetExceeded")
    assert cli.run_cli(["report", str(tmp_path / "run")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "n/m (a)" in printed
    assert f"Eager steps of dense, {LSA}: the device is cpu." in printed
    assert "do not compare methods" not in printed  # all of one kind
