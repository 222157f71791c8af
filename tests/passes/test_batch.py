"""Answers that share steps: those of single sequences, whatever enters, leaves, fails or runs out of memory."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import stand_ins
import torch
from lsa_tools import random_indexer
from notes import Notes
from sessions import captured_here
from tiny import MakeConfig
from tiny_models import runnable_methods, save_model

from kvscope.errors import UsageError
from kvscope.harness.engine import batch_noise, lanes
from kvscope.harness.engine.batch_noise import BatchNoise
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.session import Session
from kvscope.harness.passes import answering
from kvscope.harness.passes import batch as batch_module
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.deadline import Deadline, TimeLimitReached
from kvscope.harness.passes.sweep import run
from kvscope.methods import registry
from kvscope.methods.dense.method import Dense
from kvscope.reports.cells import accuracy_cells
from kvscope.reports.summary import summary_text
from kvscope.reports.tables_accuracy import accuracy_table
from kvscope.results.columns import SURROUNDINGS_COLUMNS, TIME_COLUMNS

EVERY_METHOD = runnable_methods()
KEY = ["method_label", "task", "length_tokens", "sample"]
#: Columns that say how rows were stepped: all others are those of single sequences.
STEPPING = {"batch", "logit_noise", "tie", "least_logit_gap"}


@pytest.fixture(autouse=True)
def odd_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, place in stand_ins.METHODS.items():
        monkeypatch.setitem(registry.METHODS, name, place)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model whose answers depend on the prompt."""
    return save_model(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=2)


def rows(values: dict[str, Any], *, batch: int | None, out: Path, **options: Any) -> pd.DataFrame:
    """Return the sample rows of a run, by method and prompt."""
    frame = run({**values, "batch": batch, "out": str(out)}, **{"progress": False, **options}).samples
    return frame.set_index(KEY).sort_index()


def same_columns(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns=[*(STEPPING | TIME_COLUMNS | SURROUNDINGS_COLUMNS) & set(frame.columns)])


def test_a_method_that_decodes_twice_shares_the_steps_of_its_second_decode(model: str, tmp_path: Path) -> None:
    options = "chunk_tokens=16,recency_tokens=32,tau=4"
    values = {
        "model": model, "methods": ["dense", f"lsa:indexer=hindsight,budget_tokens=160,{options}"],
        "tasks": ["niah_multikey_2"], "lengths_tokens": [640], "samples": 2, "max_new_tokens": 8, "answer_nll": True,
        "footprint": False, "device": "cpu",
    }  # fmt: skip
    alone, together = (rows(values, batch=n, out=tmp_path / str(n)) for n in (1, 4))
    assert set(together["batch"]) == {4}
    assert set(together["status"]) == {"ok"}
    pd.testing.assert_frame_equal(same_columns(together), same_columns(alone))
    found = together[together["method"] == "lsa"]
    assert set(found["selection"]) == {"free"}
    assert {config["indexer"] for config in found["config"]} == {"hindsight"}
    assert (found["residency"].map(lambda each: each["tau"]) == 4).all()


def assert_same_but_for_ties(alone: pd.DataFrame, together: pd.DataFrame) -> None:
    """Outputs, choices, reads and bytes are equal, but in rows that are marked, of which there are few."""
    ties = together["tie"].fillna(value=False).astype(bool)
    assert ties.mean() <= 0.01
    pd.testing.assert_frame_equal(same_columns(together[~ties]), same_columns(alone[~ties]))
    gaps = together["least_logit_gap"] - alone["least_logit_gap"]
    assert gaps.abs()[~ties].max() <= 2 * together["logit_noise"].max()


