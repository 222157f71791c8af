"""Which runs continue a folder: the same model and prompts, wherever they lie; more of everything else."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from notes import Notes
from tiny import MakeConfig

from kvscope.errors import UsageError
from kvscope.harness.passes.sweep import run
from kvscope.results.frames import Run, load_run


@pytest.fixture
def model(tiny_model: str, tmp_path: Path) -> Path:
    """Return a copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def keys(result: Run) -> list[tuple[str, int, int, str]]:
    columns = ("task", "length_tokens", "sample", "method_label")
    return sorted(tuple(row) for row in result.samples[list(columns)].itertuples(index=False))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -- the model


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("generation_config.json", {"eos_token_id": [2, 5]}, r"model\.eos_ids \(there: \[\d+\], asked: \[.*5.*\]\)"),
        ("tokenizer_config.json", {"add_bos_token": False}, r"model\.tokenizer \(there: \"sha256:"),
        ("config.json", {"rope_theta": 5e5}, r"model\.config \(there"),
    ],
)
def test_another_model_under_the_same_name_is_refused(
    small: MakeConfig, model: Path, file: str, changes: dict[str, Any], named: str
) -> None:
    folder = run(small(model=str(model), samples=1), progress=False).folder
    before = (folder / "run.json").read_bytes()
    edit(model / file, **changes)
    with pytest.raises(UsageError, match=named):
        run(small(model=str(model), samples=2), progress=False)
    assert (folder / "run.json").read_bytes() == before
    assert len(load_run(folder).samples) == 2


def test_a_model_is_its_files_not_its_spelling(small: MakeConfig, model: Path, tmp_path: Path) -> None:
    folder = run(small(model=str(model), samples=1), progress=False).folder
    copy = shutil.copytree(model, tmp_path / "renamed copy")
    (tmp_path / "link").symlink_to(copy)
    for n, spelling in enumerate((f"{model}/", os.path.relpath(model), str(copy), str(tmp_path / "link")), start=2):
        notes = Notes()
        result = run(small(model=spelling, samples=n), progress=notes)
        assert len(result.samples) == 2 * n
    assert set(result.samples["model"]) == {"model"}, "rows go on under the name they began with"
    assert load_run(folder).info.model == "model"


def test_weights_that_do_not_load_leave_no_run_behind(small: MakeConfig, model: Path) -> None:
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    config = small(model=str(model), samples=1)
    with pytest.raises(Exception):  # noqa: B017, PT011 - which one is another test's
        run(config, progress=False)
    assert not (Path(str(config.out)) / "run.json").exists()
    weights.write_bytes(whole)
    assert set(run(config, progress=False).samples["status"]) == {"ok"}


def test_rows_carry_the_versions_that_computed(small: MakeConfig) -> None:
    import torch
    import transformers

    result = run(small(samples=1), progress=False)
    assert set(result.samples["transformers_version"]) == {transformers.__version__}
    assert set(result.samples["torch_version"]) == {torch.__version__}


def test_a_folder_of_an_earlier_version_says_what_it_cannot_tell(small: MakeConfig, model: Path) -> None:
    from kvscope.harness.passes.plan import make_plan
    from kvscope.harness.passes.recording import earlier_identity

    config = small(model=str(model), samples=1)
    folder = run(config, progress=False).folder
    info = json.loads((folder / "run.json").read_text())
    info |= {"identity": earlier_identity(make_plan(config)), "kvscope_version": "0.1.0"}
    (folder / "run.json").write_text(json.dumps(info))
    edit(model / "generation_config.json", eos_token_id=[2, 5])
    notes = Notes()
    result = run(small(model=f"{model}/", samples=2), progress=notes)
    assert len(result.samples) == 4
    assert any("begun by kvscope 0.1.0 and keeps the identity" in text for text in notes.said)
    assert result.info.identity["model"] == str(model), "it keeps the identity it was written with"
    edit(model / "config.json", rope_theta=5e5)
    with pytest.raises(UsageError, match="model_revision"):
        run(config, progress=False)


# -- prompts


def test_prompts_other_than_those_of_the_rows_are_refused(small: MakeConfig) -> None:
    folder = run(small(samples=1), progress=False).folder
    path = folder / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "prompt_sha256": "0" * 64}) + "\n" for row in rows))
    before = path.read_bytes()
    for changes in ({}, {"samples": 2}, {"methods": ["dense", "random"]}):
        with pytest.raises(UsageError, match=r"another prompt of niah_single_1 at 512 tokens, sample 0"):
            run(small(**{"samples": 1, **changes}), progress=False)
    assert path.read_bytes() == before


