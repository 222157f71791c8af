"""The packed reference results: parts carried over from an earlier pack, pieces that ended early, nothing lost."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from synthetic_rows import demo_rows

from kvscope.harness.passes.config import load_config
from kvscope.results.frames import load_run
from kvscope.results.store import RunStore, read_info

FOLDER = Path(__file__).parents[2] / "benchmarks"
RESULTS = FOLDER.parent / "results" / "reference" / "h100"
SAMPLES, _, INFO = demo_rows()
ONE, OTHER = INFO.lengths_tokens[0], INFO.lengths_tokens[-1]
LABELS = [method.label for method in INFO.methods]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import reference_results

    assert sys.modules["reference_results"] is reference_results
    return reference_results


def cell_list(
    path: Path, *parts: dict[str, Any], carried: str = "", name: str = "all", labels: Sequence[str] = LABELS
) -> Path:
    run = {"model": INFO.model, "methods": list(labels), "footprint": False}
    common = {"tasks": list(INFO.tasks), "samples": INFO.samples}
    cell: dict[str, Any] = {"name": name, "planned_gpu_minutes": 1, "seeds": 2, "run": run}
    cell["parts"] = [{**common, **part} for part in parts]
    if carried:
        cell["carried"] = [{"name": carried, "used_gpu_minutes": 2.5}]
    path.write_text(yaml.safe_dump({"cells": [cell]}))
    return path


def measure(
    folder: Path,
    seed: int,
    length: int,
    *,
    commit: str = "a" * 40,
    rows: int | None = None,
    labels: Sequence[str] = LABELS,
) -> None:
    """Write a piece as a run would have: the demo's rows of some methods under another seed."""
    identity = {**INFO.identity, "seed": seed, "footprint": False, "methods": list(labels)}
    values = {
        "seed": seed,
        "lengths_tokens": (length,),
        "footprint_lengths_tokens": (),
        "commit": commit,
        "methods": tuple(method for method in INFO.methods if method.label in labels),
        "plan": tuple(cell for cell in INFO.plan if cell.method_label in labels),
    }
    found = [row for row in SAMPLES if row.length_tokens == length and row.method_label in labels][:rows]
    with RunStore.create(folder, INFO.model_copy(update={**values, "identity": identity})) as store:
        for row in found:
            sha = f"{seed:04x}" + row.prompt_sha256[4:]
            store.append_sample(row.model_copy(update={"seed": seed, "prompt_sha256": sha}))


