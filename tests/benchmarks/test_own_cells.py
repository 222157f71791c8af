"""Other weights against the old ones, cell by cell."""

from pathlib import Path

import pytest
from benchmark_scripts import load_script
from synthetic_rows import Rows, make_rows

import kvscope
from kvscope.errors import UsageError
from kvscope.results.store import RunStore

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FAR_TOKENS = 262144


def stored(folder: Path, rows: Rows) -> "kvscope.Run":
    with RunStore.create(folder, rows[2]) as store:
        store.begin()
        for row in rows[0]:
            store.append_sample(row)
    return kvscope.load_run(folder)


def test_every_cell_has_its_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import own_cells

    rows = make_rows(["dense"], tasks=("vt", "cwe"), lengths=(4096, FAR_TOKENS), samples=100, footprint_lengths=())
    right = [row.model_copy(update={"score": 1.0}) for row in rows[0]]
    # One prompt of a hundred is lost at each length: a point.
    worse = [row.model_copy(update={"score": 0.0}) if (row.task, row.sample) == ("vt", 7) else row for row in right]
    old, new = (stored(tmp_path / name, (each, [], rows[2])) for name, each in (("old", right), ("new", worse)))
    found = own_cells.compare(old, new)
    assert [
        (cell["task"], cell["lengths_tokens"], cell["n"], cell["points"], cell["allowed_points"], cell["within"])
        for cell in [*found["cells"], *found["pooled"]]
    ] == [
        ("cwe", [4096], 100, 0.0, 0.5, True),
        ("vt", [4096], 100, -1.0, 0.5, False),
        ("cwe", [FAR_TOKENS], 100, 0.0, 2.0, True),
        ("vt", [FAR_TOKENS], 100, -1.0, 2.0, True),
        ("all", [4096], 200, -0.5, 0.5, True),
        ("all", [FAR_TOKENS], 200, -0.5, 2.0, True),
    ]
    table = list(own_cells.lines(found))
    assert table[3].startswith("| vt | 4K | 100 | 100.0 | 99.0 | -1.0 [")
    assert table[3].endswith("| 1 / 0 | -0.5 | **below** |")
    assert max(map(len, table)) <= 100
    assert own_cells.compare(new, new)["cells"][1]["within"]


def test_runs_without_a_common_prompt_are_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_cells = load_script(monkeypatch, "own_cells")
    runs = [
        stored(tmp_path / task, make_rows(["dense"], tasks=(task,), lengths=(4096,), samples=2, footprint_lengths=()))
        for task in ("vt", "cwe")
    ]
    with pytest.raises(UsageError, match="No prompt was answered by dense in both runs"):
        own_cells.compare(*runs)