def test_a_prompt_in_the_middle_is_compared_when_it_is_built_again(small: MakeConfig) -> None:
    folder = run(small(), progress=False).folder
    path = folder / "samples.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [{**row, "prompt_sha256": "0" * 64} if row["sample"] == 1 else row for row in rows][:-1]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    with pytest.raises(UsageError, match="another prompt of niah_single_1 at 512 tokens, sample 1"):
        run(small(), progress=False)


def test_a_changed_essay_is_another_run(small: MakeConfig, tmp_path: Path) -> None:
    essay = tmp_path / "essay.txt"
    essay.write_text("A line of an essay that is long enough.\nAnother line of it.\n")
    config = small(tasks=[f"niah_single_2:data={essay}"], samples=1)
    run(config, progress=False)
    run(config, progress=False)
    essay.write_text("Other words stand here, and they are not the same.\n")
    with pytest.raises(UsageError, match=r"tasks \(there: niah_single_2:.*sha256="):
        run(config, progress=False)


def test_a_changed_indexer_is_another_run(small: MakeConfig, tmp_path: Path) -> None:
    from kvscope.methods.lsa.indexer_files import FILES

    shipped = FILES.shipped_folder / FILES.shipped_names()[0]
    indexer = Path(shutil.copytree(shipped, tmp_path / "indexer"))
    method = f"lsa:budget_tokens=128,indexer={indexer}"
    config = small(model="reference", methods=["dense", method], samples=1, max_new_tokens=2)
    run(config, progress=False)
    values = json.loads((indexer / "config.json").read_text())
    (indexer / "config.json").write_text(json.dumps({**values, "trained": {"note": "anew"}}))
    with pytest.raises(UsageError, match=r"trained_parts\.lsa:budget_tokens=128,indexer="):
        run(config, progress=False)
    assert len(run(small(model="reference", methods=["dense"], samples=1, max_new_tokens=2), progress=False).samples)


# -- more of everything


def test_more_samples_methods_tasks_and_lengths_continue_a_folder(small: MakeConfig, tmp_path: Path) -> None:
    run(small(samples=1), progress=False)
    run(small(samples=3), progress=False)
    run(small(samples=3, methods=["random"]), progress=False)
    run(small(samples=1, tasks=["vt"]), progress=False)
    result = run(small(samples=2, lengths_tokens=[640], methods=["dense"]), progress=False)
    info = result.info
    assert (info.tasks, info.lengths_tokens, info.samples) == (("niah_single_1", "vt"), (512, 640), 3)
    assert [method.label for method in info.methods] == ["dense", "recency:recency_tokens=128", "random"]
    assert [call.samples for call in info.calls] == [1, 3, 3, 1, 2]
    assert info.expected_samples("vt", 512) == 1
    assert info.expected_samples("vt", 640) == 0
    assert info.expected_samples("niah_single_1", 640) == 2
    whole = {
        "samples": 3,
        "tasks": ["vt", "niah_single_1"],
        "lengths_tokens": [640, 512],
        "methods": ["random", "recency:recency_tokens=128", "dense"],
    }
    at_once = run(small(**whole, out=str(tmp_path / "at once")), progress=False)
    hashes = {(row.task, row.length_tokens, row.sample): row.prompt_sha256 for row in at_once.samples.itertuples()}
    for row in result.samples.itertuples():
        assert hashes[row.task, row.length_tokens, row.sample] == row.prompt_sha256
    outputs = {key: row.output for key, row in zip(_keys(at_once), at_once.samples.itertuples(), strict=True)}
    assert all(outputs[key] == row.output for key, row in zip(_keys(result), result.samples.itertuples(), strict=True))
    before = (result.folder / "run.json").read_bytes()
    run(small(samples=1), progress=False)
    assert (result.folder / "run.json").read_bytes() == before, "what was asked before changes nothing"


def _keys(result: Run) -> list[tuple[Any, ...]]:
    rows = result.samples
    return list(zip(rows["task"], rows["length_tokens"], rows["sample"], rows["method_label"], strict=True))


def test_a_union_is_reported(small: MakeConfig) -> None:
    from kvscope.reports import make_report
    from kvscope.reports.summary import summary_text

    run(small(samples=1), progress=False)
    run(small(samples=3, methods=["dense"]), progress=False)
    result = run(small(samples=1, tasks=["vt"], lengths_tokens=[640]), progress=False)
    assert "vt" in summary_text(result)
    assert any(path.name == "report.html" for path in make_report(result.folder))