def every_method(model: str, *, samples: int) -> dict[str, Any]:
    return {
        "model": model, "methods": EVERY_METHOD, "tasks": ["niah_multikey_2", "niah_single_1"],
        "lengths_tokens": [256, 320], "samples": samples, "max_new_tokens": 4, "footprint": False, "device": "cpu",
        "page_tokens": 16, "prefill_chunk_tokens": 256, "self_check": False,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("samples", [50])
def test_every_method_answers_together_as_alone(model: str, tmp_path: Path, samples: int) -> None:
    values = {**every_method(model, samples=samples), "max_new_tokens": 2}
    alone = rows(values, batch=1, out=tmp_path / "alone")
    together = rows(values, batch=12, out=tmp_path / "together")
    assert set(alone["status"]) == {"ok"}, alone["reason"].dropna().unique()
    assert len(alone) == 4 * samples * len(EVERY_METHOD)
    assert_same_but_for_ties(alone, together)
    assert alone["output"].nunique() > 4 * samples
    assert set(alone["batch"]) == {1}
    assert alone[["tie", "logit_noise"]].isna().all(axis=None)
    assert alone["least_logit_gap"].notna().all()
    assert together["batch"].max() == 12
    assert (together["logit_noise"] > 0).all()
    assert together["tie"].notna().all()


def test_prompts_enter_where_places_are_no_multiple_of_the_methods(model: str, tmp_path: Path) -> None:
    values = {**every_method(model, samples=6), "methods": ["dense", "recency:recency_tokens=64"]}
    alone = rows(values, batch=1, out=tmp_path / "alone")
    together = rows(values, batch=5, out=tmp_path / "together")
    assert_same_but_for_ties(alone, together)
    assert together["batch"].value_counts().idxmax() == 5


def test_rows_of_captured_steps_are_those_of_eager_ones(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: those that ended rest in the step until they are half of it. Spare room is in no row."""
    shape = load_model(model, device="cpu", page_tokens=16).shape
    indexer = random_indexer(tmp_path / "indexer", shape, seed=3)
    lsa = f"lsa:indexer={indexer},recency_tokens=64,threshold=0.5,tau=3,chunk_tokens=16"
    methods = ["dense", "recency:recency_tokens=64", "sliding_window:window=64", "random:fraction=0.3", lsa]
    values = {**every_method(model, samples=4), "methods": methods, "max_new_tokens": 9}
    alone = rows(values, batch=1, out=tmp_path / "alone")
    captures = captured_here(monkeypatch)
    for module in (batch_module, answering):
        monkeypatch.setattr(module, "shared_graph", lambda plan: "auto")
    together = rows(values, batch=6, out=tmp_path / "together")
    assert_same_but_for_ties(alone.drop(columns="step_backend"), together.drop(columns="step_backend"))
    assert set(together["step_backend"]) == {"cuda graph"}
    assert together["batch"].max() == 6
    assert len(captures) < 2 * len(together) / 3  # not one for each that comes or goes


def test_with_as_many_rows_in_every_step_no_answer_is_a_tie(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the logits have the same bits in any batch, in captured steps and in those beside them."""
    values = {**every_method(model, samples=2), "max_new_tokens": 6}
    captured_here(monkeypatch)
    for module in (batch_module, answering):
        monkeypatch.setattr(module, "shared_graph", lambda plan: "auto")
        monkeypatch.setattr(module, "step_rows", lambda plan: 16)
    alone, few, many = (rows(values, batch=n, out=tmp_path / f"{n}") for n in (1, 5, 14))
    for shared in (few, many):
        assert set(shared["logit_noise"].dropna()) == {0.0}
        assert set(shared["tie"].dropna()) == {False}
        assert shared["batch"].max() > 2
        exact = ["status", "output", "score", "least_logit_gap", "bytes_read_per_step", "step_backend"]
        pd.testing.assert_frame_equal(shared[exact], alone[exact], check_exact=True)
    # Each eager one by its own reasons, not those of who came first.
    told = many["step_backend"].groupby("method_label").unique()
    assert "what leaves is chosen by each step's own attention" in told["h2o"][0]
    assert "unequal numbers of tokens" in told["adakv"][0]
    assert list(told["dense"]) == ["cuda graph"]


def test_a_likelihood_is_that_of_a_sequence_alone(model: str, tmp_path: Path) -> None:
    values = {**every_method(model, samples=2), "methods": ["dense", "recency:recency_tokens=64"], "answer_nll": True}
    alone = rows(values, batch=1, out=tmp_path / "alone")
    together = rows(values, batch=4, out=tmp_path / "together")
    pd.testing.assert_series_equal(together["answer_nll"], alone["answer_nll"])


# -- what goes wrong

NOT_FINITE = "at decode step 2 the model's logits are not finite (NaN or infinity)"


def with_bad(values: MakeConfig, bad: str, **more: Any) -> dict[str, Any]:
    methods = ["dense", bad, "recency:recency_tokens=128"]
    return values(methods=methods, samples=4, max_new_tokens=8, self_check=False, **more).model_dump(exclude={"out"})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("raising", "decode: RuntimeError: the third step is one too many"),
        ("spoiling", f"decode: NotFinite: {NOT_FINITE}, behind layer 1."),
        ("failing", "decode: RuntimeError: the page table is torn"),
        ("hungry", "decode: OutOfMemoryError: CUDA out of memory. Tried to allocate 3.00 GiB"),
    ],
)  # fmt: skip
def test_a_bad_method_fails_alone(small: MakeConfig, tmp_path: Path, bad: str, reason: str) -> None:
    values = with_bad(small, bad)
    notes = Notes()
    alone = rows(values, batch=1, out=tmp_path / "alone")
    together = rows(values, batch=6, out=tmp_path / "together", progress=notes)
    pd.testing.assert_frame_equal(same_columns(together), same_columns(alone))
    assert set(together.loc[bad]["status"]) == {"oom" if bad == "hungry" else "failed"}
    assert set(together.loc[bad]["reason"]) == {reason}
    assert set(together.loc["dense"]["status"]) == {"ok"}
    assert sum(reason in text for text in notes.said) == 4
    assert together.loc["dense"]["batch"].max() > 1


