"""The page over a folder of runs: a row a method, sorted without a script, and nobody's file is lost to it."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_rows import H100, Rows, make_rows, single_rows

from kvscope.errors import UsageError
from kvscope.reports.index import COLUMNS, Cell, index_rows, page, write_index
from kvscope.reports.legible import legible
from kvscope.results.frames import make_run

PLACE = {name: at for at, (name, _) in enumerate(COLUMNS)}


def rows_of(rows: Rows, folder: str) -> list[list[Cell]]:
    return index_rows(legible(make_run(rows[0], rows[1], info=rows[2], folder=folder)))


class _Table(HTMLParser):
    """Rows of cells, with the style of each row and every link."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[tuple[str, list[str]]] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append((values.get("style") or "", []))
        self._inside = tag in ("td", "th", "a") and bool(self.rows)
        if tag in ("td", "th"):
            self.rows[-1][1].append("")
        if values.get("href"):
            self.links.append(str(values["href"]))

    def handle_data(self, data: str) -> None:
        if self._inside and self.rows[-1][1]:
            self.rows[-1][1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = False


def order(table: _Table, column: str, way: str) -> list[str]:
    """Methods in the order that the style of their rows gives them."""
    name = f"--{way}{PLACE[column]}"
    placed = [(int(re.findall(rf"{name}:(\d+)", style)[0]), cells[PLACE["method"]]) for style, cells in table.rows[1:]]
    return [method for _, method in sorted(placed, key=lambda row: row[0])]


def test_a_row_a_method_with_the_numbers_of_the_report() -> None:
    rows = make_rows(["dense", "lsa:threshold=0.5,tau=64"], machine=H100, tasks=("niah_single_1",), lengths=(4096,),
                     samples=6, footprint_lengths=(4096,))  # fmt: skip
    dense, lsa = rows_of(rows, "runs/a b#%")
    assert dense[PLACE["run"]].href == "a%20b%23%25/report/report.html"
    assert dense[PLACE["of dense (%)"]].text == "100.0"
    assert lsa[PLACE["of dense (%)"]].key == pytest.approx(
        (rows[1][1].resident_kv_bytes + rows[1][1].metadata_bytes) / rows[1][1].dense_kv_bytes
    )
    assert lsa[PLACE["TPOT (ms)"]].key == rows[1][1].tpot_s
    assert dense[PLACE["minus dense (points)"]] == Cell("n/m", None)
    assert (dense[PLACE["device"]].text, dense[PLACE["state"]].text) == ("NVIDIA H100", "complete")
    short = rows_of((rows[0][:3], [], rows[2]), "b")
    assert {row[PLACE["state"]].text for row in short} == {"unfinished"}


def test_every_column_sorts_both_ways_and_what_was_not_measured_is_last() -> None:
    def row(method: str, accuracy: float | None) -> list[Cell]:
        cells = [Cell("x", "x") for _ in COLUMNS]
        cells[PLACE["method"]] = Cell(method, method)
        cells[PLACE["accuracy (%)"]] = Cell(str(accuracy), accuracy)
        return cells

    table = _Table(page([row("c", 0.5), row("a", None), row("b", 0.25)], []))
    assert order(table, "accuracy (%)", "u") == ["b", "c", "a"]
    assert order(table, "accuracy (%)", "d") == ["c", "b", "a"]
    assert order(table, "method", "u") == ["a", "b", "c"]
    assert order(table, "run", "d") == ["c", "a", "b"], "equal ones stay as they are"


def test_the_page_needs_no_script_and_shows_names_as_text() -> None:
    rows = single_rows()
    info = rows[2].model_copy(update={"model": "<b>m</b>\x1b[31m"})
    samples = [row.model_copy(update={"model": info.model}) for row in rows[0]]
    text = page(rows_of((samples, [], info), "javascript:alert(1)"), ["<i>bad\x07"])
    assert "&lt;b&gt;m&lt;/b&gt;\\x1b[31m" in text
    assert "&lt;i&gt;bad\\x07" in text
    table = _Table(text)
    assert not table.tags & {"script", "img", "link", "iframe", "b", "i"}
    assert table.links == ["javascript%3Aalert%281%29/report/report.html"]
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; style-src 'unsafe-inline';")
    for at in range(len(COLUMNS)):
        for way in "ud":
            assert f'id="{way}{at}"' in text
            assert f'<label for="{way}{at}"' in text
            assert f"#{way}{at}:checked ~ .scroll tbody tr {{ order: var(--{way}{at}); }}" in text


def test_a_time_that_is_not_to_be_trusted_has_a_note() -> None:
    rows = single_rows()
    busy = rows[1][0].model_copy(update={"load_1min": 9.0, "cpu_cores": 2})
    (row,) = rows_of((rows[0], [busy], rows[2]), "a")
    text = page([row], [])
    assert f"{row[PLACE['TPOT (ms)']].text} (a)" in text
    assert "(a) time not to be trusted: host load over 8 on 2 cores." in text


def test_a_page_replaces_its_last_one_and_nothing_else(tmp_path: Path) -> None:
    path = write_index(tmp_path, [], ["first"])
    assert write_index(tmp_path, [], ["second"]) == path
    assert "second" in path.read_text()
    assert [each.name for each in tmp_path.iterdir()] == ["index.html"]
    path.write_text("somebody's")
    with pytest.raises(UsageError, match="is no index of runs that kvscope wrote"):
        write_index(tmp_path, [], [])
    assert path.read_text() == "somebody's"
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere.html")
    with pytest.raises(UsageError, match="is a link"):
        write_index(tmp_path, [], [])
    assert not (tmp_path / "elsewhere.html").exists()
