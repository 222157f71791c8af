"""docs/equal-bytes.md and the committed JSON say what the rows of `results/reference/h200/equal-bytes` give."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from benchmark_scripts import load_script

from kvscope.results.frames import Run

ROOT = Path(__file__).resolve().parents[2]
PACKED = ROOT / "results" / "reference" / "h200" / "equal-bytes"
UNKNOWN = PACKED.with_name("equal-bytes-question")
PAGE = ROOT / "docs" / "equal-bytes.md"
SHARES = (0.05, 0.135, 0.25)
SHORT, MIDDLE, LONG = 4096, 16_384, 65_536
LENGTHS = (SHORT, MIDDLE, LONG)
#: 54 prompts of each of four tasks.
N = 216
Cells = dict[tuple[int, str, float | None], dict[str, Any]]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        yield load_script(patch, "equal_bytes")


@pytest.fixture(scope="module")
def runs(script: ModuleType) -> dict[str, Run]:
    """By whether the question was known when a method chose."""
    found: dict[str, Run] = script.found_runs([PACKED, UNKNOWN], ROOT)
    return found


@pytest.fixture(scope="module")
def result(script: ModuleType, runs: dict[str, Run]) -> dict[str, Any]:
    found = script.result_of(runs, script.read_config({}))
    return json.loads(json.dumps(found)) | {"rounded": script.rounded(found)}


@pytest.fixture(scope="module")
def cells(result: dict[str, Any]) -> Cells:
    return {(cell["length_tokens"], cell["setting"], cell["asked_share"]): cell for cell in result["cells"]}


def settings(cells: Cells, of: str | None, length: int = MIDDLE) -> list[str]:
    """Settings that were asked for a share of something, the most accurate first."""
    mean: dict[str, list[float]] = {}
    for (n, setting, _), cell in cells.items():
        if n == length and cell["asked_of"] == of:
            mean.setdefault(setting, []).append(cell["accuracy"])
    return sorted(mean, key=lambda each: -sum(mean[each]) / len(mean[each]))


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def difference(cell: dict[str, Any]) -> str:
    mean, low, high = (cell[f"difference_{key}"] for key in ("to_dense", "low", "high"))
    if low is None:  # every answer has dense's score, and then there is no interval
        return f"{100 * mean:+.1f}"
    mean, low, high = 100 * mean, 100 * low, 100 * high
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def joined(cells: Cells, length: int, setting: str, column: str) -> str:
    found = [cells.get((length, setting, share)) for share in SHARES]
    return " / ".join("-" if cell is None else percent(cell[column]) for cell in found)


def row(*texts: str) -> str:
    return f"| {' | '.join(texts)} |"


def tables(cells: Cells) -> list[list[str]]:
    """Every line of the tables of accuracy, in the page's order."""
    free = settings(cells, None)

    def at(length: int, setting: str, share: float | None) -> dict[str, Any]:
        return cells[length, setting, share]

    found = []
    for length in (LONG, MIDDLE):
        held = settings(cells, "held", length)
        found += [
            [
                row(f"`{each}`", *(percent(at(length, each, share)["accuracy"]) for share in SHARES),
                    joined(cells, length, each, "read_of_dense"))
                for each in held
            ],
            [row(f"`{each}`", *(difference(at(length, each, share)) for share in SHARES)) for each in held],
            [
                row(f"`{each}`", *(joined(cells, length, each, column) for column in ("read_of_dense", "accuracy")),
                    percent(at(length, each, 0.25)["held_of_dense"]), difference(at(length, each, 0.25)))
                for each in settings(cells, "read", length)
            ],
        ]  # fmt: skip
    return [
        *found,
        [
            row(f"`{each}`", *(percent(at(SHORT, each, share)["accuracy"]) for share in SHARES),
                percent(at(SHORT, each, 0.05)["held_of_dense"]), difference(at(SHORT, each, 0.25)))
            for each in settings(cells, "held", MIDDLE)
        ],
        [
            row(f"`{each}`", *(joined(cells, SHORT, each, column) for column in ("read_of_dense", "accuracy")),
                percent(at(SHORT, each, 0.25)["held_of_dense"]), difference(at(SHORT, each, 0.25)))
            for each in settings(cells, "read", MIDDLE)
        ],
        [
            row(f"`{each}`", *(
                text
                for length in (SHORT, MIDDLE)
                for text in (percent(at(length, each, None)["held_of_dense"]),
                             percent(at(length, each, None)["accuracy"]),
                             "-" if each == "dense" else difference(at(length, each, None)))
            ))
            for each in free
        ],
        [
            row(f"`{each}`", percent(at(LONG, each, None)["held_of_dense"]), percent(at(LONG, each, None)["accuracy"]),
                "-" if each == "dense" else difference(at(LONG, each, None)))
            for each in free
        ],
    ]  # fmt: skip