def test_memory_that_ends_in_a_step_halves_it_and_the_run_goes_on(
    small: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = with_bad(small, "sliding_window:window=100")
    alone = rows(values, batch=1, out=tmp_path / "alone")
    real = Session.step

    def three_fit(self: Session, tokens: Any) -> torch.Tensor:
        if len(self.members) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, tokens)

    monkeypatch.setattr(Session, "step", three_fit)
    notes = Notes()
    together = rows(values, batch=8, out=tmp_path / "together", progress=notes)
    pd.testing.assert_frame_equal(same_columns(together), same_columns(alone))
    assert together["batch"].max() == 2
    assert notes.said == [
        "memory ran out with 8 sequences in a step: 4 at most from now on.",
        "memory ran out with 4 sequences in a step: 2 at most from now on.",
    ]


def test_memory_that_ends_where_a_sequence_enters_lets_the_others_go_on(
    small: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = with_bad(small, "sliding_window:window=100")
    alone = rows(values, batch=1, out=tmp_path / "alone")
    real = Session.add

    def three_fit(self: Session, *arguments: Any, **options: Any) -> Any:
        if len(self.members) >= 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *arguments, **options)

    monkeypatch.setattr(Session, "add", three_fit)
    notes = Notes()
    together = rows(values, batch=8, out=tmp_path / "together", progress=notes)
    pd.testing.assert_frame_equal(same_columns(together), same_columns(alone))
    assert together["batch"].max() == 3
    assert notes.said == ["memory ran out with 4 sequences in a step: 2 at most from now on."]