def test_memory_of_some_methods_alone_is_all_of_it(small: MakeConfig) -> None:
    from kvscope.reports.coverage import coverage

    run(small(samples=1), progress=False)
    result = run(small(samples=1, methods=["dense"], footprint=True), progress=False)
    assert len(result.info.methods) == 2
    assert list(result.footprint["method_label"]) == ["dense"]
    state = coverage(result)
    assert (state.footprint_expected, state.footprint_present, state.missing) == (1, 1, ())


def test_fewer_samples_lose_nothing_and_are_said(small: MakeConfig) -> None:
    folder = run(small(samples=2), progress=False).folder
    notes = Notes()
    result = run(small(samples=1), progress=notes)
    assert len(result.samples) == 4
    assert any(f"{folder} holds up to 2 samples" in text and "nothing is lost" in text for text in notes.said)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 3}, "seed"),
        ({"method_from": "question"}, "method_from"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"max_new_tokens": 5}, "max_new_tokens"),
        ({"answer_nll": True}, "answer_nll"),
        ({"paper_settings": True}, "paper_settings"),
        ({"page_tokens": 16}, "page_tokens"),
        ({"prefill_chunk_tokens": 128}, "prefill_chunk_tokens"),
        ({"decode_graph": "off"}, "decode_graph"),
        ({"accuracy_graph": True}, "accuracy_graph"),
    ],
)
def test_what_decides_rows_must_be_equal(small: MakeConfig, changes: dict[str, Any], named: str) -> None:
    from kvscope.harness.passes.plan import make_plan
    from kvscope.harness.passes.recording import run_info
    from kvscope.results.continuing import continued

    stored, asked = run_info(make_plan(small())), run_info(make_plan(small(**changes)))
    with pytest.raises(UsageError, match=rf"it differs in: {named} \(there: .*, asked: "):
        continued(Path("there"), stored, asked)


def test_a_task_twice_with_other_options_has_rows_of_two_names(small: MakeConfig) -> None:
    first, second = "long_qa:types=single_fact", "long_qa:types=hops_2"
    shape = {"samples": 1, "methods": ["dense"], "lengths_tokens": [1024]}
    result = run(small(tasks=[first, second], **shape), progress=False)
    assert list(result.samples["task"]) == [first, second]
    assert result.info.tasks == (first, second)
    again = run(small(tasks=[second], **shape), progress=False)
    assert list(again.samples["task"]) == [first, second]
    with pytest.raises(UsageError, match="given twice"):
        small(tasks=[first, first], **shape)


def test_a_task_with_other_options_continues_a_folder_that_has_it(small: MakeConfig) -> None:
    shape = {"samples": 1, "methods": ["dense"], "lengths_tokens": [1024]}
    run(small(tasks=["long_qa:types=single_fact"], **shape), progress=False)
    result = run(small(tasks=["long_qa:types=hops_2"], **shape), progress=False)
    assert list(result.samples["task"]) == ["long_qa", "long_qa:types=hops_2"]
    assert list(result.samples["question_type"]) == ["single_fact", "hops_2"]
    again = run(small(tasks=["long_qa:types=hops_2", "long_qa:types=single_fact"], **shape), progress=False)
    assert len(again.samples) == 2


# -- limits


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"seed": 2**63}, "seed"),
        ({"lengths_tokens": [2**41]}, "lengths_tokens"),
        ({"gpu_budget_bytes": 2**60}, "gpu_budget_bytes"),
        ({"lengths_tokens": list(range(1, 1200))}, "lengths_tokens"),
        ({"max_batch": 2**60}, "max_batch"),
    ],
)
def test_values_that_rows_cannot_carry_are_refused_at_once(
    small: MakeConfig, values: dict[str, Any], fault: str
) -> None:
    with pytest.raises(UsageError, match=fault):
        small(**values)


def test_names_that_rows_cannot_carry_are_refused_before_anything_is_measured(small: MakeConfig) -> None:
    from kvscope.harness.passes.plan import make_plan

    with pytest.raises(UsageError, match=r"has 1,\d\d\d characters, and rows hold names of 1,000 at most"):
        make_plan(small(methods=[{"name": "lsa", "budget_tokens": 64, "indexer": "x" * 1100}]))
