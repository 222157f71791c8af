"""FlashMemory's printed numbers, each recomputed here a second time by hand."""

import csv
import json
from pathlib import Path

import pytest

from kvscope import cli
from kvscope.harness.studies.flashmemory.accuracy import accuracy_groups, rows_with_questions
from kvscope.harness.studies.flashmemory.check import Check, Group, checks_text
from kvscope.harness.studies.flashmemory.memory import deployed_bytes, memory_groups
from kvscope.harness.studies.flashmemory.serving import serving_groups
from kvscope.methods.lsa.printed import SERVED, TABLE_1
from kvscope.results.grim import can_be_a_count

GROUPS = [*memory_groups(), *accuracy_groups(), *serving_groups()]
CHECKS = {check.key: check for group in GROUPS for check in group.checks}
#: 3,850 B a token and 2^30 bytes a GB, as the derivation of the table has it.
DENSE_GB = (0.169, 0.657, 1.810, 0.459, 1.836, 0.235, 0.470, 0.940, 1.880)
ROWS = [row.label.replace(" ", "_") for row in TABLE_1]
#: HCA entries (20 x 584 / 128 B a token) and the keys of three layers (3 x 132 / 4) over the full cache.
LEFT_OUT_PERCENT = 100 * (91.25 + 99) / (21 * 716 / 4 + 91.25)


def test_every_check_has_a_key_of_its_own() -> None:
    assert len(CHECKS) == sum(len(group.checks) for group in GROUPS)


@pytest.mark.parametrize(("row", "expected_gb"), list(zip(ROWS, DENSE_GB, strict=True)))
def test_full_cache_of_a_row(row: str, expected_gb: float) -> None:
    check = CHECKS[f"full_cache_{row}"]
    assert check.recomputed == pytest.approx(expected_gb, abs=6e-4)
    assert check.printed == pytest.approx(check.recomputed, rel=0.025)


@pytest.mark.parametrize(("row", "place"), list(zip(ROWS, range(9), strict=True)))
def test_share_of_a_row(row: str, place: int) -> None:
    check = CHECKS[f"share_{row}"]
    assert check.printed == 100 * TABLE_1[place].lsa_gb / TABLE_1[place].dense_gb
    assert check.difference == pytest.approx(LEFT_OUT_PERCENT)


@pytest.mark.parametrize(
    ("key", "printed", "recomputed", "words"),
    [
        ("mean_of_ratios", 13.5, 13.06, "rounding allows 11.9 to 14.3 %"),
        ("ratio_of_means", 13.5, 10.70, "0.90 of 8.41 GB"),
        ("mean_with_hca", 13.5, 15.43, "91.25 B a token"),
        ("mean_with_hca_and_keys", 13.5, 18.01, "99 B a token"),
        ("saving_LongBench-v2-L_493K", 90, 90.00, "cannot be decided"),
        ("saving_LongMemEval-M_500K", 90, 90.66, "more than 90 % holds"),
        ("saving_RULER_512K", 90, 90.37, "more than 90 % holds"),
        ("deployed_gb", 0.37, 384 * 64 * 21 * 716 / 1e9, "384 pages x 64 entries x 21 layers x 716 B"),
        ("deployed_share_recalled", 10, 9.15, "256K, 512K, 1M"),
        ("deployed_share_all", 10, 13.85, "0.56 of 4.04 GB"),
        ("example_bytes_per_token", 524_288, 2 * 32 * 32 * 128 * 2, "32 layers x 32 heads x 128 x 2 bytes"),
        ("example_pruned_gb", 5.4, 5.4, "The arithmetic holds"),
        ("example_dense_gb", 40, 268.4, "76,294 tokens"),
        ("average_dense", 76.9, 76.92, "mean of the nine rows"),
        ("average_lsa", 77.5, 77.48, "mean of the nine rows"),
        ("average_recency", 33.3, 33.18, "cannot give this average"),
        ("average_random", 38.7, 38.71, "mean of the nine rows"),
        ("gain", 0.6, 0.556, "after rounding"),
        ("gain_LongBench-v2", 0.6, 1.5, "0 lose and 3 gain"),
        ("gain_LongMemEval", 0.6, 1.15, "0 lose and 2 gain"),
        ("gain_RULER", 0.6, -0.45, "2 lose and 2 gain"),
        ("pairs_for_gain", None, (1.95996 + 0.84162) ** 2 * (0.1 - 0.006**2) / 0.006**2, "80 % power"),
        ("noise_LongBench-v2-S_46K", 2.7, 1.3, "inside"),
        ("noise_LongBench-v2-M_179K", 2.7, 1.3, "inside"),
        ("noise_LongBench-v2-L_493K", 2.7, 1.9, "inside"),
        ("flops_constant", 26.6, 26.54, "weights"),
        ("flops_dense_256K", 50.8, 26.54 + 65_536 * 0.000346752, "65,536 entries leave 1.5 GFLOP"),
        ("flops_dense_512K", 73.5, 26.54 + 131_072 * 0.000346752, "131,072 entries leave 1.5 GFLOP"),
        ("flops_dense_1M", 118.9, 26.54 + 262_144 * 0.000346752, "262,144 entries leave 1.5 GFLOP"),
        ("flops_lsa_256K", 28.8, 26.54 + 96 * 64 * 0.000346752, "6,144 entries leave 0.1 GFLOP"),
        ("flops_lsa_512K", 31.0, 26.54 + 192 * 64 * 0.000346752, "12,288 entries leave 0.2 GFLOP"),
        ("flops_lsa_1M", 35.4, 26.54 + 384 * 64 * 0.000346752, "24,576 entries leave 0.3 GFLOP"),
        ("flops_ratio_256K", 0.57, 0.65, "7.5 GFLOP for both"),
        ("flops_ratio_512K", 0.42, 0.53, "12.9 GFLOP for both"),
        ("flops_ratio_1M", 0.30, 0.42, "23.6 GFLOP for both"),
        ("speedup_256K", 1.7, 2759 / 1584, "2,759 over 1,584"),
        ("speedup_512K", 2.0, 2008 / 1028, "2,008 over 1,028"),
        ("speedup_1M", 2.8, 1266 / 455, "1,266 over 455"),
        ("streams_256K", 1.7, 76 / 47, "36.3 against 33.7 tokens a second, 1.08x"),
        ("streams_512K", 2.0, 60 / 25, "33.5 against 41.1 tokens a second, 0.81x"),
        ("streams_1M", 2.8, 30 / 11, "42.2 against 41.4 tokens a second, 1.02x"),
    ],
)
def test_a_printed_number(key: str, printed: float | None, recomputed: float, words: str) -> None:
    check = CHECKS[key]
    assert check.printed == printed
    assert check.recomputed == pytest.approx(recomputed, abs=6e-3, rel=5e-4)
    assert words in check.meaning
    assert check.meaning.endswith(".")
    if printed is not None:
        assert check.difference == pytest.approx(recomputed - printed, abs=0.06)


