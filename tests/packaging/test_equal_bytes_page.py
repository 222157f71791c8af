"""docs/equal-bytes.md and the committed JSON say what the rows of `results/reference/h200/equal-bytes` give."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark_scripts import load_script

from kvscope.results.frames import load_run

ROOT = Path(__file__).resolve().parents[2]
PACKED = ROOT / "results" / "reference" / "h200" / "equal-bytes"
PAGE = ROOT / "docs" / "equal-bytes.md"
SHARES = (0.05, 0.135, 0.25)
SHORT, LONG = 4096, 16_384
#: 54 prompts of each of four tasks.
N = 216
Cells = dict[tuple[int, str, float | None], dict[str, Any]]


@pytest.fixture(scope="module")
def result() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        script = load_script(patch, "equal_bytes")
        found = script.result_of(script.found_runs([PACKED], ROOT), script.read_config({}))
        yield json.loads(json.dumps(found)) | {"rounded": script.rounded(found)}


@pytest.fixture(scope="module")
def cells(result: dict[str, Any]) -> Cells:
    return {(cell["length_tokens"], cell["setting"], cell["asked_share"]): cell for cell in result["cells"]}


def settings(cells: Cells, of: str | None, length: int = LONG) -> list[str]:
    """Settings that were asked for a share of something, the most accurate first."""
    mean: dict[str, list[float]] = {}
    for (n, setting, _), cell in cells.items():
        if n == length and cell["asked_of"] == of:
            mean.setdefault(setting, []).append(cell["accuracy"])
    return sorted(mean, key=lambda each: -sum(mean[each]) / len(mean[each]))


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def difference(cell: dict[str, Any]) -> str:
    low, mean, high = (100 * cell[key] for key in ("difference_low", "difference_to_dense", "difference_high"))
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def joined(cells: Cells, length: int, setting: str, column: str) -> str:
    found = [cells.get((length, setting, share)) for share in SHARES]
    return " / ".join("-" if cell is None else percent(cell[column]) for cell in found)


def row(*texts: str) -> str:
    return f"| {' | '.join(texts)} |"


def tables(cells: Cells) -> list[list[str]]:
    """Every line of every table, in the page's order."""
    held, read, free = (settings(cells, of) for of in ("held", "read", None))

    def at(length: int, setting: str, share: float | None) -> dict[str, Any]:
        return cells[length, setting, share]

    return [
        [
            row(f"`{each}`", *(percent(at(LONG, each, share)["accuracy"]) for share in SHARES),
                joined(cells, LONG, each, "read_of_dense"))
            for each in held
        ],
        [row(f"`{each}`", *(difference(at(LONG, each, share)) for share in SHARES)) for each in held],
        [
            row(f"`{each}`", *(joined(cells, LONG, each, column) for column in ("read_of_dense", "accuracy")),
                percent(at(LONG, each, 0.25)["held_of_dense"]), difference(at(LONG, each, 0.25)))
            for each in read
        ],
        [
            row(f"`{each}`", *(percent(at(SHORT, each, share)["accuracy"]) for share in SHARES),
                percent(at(SHORT, each, 0.05)["held_of_dense"]), difference(at(SHORT, each, 0.25)))
            for each in held
        ],
        [
            row(f"`{each}`", *(joined(cells, SHORT, each, column) for column in ("read_of_dense", "accuracy")),
                percent(at(SHORT, each, 0.25)["held_of_dense"]), difference(at(SHORT, each, 0.25)))
            for each in read
        ],
        [
            row(f"`{each}`", *(
                text
                for length in (SHORT, LONG)
                for text in (percent(at(length, each, None)["held_of_dense"]),
                             percent(at(length, each, None)["accuracy"]),
                             "-" if each == "dense" else difference(at(length, each, None)))
            ))
            for each in free
        ],
    ]  # fmt: skip


def test_every_row_of_every_table_is_that_of_the_rows(cells: Cells) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for expected in tables(cells):
        assert "\n".join(expected) in page, "\n".join(expected)


def test_what_the_prose_says_is_in_the_rows(cells: Cells) -> None:
    page = " ".join(PAGE.read_text(encoding="utf-8").split())

    def accuracy(setting: str, share: float | None, length: int = LONG) -> float:
        return 100 * float(cells[length, setting, share]["accuracy"])

    alike = ("snapkv", "pyramidkv", "adakv")
    apart = [
        max(accuracy(each, share, length) for each in alike) - min(accuracy(each, share, length) for each in alike)
        for share in SHARES
        for length in (SHORT, LONG)
    ]
    assert f"within {max(apart):.1f} points of each other" in page
    gains = [accuracy("snapkv:kv=int4", share) - accuracy("snapkv", share) for share in SHARES]
    assert f"gains {min(gains):.1f} to {max(gains):.1f} points at 16K" in page
    lost = [accuracy("dense", None) - accuracy(each, 0.135) for each in ("quest", "dsa")]
    assert f"lose at most {max(lost):.1f} points at 13.5 % of the reads" in page
    assert min(accuracy("dense", None) - accuracy(each, 0.05) for each in ("quest", "dsa")) > 55
    assert all(cells[LONG, "lsa", share]["accuracy"] == max(cells[LONG, each, share]["accuracy"]
               for each in settings(cells, "held")) for share in SHARES)  # fmt: skip
    assert cells[LONG, "lsa", 0.135]["difference_high"] > 0
    assert cells[LONG, "dense:kv=kivi2", None]["held_of_dense"] < 0.25
    assert accuracy("dense:kv=kivi2", None) >= accuracy("lsa", 0.25)
    for length in (SHORT, LONG):
        assert cells[length, "dense:kv=int4", None]["difference_to_dense"] == 0
    samples = load_run(PACKED).samples
    mine = samples[(samples["length_tokens"] == LONG) & samples["method_label"].isin(
        [f"{each}:share={share}" for each in alike for share in SHARES])]  # fmt: skip
    by_task = 100 * mine.groupby(["task", "method_label"])["score"].mean()
    assert by_task["niah_multivalue"].min() > 99
    assert f"at most {by_task['niah_multikey_3'].max():.1f} %" in page


def test_every_cell_has_its_prompts_on_one_card(result: dict[str, Any]) -> None:
    assert {cell["n"] for cell in result["cells"]} == {N}
    assert len(result["cells"]) == 2 * 52
    assert result["environment"]["gpu"] == "NVIDIA H200"
    assert f"{N} prompts" in PAGE.read_text(encoding="utf-8")


def test_what_lacks_is_on_the_page(result: dict[str, Any]) -> None:
    lacks = {(each["step"], each["length_tokens"]) for each in result["not_measured"]}
    assert lacks == {
        ("accuracy", 65_536),
        *((step, n) for step in ("question", "times") for n in (SHORT, LONG, 65_536)),
    }
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`{step}`" in page for step, _ in lacks)
    assert all(cell["tpot_s"] is None for cell in result["cells"])


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