def test_a_method_that_fits_nowhere_says_nothing_of_the_others(
    small: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step that it is in runs out of memory, its own, too."""
    values = with_bad(small, "sliding_window:window=100")
    alone = rows(values, batch=1, out=tmp_path / "alone")
    real = Session.step

    def too_large(self: Session, tokens: Any) -> torch.Tensor:
        if any(member.method.name == "sliding_window" for member in self.members):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, tokens)

    monkeypatch.setattr(Session, "step", too_large)
    together = rows(values, batch=8, out=tmp_path / "together")
    bad = together["method"] == "sliding_window"
    assert set(together[bad]["status"]) == {"oom"}
    pd.testing.assert_frame_equal(same_columns(together[~bad]), same_columns(alone[~bad]))
    assert together["batch"].max() > 1


def test_a_prefill_that_does_not_fit_beside_the_others_waits(
    small: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvscope.harness.engine import prefill as module

    values = with_bad(small, "sliding_window:window=100")
    alone = rows(values, batch=1, out=tmp_path / "alone")
    under_way: list[Session] = []
    real_add, real_close, real = Session.add, Session.close, module.prefill

    def add(self: Session, *arguments: Any, **options: Any) -> Any:
        under_way[:] = [self]
        return real_add(self, *arguments, **options)

    def close(self: Session) -> None:
        under_way.clear()
        real_close(self)

    def prefill(*arguments: Any, **options: Any) -> Any:
        if under_way and len(under_way[0].members) >= 2:
            raise MemoryError("no room")
        return real(*arguments, **options)

    monkeypatch.setattr(Session, "add", add)
    monkeypatch.setattr(Session, "close", close)
    monkeypatch.setattr(module, "prefill", prefill)
    together = rows(values, batch=8, out=tmp_path / "together")
    pd.testing.assert_frame_equal(same_columns(together), same_columns(alone))


# -- ending and going on


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_an_interrupt_keeps_the_rows_of_answers_that_ended(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(samples=6, max_new_tokens=6, batch=4, self_check=False)
    whole = run(config.model_copy(update={"out": f"{config.out}-whole"}), progress=False).samples
    steps: list[int] = []
    real = Session.step

    def interrupted(self: Session, tokens: Any) -> torch.Tensor:
        steps.append(len(tokens))
        if len(steps) == 30 + 8:  # the probes of the noise, and more steps than the first answers take
            raise KeyboardInterrupt
        return real(self, tokens)

    monkeypatch.setattr(Session, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(config, progress=False)
    assert config.out is not None
    kept = lines(Path(config.out))
    assert 0 < len(kept) < 12
    again = run(config, progress=False).samples
    pd.testing.assert_frame_equal(
        same_columns(again.set_index(KEY).sort_index()), same_columns(whole.set_index(KEY).sort_index())
    )
    assert lines(Path(config.out))[: len(kept)] == kept


def test_any_mixture_of_missing_rows_is_measured(small: MakeConfig, tmp_path: Path) -> None:
    config = small(samples=5, lengths_tokens=[320, 512], max_new_tokens=5, batch=4, self_check=False)
    folder = run(config, progress=False).folder
    kept = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
    (folder / "samples.jsonl").write_text("".join(kept[1::3]))
    again = run(config.model_copy(update={"batch": 3}), progress=False).samples
    assert len(again) == len(kept) == 20
    outputs = {tuple(row[key] for key in KEY): row["output"] for row in map(json.loads, kept)}
    assert {tuple(row[key] for key in KEY): row["output"] for row in again.to_dict("records")} == outputs


def test_a_time_limit_lets_prompts_that_were_begun_end(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(samples=6, max_new_tokens=5, batch=4, time_limit_s=5.0, self_check=False)
    asked: list[int] = []

    def check(self: Deadline) -> None:
        asked.append(1)
        if len(asked) == 4:
            raise TimeLimitReached("The time limit of 5 s is reached")

    monkeypatch.setattr(Deadline, "check", check)
    with pytest.raises(TimeLimitReached):
        run(config, progress=False)
    assert config.out is not None
    assert sorted(row["sample"] for row in lines(Path(config.out))) == [0, 0, 1, 1, 2, 2]
    assert len(run(config, progress=False).samples) == 12


def test_cells_end_once_each_with_their_last_row(small: MakeConfig) -> None:
    notes = Notes()
    run(small(samples=3, lengths_tokens=[320, 512], batch=5, self_check=False), progress=notes)
    assert len(notes.cells) == 2
    assert all(cell.startswith("dense 0.00, recency") and "not measured" not in cell for cell in notes.cells)


@pytest.mark.parametrize("given", [0, -1, "x", 1.5, "1.5", True, [2], 10**9])
def test_another_number_of_sequences_is_refused(given: object) -> None:
    with pytest.raises(UsageError, match="batch in the configuration is"):
        make_config({"batch": given})


@pytest.mark.parametrize("given", ["auto", None])
def test_auto_is_the_default(given: object) -> None:
    assert make_config({"batch": given}) == make_config({})


def test_folders_begun_with_another_batch_go_on(small: MakeConfig) -> None:
    assert "batch" not in make_config({"batch": 7}).identity()
    first = run(small(samples=1, batch=1, self_check=False), progress=False)
    assert len(run(small(samples=2, batch=4, self_check=False), out=first.folder, progress=False).samples) == 4


def test_a_sequence_that_steps_alone_keeps_as_much_room_as_it_would_among_others(
    small: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of captured steps count it."""
    made: dict[str, dict[str, Any]] = {}
    for module in (batch_module, lanes):
        real = module.BatchDecode

        def noted(*args: Any, real: Any = real, name: str = module.__name__, **options: Any) -> Any:
            made[name] = {key: options[key] for key in ("counts_spare", "spare_share", "step_rows")}
            return real(*args, **options)

        monkeypatch.setattr(module, "BatchDecode", noted)
    run(small(methods=["dense", "raising"], samples=2, batch=4, self_check=False), progress=False)
    assert made[batch_module.__name__] == made[lanes.__name__]


def test_a_dense_sequence_keeps_its_prompt_no_longer_than_needed(
    small: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host pages of a prompt go with its last row, and no more prompts are begun than a step has places for."""
    import weakref

    seen: list[weakref.ref[Any]] = []
    most: list[int] = []
    real = Dense.open

    def watching(self: Dense, prompt: Any, *arguments: Any, **options: Any) -> Any:
        if all(found() is not prompt for found in seen):
            seen.append(weakref.ref(prompt))
        most.append(sum(found() is not None for found in seen))
        return real(self, prompt, *arguments, **options)

    run(small(samples=1, self_check=False), progress=False)
    monkeypatch.setattr(Dense, "open", watching)
    run(small(samples=9, batch=4, self_check=False), out=Path(str(small().out) + "-more"), progress=False)
    assert max(most[8:]) <= 3


# -- models that may not share steps


def test_a_model_that_differs_by_more_than_rounding_shares_no_step(
    small: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_noise, "difference", lambda found, expected: 0.25)
    notes = Notes()
    frame = run(small(batch=4, self_check=False), progress=notes).samples
    assert set(frame["batch"]) == {1}
    assert frame["tie"].isna().all()
    assert (
        "In steps of several sequences the logits of model 'tiny' differ by 0.25 of their size, and rounding explains "
        "0.001: each answer is decoded in steps of its own." in notes.said
    )


def test_a_probe_that_fails_is_told(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("the probe is broken")

    monkeypatch.setattr(batch_noise, "batch_noise", failing)
    notes = Notes()
    frame = run(small(batch=4, self_check=False), progress=notes).samples
    assert set(frame["batch"]) == {1}
    told = "the probe of shared steps: RuntimeError: the probe is broken: each answer is decoded in steps of its own."
    assert told in notes.said


def test_a_probe_for_which_memory_ends_is_made_smaller(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = batch_noise.batch_noise

    def two_fit(loaded: Any, *, rows: int, **options: Any) -> Any:
        asked.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(loaded, rows=rows, **options)

    monkeypatch.setattr(batch_noise, "batch_noise", two_fit)
    frame = run(small(batch=4, self_check=False), progress=False).samples
    assert asked == [4, 2]
    assert set(frame["batch"]) == {4}
    assert frame["tie"].notna().all()


# -- what a user is told


def test_ties_are_counted_in_summary_and_tables(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = BatchNoise(logit_noise=1e9, share=0.0, tolerance=1.0)
    monkeypatch.setattr(batch_noise, "batch_noise", lambda *_, **__: noise)
    result = run(small(batch=4, self_check=False), progress=False)
    text = "Ties: 4 of 4 rows (dense 2 of 2, recency:recency_tokens=128 2 of 2). Their answers shared"
    assert text in summary_text(result)
    assert any(text in note for note in accuracy_table(result, accuracy_cells(result)).notes)


def test_without_ties_the_summary_says_so_and_alone_it_says_nothing(small: MakeConfig, tmp_path: Path) -> None:
    result = run(small(batch=4, self_check=False), progress=False)
    assert "Ties: 0 of 4 rows. Their answers shared steps with up to 3 others" in summary_text(result)
    result = run(small(batch=1, self_check=False), out=tmp_path / "alone", progress=False)
    assert "Ties" not in summary_text(result)