def question_table(result: dict[str, Any]) -> list[str]:
    """Accuracy with the question unknown and known at 13.5 %, largest gain at 64K first."""
    found = {
        (each["length_tokens"], each["method"]): each for each in result["question"] if each["asked_share"] == 0.135
    }
    methods = sorted({name for _, name in found}, key=lambda name: -found[LONG, name]["known_minus_unknown"])
    return [
        row(f"`{name}`", *(
            text
            for length in (MIDDLE, LONG)
            for text in (percent(found[length, name]["accuracy_question_unknown"]),
                         percent(found[length, name]["accuracy_question_known"]), gain(found[length, name]))
        ))
        for name in methods
    ]  # fmt: skip


def gain(cell: dict[str, Any]) -> str:
    low, mean, high = (100 * cell[key] for key in ("difference_low", "known_minus_unknown", "difference_high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def test_every_row_of_every_table_is_that_of_the_rows(cells: Cells, result: dict[str, Any]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for expected in [*tables(cells), question_table(result)]:
        assert "\n".join(expected) in page, "\n".join(expected)


def test_what_the_prose_says_is_in_the_rows(cells: Cells, result: dict[str, Any], runs: dict[str, Run]) -> None:
    page = " ".join(PAGE.read_text(encoding="utf-8").split())

    def accuracy(setting: str, share: float | None, length: int = MIDDLE) -> float:
        return 100 * float(cells[length, setting, share]["accuracy"])

    alike = ("snapkv", "pyramidkv", "adakv")
    apart = [
        max(accuracy(each, share, length) for each in alike) - min(accuracy(each, share, length) for each in alike)
        for share in SHARES
        for length in LENGTHS
    ]
    assert f"within {max(apart):.1f} points of each other" in page
    gains = [
        accuracy("snapkv:kv=int4", share, length) - accuracy("snapkv", share, length)
        for share in SHARES
        for length in (MIDDLE, LONG)
    ]
    assert f"gains {min(gains):.1f} to {max(gains):.1f} points from 16K on" in page
    lost = [accuracy("dense", None, n) - accuracy(each, 0.135, n) for each in ("quest", "dsa") for n in (MIDDLE, LONG)]
    assert f"lose at most {max(lost):.1f} points at 13.5 % of the reads" in page
    assert min(accuracy("dense", None) - accuracy(each, 0.05) for each in ("quest", "dsa")) > 55
    freeing = settings(cells, "held")
    for length, shares in ((MIDDLE, SHARES), (LONG, SHARES[:2])):
        assert all(cells[length, "lsa", share]["accuracy"] == max(cells[length, each, share]["accuracy"]
                   for each in freeing) for share in shares)  # fmt: skip
    assert accuracy("snapkv:kv=int4", 0.25, LONG) - accuracy("lsa", 0.25, LONG) < 0.5
    for length in (MIDDLE, LONG):
        assert cells[length, "lsa", 0.135]["difference_high"] > 0
    at_5 = cells[LONG, "lsa", 0.05]
    assert f"{difference(at_5)} points at 64K" in page
    for length in (MIDDLE, LONG):
        assert cells[length, "dense:kv=kivi2", None]["held_of_dense"] < 0.25
        assert accuracy("dense:kv=kivi2", None, length) >= accuracy("lsa", 0.25, length)
    for length in LENGTHS:
        assert cells[length, "dense:kv=int4", None]["difference_to_dense"] == 0
    (samples,) = (run.samples for run in runs.values() if run.folder == PACKED)
    mine = samples[(samples["length_tokens"] != SHORT) & samples["method_label"].isin(
        [f"{each}:share={share}" for each in alike for share in SHARES])]  # fmt: skip
    by_task = 100 * mine.groupby(["length_tokens", "task", "method_label"])["score"].mean()
    many, identifiers = (by_task.xs(task, level="task") for task in ("niah_multivalue", "niah_multikey_3"))
    assert many.min() > 99
    assert f"at most {identifiers.max():.1f} %" in page
    known = {(each["length_tokens"], each["method"], each["asked_share"]): each for each in result["question"]}
    choosing = [each for (n, name, share), each in known.items() if name in alike and share == 0.135 and n != SHORT]
    low, high = (100 * of(each["known_minus_unknown"] for each in choosing) for of in (min, max))
    assert f"{low:.1f} to {high:.1f} points" in page
    mine_at = [abs(100 * known[n, "lsa", 0.135]["known_minus_unknown"]) for n in (MIDDLE, LONG)]
    assert f"moves by at most {max(mine_at):.1f} points" in page


def test_every_cell_has_its_prompts_on_one_card(result: dict[str, Any]) -> None:
    assert {cell["n"] for cell in result["cells"]} == {N}
    assert len(result["cells"]) == 3 * 52
    assert {each["n"] for each in result["question"]} == {N}
    assert len(result["question"]) == 3 * 29
    assert result["environment"]["gpu"] == "NVIDIA H200"
    assert f"{N} prompts" in PAGE.read_text(encoding="utf-8")


def test_nothing_lacks(result: dict[str, Any]) -> None:
    assert result["not_measured"] == []
    timed = [cell for cell in result["cells"] if cell["tpot_s"] is not None]
    assert {(each["length_tokens"], each["reason"]) for each in timed} == {(length, "") for length in LENGTHS}
    assert len(timed) == 3 * 22


def test_readme_has_the_baselines_of_equal_bytes(cells: Cells) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for setting in ("snapkv", "recency"):
        cell = cells[MIDDLE, setting, 0.135]
        held, accuracy = percent(cell["held_of_dense"]), percent(cell["accuracy"])
        assert f"| `{setting}:share=0.135` (a) | {held} % | {accuracy} % | {difference(cell)} |" in readme
    assert f"dense has {percent(cells[MIDDLE, 'dense', None]['accuracy'])} %" in readme
    lost = [-100 * cells[MIDDLE, setting, 0.135]["difference_to_dense"] for setting in ("snapkv", "recency")]
    assert f"`snapkv` loses {lost[0]:.0f} points, the last tokens alone {lost[1]:.0f}" in readme


def time_rows(cells: Cells) -> list[str]:
    """Median and 90th percentile of a step at each length, the fastest at 64K first."""
    at = {
        (setting, share): [cells[length, setting, share] for length in LENGTHS]
        for (length, setting, share), cell in cells.items() if length == LONG and cell["tpot_s"] is not None
    }  # fmt: skip
    return [
        row(f"`{setting}`" + ("" if share is None else f", {100 * share:g} %"),
            *(f"{1e3 * cell['tpot_s']:.1f} / {1e3 * cell['tpot_p90_s']:.1f}" for cell in found))
        for (setting, share), found in sorted(at.items(), key=lambda item: item[1][-1]["tpot_s"])
    ]  # fmt: skip


def test_times_are_those_of_the_rows(cells: Cells, runs: dict[str, Run]) -> None:
    assert "\n".join(time_rows(cells)) in PAGE.read_text(encoding="utf-8"), "\n".join(time_rows(cells))
    eager = {cell["setting"] for cell in cells.values() if cell["tpot_s"] and cell["step_backend"] != "cuda graph"}
    assert eager == {"adakv", "tova", "h2o"}
    grown_s = [
        cells[LONG, setting, share]["tpot_s"] - cells[SHORT, setting, share]["tpot_s"]
        for (length, setting, share), cell in cells.items()
        if length == LONG and cell["tpot_s"] and cell["step_backend"] == "cuda graph"
    ]
    assert 0.0003 < max(grown_s) < 0.0004
    rows = runs["known"].footprint.set_index(["method_label", "length_tokens"])
    mismatches = rows[rows["verdict"] == "mismatch"]
    assert set(mismatches.index) == {("dense:kv=int8", LONG), ("dense:kv=kivi2", LONG)}
    ledger = mismatches["resident_kv_bytes"] + mismatches["metadata_bytes"]
    assert {round((nvml - held) / 1e6) for nvml, held in zip(mismatches["kv_nvml_bytes"], ledger, strict=True)} == {71}
    assert set(rows["verdict"]) == {"below_resolution", "mismatch"}


def test_shares_that_were_missed_are_those_the_page_names(result: dict[str, Any]) -> None:
    off = result["more_than_a_tenth_off"]
    held = {(each["length_tokens"], each["asked_share"]) for each in off if each["asked_of"] == "held"}
    assert held == {(SHORT, 0.05)}
    # Every method that frees bytes missed it.
    assert len([each for each in off if each["asked_of"] == "held"]) == 12
    read = {each["method_label"].partition(":")[0] for each in off if each["asked_of"] == "read"}
    assert read == {"dsa", "moba", "msa", "quest"}


def test_the_json_is_that_of_the_rows(result: dict[str, Any]) -> None:
    committed = json.loads((ROOT / "benchmarks" / "results" / "equal_bytes_h200.json").read_text(encoding="utf-8"))
    assert committed == json.loads(json.dumps(result["rounded"]))