IMPOSSIBLE = {
    "grim_LongMemEval-S_125K_random": (20.1, 500, "100 and 101"),
    "grim_LongMemEval-M_500K_dense": (39.3, 500, "196 and 197"),
    "grim_LongMemEval-M_500K_recency": (23.1, 500, "115 and 116"),
    "grim_LongMemEval-M_500K_random": (25.7, 500, "128 and 129"),
    "grim_LongBench-v2-S_46K_lsa": (70.2, 180, "126 and 127"),
    "grim_LongBench-v2-M_179K_dense": (67.6, 215, "145 and 146"),
    "grim_LongBench-v2-M_179K_lsa": (68.9, 215, "148 and 149"),
    "grim_LongBench-v2-M_179K_random": (48.9, 215, "105 and 106"),
    "grim_LongBench-v2-L_493K_dense": (68.1, 108, "73 and 74"),
    "grim_LongBench-v2-L_493K_lsa": (70.0, 108, "75 and 76"),
    "grim_LongBench-v2-L_493K_recency": (54.3, 108, "58 and 59"),
    "grim_LongBench-v2-L_493K_random": (46.9, 108, "50 and 51"),
}


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_an_accuracy_that_is_no_count(key: str) -> None:
    percent, n, counts = IMPOSSIBLE[key]
    assert CHECKS[key].printed == percent
    assert counts in CHECKS[key].meaning
    assert percent not in [round(100 * k / n, 1) for k in range(n + 1)]


def test_the_other_accuracies_of_these_sets_are_counts() -> None:
    assert {key for key in CHECKS if key.startswith("grim_")} == set(IMPOSSIBLE)
    asked = [(percent, n) for row, n, _ in rows_with_questions() for percent in row.accuracies_percent.values()]
    assert len(asked) == 20
    assert sum(percent in [round(100 * k / n, 1) for k in range(n + 1)] for percent, n in asked) == 20 - len(IMPOSSIBLE)


def test_the_deployed_share_is_the_same_at_every_length() -> None:
    shares = [sum(deployed_bytes(served).values()) / served.tokens for served in SERVED]
    assert shares == pytest.approx([shares[0]] * 3)


@pytest.mark.parametrize(
    ("percent", "n", "digits", "possible"),
    [(33.3, 3, 1, True), (33.4, 3, 1, False), (0, 7, 1, True), (100, 7, 1, True), (12.25, 40, 1, False),
     (12.5, 40, 1, True), (50.05, 1000, 1, True), (14, 7, 0, True), (15, 7, 0, False)],
)  # fmt: skip
def test_grim(percent: float, n: int, digits: int, possible: bool) -> None:
    assert can_be_a_count(percent, n=n, digits=digits) is possible


@pytest.mark.parametrize(("percent", "n"), [(101, 5), (-1, 5), (50, 0)])
def test_what_is_no_accuracy_is_refused(percent: float, n: int) -> None:
    with pytest.raises(ValueError, match="no accuracy"):
        can_be_a_count(percent, n=n)


def test_the_table_folds_at_80_columns_and_a_report_ends_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_cli(["verify", "flashmemory"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "mean of the nine ratios                       13.5 %       13.06 %       -0.44 %" in text
    assert all(group.title in text for group in GROUPS)


def test_a_long_name_wraps_and_nil_has_no_minus() -> None:
    check = Check(key="k", what="a name " * 9, printed=1.0, recomputed=0.99, unit="x", meaning="m.", source="s")
    lines = checks_text([Group(title="t", checks=(check,))]).splitlines()
    assert lines[4].split()[-6:] == ["1.0", "x", "1.0", "x", "+0.0", "x"]
    assert lines[5].startswith("name a name")


def test_json_and_csv_hold_every_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "numbers.csv"
    assert cli.run_cli(["verify", "flashmemory", "--json", "--out", str(out)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [each["key"] for each in printed] == list(CHECKS)
    assert [each["recomputed"] for each in printed] == [check.recomputed for check in CHECKS.values()]
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["recomputed"]) for row in rows] == [each["recomputed"] for each in printed]
    assert rows[0]["unit"] == "GB"
    assert all(row["source"] and row["meaning"] for row in rows)
    assert cli.run_cli(["verify", "flashmemory", "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