def test_an_old_pack_goes_over_into_a_larger_cell(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    for seed in (0, 1):
        measure(work / "first" / f"seed-{seed}", seed, ONE)
    first = cell_list(tmp_path / "first.yaml", {"lengths_tokens": [ONE]}, name="first")
    arguments = ["pack", "--work", str(work), "--out", str(out), "--cells"]
    assert script.main([*arguments, str(first)]) == 0
    old = load_run(out / "first").samples

    parts = ({"lengths_tokens": [OTHER]}, {"lengths_tokens": [ONE], "carried": "first"})
    both = cell_list(tmp_path / "both.yaml", *parts, carried="first")
    assert script.main([*arguments, str(both)]) == 1
    assert "still to be measured: all" in capsys.readouterr().out
    for seed in (0, 1):
        measure(work / "all" / f"part-0-seed-{seed}", seed, OTHER, commit="b" * 40)
    assert script.main([*arguments, str(both)]) == 0
    assert f"remove {out / 'first'}" in capsys.readouterr().out

    def check() -> None:
        info = read_info(out / "all")
        assert {part.lengths_tokens: part.commit for part in info.parts} == {(OTHER,): "b" * 40, (ONE,): "a" * 40}
        assert all(part.seeds == (0, 1) for part in info.parts)
        assert all("--set seed=SEED" in (part.command or "") for part in info.parts)
        merged = load_run(out / "all").samples
        carried = merged[merged["length_tokens"] == ONE].reset_index(drop=True)
        assert carried.astype(str).equals(old.reset_index(drop=True).astype(str))
        assert not merged.duplicated(["task", "length_tokens", "prompt_sha256", "method_label"]).any()

    check()
    entries = {entry["name"]: entry for entry in json.loads((out / "cells.json").read_text())}
    assert set(entries) == {"first", "all"}
    assert entries["all"]["used_gpu_minutes"] == 2.5
    assert entries["all"]["pieces"] == 2
    assert [part["commit"] for part in entries["all"]["parts"]] == ["b" * 40, "a" * 40]
    assert [part["seeds"] for part in entries["all"]["parts"]] == ["0-1", "0-1"]

    # From now on the cell itself holds what is carried over.
    for path in (out / "first").iterdir():
        path.unlink()
    (out / "first").rmdir()
    assert script.main([*arguments, str(both)]) == 0
    check()
    assert [entry["name"] for entry in json.loads((out / "cells.json").read_text())] == ["all"]


def test_some_of_the_methods_of_a_packed_cell_go_over(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cell of one method takes its rows from a cell of several, and adds its own."""
    work, out, some = tmp_path / "work", tmp_path / "out", LABELS[:1]
    assert len(LABELS) > 2
    for seed in (0, 1):
        measure(work / "several" / f"seed-{seed}", seed, ONE)
        measure(work / "all" / f"part-0-seed-{seed}", seed, OTHER, labels=some)
    several = cell_list(tmp_path / "several.yaml", {"lengths_tokens": [ONE]}, name="several")
    arguments = ["pack", "--work", str(work), "--out", str(out), "--cells"]
    assert script.main([*arguments, str(several)]) == 0
    before = (out / "several" / "samples.parquet").read_bytes()
    parts = ({"lengths_tokens": [OTHER]}, {"lengths_tokens": [ONE], "carried": "several"})
    mixed = cell_list(tmp_path / "mixed.yaml", *parts, carried="several", labels=some)
    # Twice: the second time the cell itself holds the rows.
    for _ in range(2):
        assert script.main([*arguments, str(mixed)]) == 0
        info, samples = read_info(out / "all"), load_run(out / "all").samples
        assert [method.label for method in info.methods] == info.identity["methods"] == some
        assert {cell.method_label for cell in info.plan} == set(some)
        assert set(samples["method_label"]) == set(some)
        theirs = load_run(out / "several").samples
        mine = samples[samples["length_tokens"] == ONE].reset_index(drop=True)
        theirs = theirs[theirs["method_label"].isin(some)].reset_index(drop=True)
        assert mine.astype(str).equals(theirs.astype(str))
        assert len(samples) == 2 * len(mine) == 2 * 2 * INFO.samples * len(INFO.tasks)
    assert (out / "several" / "samples.parquet").read_bytes() == before
    (entry,) = (each for each in json.loads((out / "cells.json").read_text()) if each["name"] == "all")
    assert entry["rows"] == len(samples)


def test_methods_that_go_over_are_known_by_what_they_are(script: ModuleType, tmp_path: Path) -> None:
    """A cell may write a method otherwise than its label, and in another order."""
    work, out = tmp_path / "work", tmp_path / "out"
    for seed in (0, 1):
        measure(work / "several" / f"seed-{seed}", seed, ONE)
    several = cell_list(tmp_path / "several.yaml", {"lengths_tokens": [ONE]}, name="several")
    arguments = ["pack", "--work", str(work), "--out", str(out), "--cells"]
    assert script.main([*arguments, str(several)]) == 0
    specs = ["sliding_window:sinks=4", "dense"]
    part = {"lengths_tokens": [ONE], "carried": "several"}
    cells = cell_list(tmp_path / "specs.yaml", part, carried="several", labels=specs)
    assert script.main([*arguments, str(cells)]) == 0
    assert set(load_run(out / "all").samples["method_label"]) == {"dense", "sliding_window"}


def test_a_method_that_the_packed_cell_lacks_is_told(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    for seed in (0, 1):
        measure(work / "first" / f"seed-{seed}", seed, ONE, labels=LABELS[:2])
    first = cell_list(tmp_path / "first.yaml", {"lengths_tokens": [ONE]}, name="first", labels=LABELS[:2])
    arguments = ["pack", "--work", str(work), "--out", str(out), "--cells"]
    assert script.main([*arguments, str(first)]) == 0
    part = {"lengths_tokens": [ONE], "carried": "first"}
    more = cell_list(tmp_path / "more.yaml", part, carried="first", labels=[*LABELS[:2], "quest"])
    assert script.main([*arguments, str(more)]) == 2
    said = capsys.readouterr().err
    assert "holds no rows of quest, which cell all asks for" in said
    assert not (out / "all").exists()


def test_a_carried_part_that_is_not_there_or_of_another_size_is_told(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    cells = cell_list(tmp_path / "cells.yaml", {"lengths_tokens": [ONE], "carried": "first"}, carried="first")
    arguments = ["pack", "--work", str(work), "--out", str(out), "--cells"]
    assert script.main([*arguments, str(cells)]) == 2
    assert "neither" in capsys.readouterr().err
    for seed in (0, 1):
        measure(work / "first" / f"seed-{seed}", seed, ONE)
    first = cell_list(tmp_path / "first.yaml", {"lengths_tokens": [ONE]}, name="first")
    assert script.main([*arguments, str(first)]) == 0
    more = {"lengths_tokens": [ONE], "carried": "first", "seeds": 3}
    assert script.main([*arguments, str(cell_list(tmp_path / "more.yaml", more, carried="first"))]) == 2
    assert f"says {3 * INFO.samples} prompts a cell" in capsys.readouterr().err
    unnamed = cell_list(tmp_path / "unnamed.yaml", {"lengths_tokens": [ONE], "carried": "first"})
    assert script.main(["plan", "--cells", str(unnamed)]) == 2
    assert "carried from 'first'" in capsys.readouterr().err


def test_pieces_that_ended_early_are_packed_on_request(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second piece lacks its last row, the other part was not begun."""
    work, out = tmp_path / "work", tmp_path / "out"
    n_rows = sum(row.length_tokens == ONE for row in SAMPLES)
    measure(work / "all" / "part-0-seed-0", 0, ONE)
    measure(work / "all" / "part-0-seed-1", 1, ONE, rows=n_rows - 1)
    cells = cell_list(tmp_path / "cells.yaml", {"lengths_tokens": [ONE]}, {"lengths_tokens": [OTHER]})
    arguments = ["pack", "--cells", str(cells), "--work", str(work), "--out", str(out)]
    assert script.main(arguments) == 1
    assert not (out / "all").exists()
    assert script.main([*arguments, "--unfinished", "the time was over"]) == 0
    (entry,) = json.loads((out / "cells.json").read_text())
    assert [cut["samples"] for cut in entry["parts"][0]["cut"]] == [2 * INFO.samples - 1]
    assert entry["parts"][0]["cut"][0]["reason"] == "the time was over"
    left = [(part["lengths_tokens"], part["pieces_not_done"], part["pieces"]) for part in entry["not_measured"]]
    assert left == [([ONE], 1, 2), ([OTHER], 2, 2)]
    n_methods = load_run(out / "all").samples.groupby(["task", "sample"]).size()
    assert set(n_methods) == {len(INFO.methods)}

    # What was packed is not lost by packing again with less at hand.
    capsys.readouterr()
    for path in (work / "all" / "part-0-seed-1").iterdir():
        path.unlink()
    before = (out / "all" / "samples.parquet").read_bytes()
    assert script.main([*arguments, "--unfinished", "the time was over"]) == 2
    assert "rows that this pack lacks" in capsys.readouterr().err
    assert (out / "all" / "samples.parquet").read_bytes() == before


def test_more_seeds_begin_where_the_first_ended(script: ModuleType, tmp_path: Path) -> None:
    parts = ({"lengths_tokens": [ONE], "carried": "first"}, {"lengths_tokens": [ONE], "first_seed": 2, "seeds": 3})
    (cell,) = script.read_cells(cell_list(tmp_path / "cells.yaml", *parts, carried="first"))
    assert [(name, config.seed) for name, config in cell.pieces()] == [(f"part-1-seed-{s}", s) for s in (2, 3, 4)]


def test_the_command_of_a_part_asks_for_its_pieces(script: ModuleType) -> None:
    for cell in script.read_cells(script.CELLS_FILE):
        for part in cell.parts:
            words = shlex.split(cell.command(part).replace("SEED", "7"))
            assert words[:2] == ["kvscope", "run"]
            sets = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            assert load_config(sets=sets) == cell.config(part, 7)


def test_the_committed_cells_hold_what_their_record_says() -> None:
    for entry in json.loads((RESULTS / "cells.json").read_text()):
        info, samples = read_info(RESULTS / entry["name"]), load_run(RESULTS / entry["name"]).samples
        assert entry["rows"] >= len(samples)
        counts = samples.groupby(["task", "length_tokens"])["prompt_sha256"].nunique().to_dict()
        asked = {
            (task, length): info.expected_samples(task, length)
            for part in info.parts
            for task in part.tasks
            for length in part.lengths_tokens
        }
        assert counts == {cell: n for cell, n in asked.items() if n}
        for part in info.parts:
            assert all((part.commit, part.environment, part.command, part.seeds))
            for length in part.lengths_tokens:
                least = 200 if length <= 131_072 else 50
                assert part.samples >= least or f"{part.samples} prompts a cell" in (part.fewer or "")
