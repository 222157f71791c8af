"""Tables in all formats: nothing blank, every n/m explained, the same numbers everywhere."""

import re
from pathlib import Path

import pandas as pd
import pytest
from synthetic_rows import KINDS, K, Rows, demo_rows, footprint_row, make_rows, single_rows, wide_rows

from kvscope.reports.cells import accuracy_cells
from kvscope.reports.export import latex, markdown, write_table
from kvscope.reports.summary import summary_text
from kvscope.reports.table_parts import Table
from kvscope.reports.tables import all_tables
from kvscope.reports.units import byte_unit, bytes_text, length_text, measured, number, p_text, points
from kvscope.results.frames import Run, make_run


def tables_of(rows: Rows, *, samples: int | None = None, footprints: int | None = None) -> dict[str, Table]:
    run: Run = make_run(rows[0][:samples], rows[1][:footprints], info=rows[2], folder=".")
    return {table.name: table for table in all_tables(run, accuracy_cells(run))}


@pytest.fixture(scope="module")
def demo() -> dict[str, Table]:
    return tables_of(demo_rows())


@pytest.fixture(scope="module")
def wide() -> dict[str, Table]:
    return tables_of(wide_rows(tasks=2))


@pytest.mark.parametrize("which", ["demo", "wide", "single"])
@pytest.mark.parametrize("part", [0, 0.4, 1])
def test_no_cell_is_blank_and_every_mark_has_its_note(which: str, part: float) -> None:
    rows = {"demo": demo_rows, "wide": lambda: wide_rows(tasks=1, samples=4), "single": single_rows}[which]()
    tables = tables_of(rows, samples=int(part * len(rows[0])), footprints=int(part * len(rows[1])))
    for table in tables.values():
        cells = [str(cell) for column in table.text for cell in table.text[column]]
        assert all(cell.strip() for cell in cells), table.name
        assert not any(word in cell.lower() for cell in cells for word in ("nan", "<na>", "none")), table.name
        marks = {mark for cell in cells for mark in re.findall(r"n/m \((\w+)\)", cell)}
        explained = {match[1] for note in table.notes if (match := re.match(r"\((\w+)\) not measured: \S", note))}
        assert marks == explained, table.name
        assert len(table.text) or table.notes, table.name


def test_headers_carry_units(wide: dict[str, Table]) -> None:
    assert "KV by NVML (MiB)" in wide["footprint"].text.columns
    assert {"TTFT (s)", "TPOT (ms)", "resident KV (MiB)", "of dense (%)"} <= set(wide["footprint"].text.columns)
    assert {"resident (MiB)", "accuracy (%)", "TPOT (ms)"} <= set(wide["stays_and_saves"].text.columns)


def test_without_nvml_the_table_says_so_instead_of_showing_columns(demo: dict[str, Table]) -> None:
    tables = demo
    assert not any("NVML" in column for column in tables["footprint"].text.columns)
    assert any(note.startswith("No NVML columns: not measured (no NVIDIA GPU") for note in tables["footprint"].notes)
    assert "NVML was not measured: no NVIDIA GPU" in tables["stays_and_saves"].caption
    assert tables["footprint"].data["nvml_reason"].notna().all()


def test_stays_and_saves_measures_one_setting(demo: dict[str, Table]) -> None:
    table = demo["stays_and_saves"]
    assert set(table.data["length_tokens"]) == {8 * K}
    by_method = table.data.set_index("method_label")
    row = footprint_row(KINDS["random"], length=8 * K)
    assert by_method.loc["random", "held_bytes"] == row.resident_kv_bytes
    assert by_method.loc["random", "held_of_dense"] == pytest.approx(row.resident_kv_bytes / row.dense_kv_bytes)
    assert by_method.loc["dense", "held_of_dense"] == 1.0
    assert by_method.loc["random", "tpot_s"] == row.tpot_s
    samples = [row for row in demo_rows()[0] if row.method == "random" and row.length_tokens == 8 * K]
    assert by_method.loc["random", "accuracy"] == pytest.approx(sum(row.score for row in samples) / len(samples))
    text = table.text.set_index("method")
    assert text.loc["random", "stays on the GPU"] == KINDS["random"].stays
    assert text.loc["random", "resident (MiB)"] == "11"


