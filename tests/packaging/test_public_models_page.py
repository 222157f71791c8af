"""docs/public-models.md and the committed JSON say what the rows of results/reference/h200/smollm2-135m give."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmark_scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
PACKED = ROOT / "results" / "reference" / "h200" / "smollm2-135m"
PAGE = ROOT / "docs" / "public-models.md"
NAMES = {
    "dense": "`dense`",
    "lsa:indexer=landmark at its share": "`lsa:indexer=landmark`, 24 % asked",
    "lsa:indexer=indexer at its share": "`lsa` (fit in 3 minutes), 24 % asked",
    "lsa:indexer=indexer": "`lsa` (fit in 3 minutes), its threshold",
}


@pytest.fixture(scope="module")
def result() -> Iterator[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        script = load_script(patch, "public_models_result")
        found = script.result_of(PACKED)
        yield {"exact": found, "rounded": json.loads(json.dumps(script.rounded(found))), "plain": script.plain_label}


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def test_the_tables_are_those_of_the_rows(result: dict[str, Any]) -> None:
    page, readme = (path.read_text(encoding="utf-8") for path in (PAGE, ROOT / "README.md"))
    pooled = {cell["method_label"]: cell for cell in result["exact"]["pooled"]}
    for label, name in NAMES.items():
        cell = pooled[label]
        low, mean, high = (100 * (cell.get(f"difference{end}") or 0) for end in ("_low", "", "_high"))
        told = "" if label == "dense" else f" {mean:+.1f} [{low:+.1f}, {high:+.1f}]"
        discordant = "" if label == "dense" else f" {cell['lost']} / {cell['won']}"
        first = f"| {name} | {percent(cell['held_of_managed'])} | {percent(cell['accuracy'])} |"
        row = f"{first}{told} |{discordant} | {cell['n']:,} |"
        assert row in page, row
        if "landmark" in label:
            held, right = percent(cell["held_of_managed"]), percent(cell["accuracy"])
            assert f"| SmolLM2 135M, `lsa:indexer=landmark` (b) | {held} % | {right} % |{told} |" in readme
    by_length = {
        (result["plain"](cell["method_label"]), cell["length_tokens"]): cell for cell in result["exact"]["test"]
    }
    for label, name in NAMES.items():
        cells = [by_length[label, length] for length in (2048, 4096, 8192)]
        parts = [part for cell in cells for part in (percent(cell["held_of_managed"]), percent(cell["accuracy"]))]
        assert f"| {name} | {' | '.join(parts)} |" in page
    more = by_length["lsa:indexer=landmark at its share", 8192]
    low, mean, high = (100 * more[f"difference{end}"] for end in ("_low", "", "_high"))
    assert f"{mean:.1f} [{low:+.1f}, {high:+.1f}] points more" in page
    assert f"{more['won']} prompts are won and {more['lost']} lost" in page
    lost = by_length["lsa:indexer=indexer at its share", 2048]["lost"]
    assert (
        f"Of the {pooled['lsa:indexer=indexer at its share']['lost']} answers it loses at 24 %, {lost} are"
        in " ".join(page.split())
    )
    ties = sum(cell["ties"] for cell in pooled.values())
    assert ties > sum(cell["n"] for cell in pooled.values()) / 2


def test_tasks_were_named_by_dense_before(result: dict[str, Any]) -> None:
    tasks = result["exact"]["tasks"]
    assert tasks["tasks"] == [task for task, mean in tasks["dense"].items() if mean >= tasks["least_score"]]
    assert tasks["seed"] >= 1000
    page = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert f"`niah_single_1`, in {tasks['dense']['niah_single_1']:.0%}".replace("%", " %") in page
    assert f"`long_qa` has {tasks['dense']['long_qa']:.0%}".replace("%", " %") in page
    assert tasks["dense"]["vt"] == 0


def test_the_json_is_that_of_the_rows(result: dict[str, Any]) -> None:
    committed = json.loads((ROOT / "benchmarks" / "results" / "public_models_h200.json").read_text(encoding="utf-8"))
    assert committed["models"] == [result["rounded"]]
    assert result["exact"]["environment"]["gpu"] == "NVIDIA H200"


def test_nothing_of_a_machine_is_kept() -> None:
    for path in PACKED.rglob("*.json"):
        assert "/tmp/" not in path.read_text(encoding="utf-8"), path
    assert not list(PACKED.rglob("*.safetensors"))