def test_accuracy_by_depth_counts_every_scored_prompt_once(wide: dict[str, Table]) -> None:
    table = wide["accuracy_by_depth"]
    samples = [row for row in wide_rows(tasks=2)[0] if row.status == "ok"]
    parts, whole = (table.data[(table.data["depth"] == "all") == side] for side in (False, True))
    for data in (parts, whole):
        pooled = data[data["task"] == "niah_* pooled"]
        assert pooled["n"].sum() == len(samples)
        assert data[data["task"] != "niah_* pooled"]["n"].sum() == len(samples)
    mine = [
        row.score
        for row in samples
        if (row.method, row.task, row.length_tokens) == ("random", "niah_single_1", 32 * K) and 0.2 <= row.depth < 0.4
    ]
    keys = ["method_label", "task", "length_tokens", "depth"]
    cell = table.data.set_index(keys).loc[("random", "niah_single_1", 32 * K, "20-40 %")]
    assert (cell["n"], cell["accuracy"]) == (len(mine), pytest.approx(sum(mine) / len(mine)))
    assert cell["ci_low"] <= cell["accuracy"] <= cell["ci_high"]
    assert set(table.text["task"]) == {"niah_* pooled", "niah_single_1", "niah_multikey_2"}
    assert table.text.columns[-1] == "512K"
    assert set(table.text["512K"]) == {"n/m (a)"}


def test_without_a_footprint_pass_the_ledger_of_the_prompts_stands_in() -> None:
    table = tables_of(demo_rows(), footprints=0)["stays_and_saves"]
    assert set(table.data["bytes_from"]) == {"samples"}
    assert table.data["tpot_s"].isna().all()
    assert "(a) not measured: the footprint was not run yet." in table.notes


def test_statistics_table_says_what_it_cannot_tell(wide: dict[str, Table]) -> None:
    table = wide["statistics"]
    few = table.data[table.data["verdict"] == "inconclusive"]
    assert len(few) > 0
    assert few["pairs_for_6_discordant"].notna().all()
    assert table.text["verdict"].str.contains("at least 6 are needed; about").sum() == len(few)
    assert (table.data["p_holm"] >= table.data["p_value"] - 1e-12).all()


def test_four_formats_hold_the_same_table(tmp_path: Path, wide: dict[str, Table]) -> None:
    for table in wide.values():
        csv, parquet, md, tex = write_table(table, tmp_path)
        from_csv, from_parquet = pd.read_csv(csv), pd.read_parquet(parquet)
        assert list(from_csv.columns) == list(from_parquet.columns) == list(table.data.columns)
        assert len(from_csv) == len(from_parquet) == len(table.data)
        for column in from_csv.select_dtypes("number"):
            numbers = pd.to_numeric(from_parquet[column]).astype("float64")
            assert from_csv[column].astype("float64").to_numpy() == pytest.approx(
                numbers.to_numpy(), rel=1e-8, nan_ok=True
            )
        lines = [line for line in md.read_text().splitlines() if line.startswith("|")]
        assert len(lines) == 2 + len(table.text)
        assert {line.count("|") for line in lines} == {len(table.text.columns) + 1}
        heads = 0
        for block in tex.read_text().split(r"\label{")[1:]:
            rows = [line for line in block.splitlines() if line.endswith(r" \\")]
            again = r"\endhead" in block  # a long table has its head twice: for its first page, and for the others
            assert len(rows) == 1 + again + len(table.text)
            (ampersands,) = {len(re.findall(r"(?<!\\)&", row)) for row in rows}
            heads += ampersands + bool(heads == 0)
        assert heads == len(table.text.columns), "the first column stands in every block"


def test_special_characters_are_escaped() -> None:
    text = pd.DataFrame({"a|b": ["x_1 & 50 % | {y}"], "#": [r"\n"]})
    table = Table("odd", "Odd", "50 % of $ & ~", text, text, ("(a) not measured: a_b.",))
    assert r"x\_1 \& 50 \% \textbar{} \{y\} & \textbackslash{}n \\" in latex(table)
    assert r"\caption{50 \% of \$ \& \textasciitilde{}}" in latex(table)
    assert r"x_1 & 50 % \| {y}" in markdown(table)


def test_numbers_read_well() -> None:
    assert [number(v) for v in (0, 0.0123, 1.5, 96.0, 1234.5, 65536)] == ["0", "0.0123", "1.5", "96", "1,234", "65,536"]
    assert [measured(v) for v in (9.7, 15.52, 0.3512, 103.4)] == ["9.70", "15.5", "0.351", "103"]
    assert [length_text(v) for v in (1024, 524_288, 1_048_576, 1500)] == ["1K", "512K", "1M", "1,500"]
    assert [bytes_text(v) for v in (512, 1536, 3 << 20, 5 << 30)] == ["512 B", "1.5 KiB", "3 MiB", "5 GiB"]
    assert [points(v) for v in (0.0, -0.00001, 0.0125, -0.7)] == ["0.0", "0.0", "+1.2", "-70.0"]
    assert [p_text(v) for v in (1.0, 0.03125, 1e-9)] == ["1", "0.0312", "< 0.0001"]
    assert (byte_unit([1 << 40]).name, byte_unit([2048]).name, byte_unit([]).name) == ("MiB", "KiB", "MiB")


def test_times_of_eager_and_captured_steps_are_told_apart() -> None:
    samples, footprints, info = demo_rows()
    timed = [row for row in footprints if row.status == "ok"]
    assert not any("CUDA graph" in note for note in tables_of((samples, footprints, info))["footprint"].notes)
    graph = [row.model_copy(update={"step_backend": "cuda graph"}) for row in timed]
    assert not any("CUDA graph" in note for note in tables_of((samples, graph, info))["footprint"].notes)
    mixed = [
        row.model_copy(update={"step_backend": "eager: it chooses inside the step"}) if row.method == "random" else row
        for row in graph
    ]
    notes = [note for note in tables_of((samples, mixed, info))["footprint"].notes if "CUDA graph" in note]
    label = next(row.method_label for row in timed if row.method == "random")
    assert len(notes) == 1
    assert f"but eager for {label}:" in notes[0]
    run = make_run(samples, mixed, info=info, folder=".")
    assert f"but eager for {label}:" in summary_text(run)


@pytest.mark.parametrize("labels", [["dense:kv=int8", "dense", "recency"], ["dense", "recency", "dense:kv=int8"]])
def test_dense_of_fewer_bits_is_no_baseline(labels: list[str]) -> None:
    """Wherever it stands among the methods: nothing is compared with it, no reads are a share of its."""
    made = {"tasks": ("niah_single_1",), "lengths": (4096,), "samples": 8, "footprint_lengths": (4096,)}
    tables = tables_of(make_rows(labels, **made))  # type: ignore[arg-type]
    plain = tables_of(make_rows(["dense", "recency"], **made))  # type: ignore[arg-type]
    found = {name: tables[name].data.set_index("method_label") for name in ("statistics", "stays_and_saves")}
    assert set(found["statistics"]["baseline_label"]) == {"dense"}
    assert set(found["statistics"].index) == {"dense:kv=int8", "recency"}
    shares = found["stays_and_saves"]["read_of_dense"]
    assert shares["dense"] == 1
    assert shares["recency"] == plain["stays_and_saves"].data.set_index("method_label")["read_of_dense"]["recency"]
    assert shares["dense:kv=int8"] < 1


def test_without_dense_of_all_bits_nothing_is_compared() -> None:
    made = {"tasks": ("niah_single_1",), "lengths": (4096,), "samples": 8, "footprint_lengths": (4096,)}
    tables = tables_of(make_rows(["dense:kv=int8", "recency"], **made))  # type: ignore[arg-type]
    assert not len(tables["statistics"].data)
    assert tables["stays_and_saves"].data["read_of_dense"].isna().all()
