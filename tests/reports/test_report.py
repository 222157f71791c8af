"""The whole report: idempotent, at work on unfinished runs, self-contained; and the terminal summary."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from synthetic_rows import Rows, demo_rows, single_rows, wide_rows

import kvscope
from kvscope.errors import UsageError
from kvscope.reports import build, make_report
from kvscope.reports.figures_memory import tpot_by_length
from kvscope.reports.summary import summary_text
from kvscope.results.frames import make_run
from kvscope.results.store import RunStore


def stored(folder: Path, rows: Rows, *, samples: int | None = None, footprints: int | None = None) -> Path:
    with RunStore.create(folder, rows[2]) as store:
        store.begin()
        for row in rows[0][:samples]:
            store.append_sample(row)
        for cell in rows[1][:footprints]:
            store.append_footprint(cell)
    return folder


def contents(paths: list[Path]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = stored(tmp_path_factory.mktemp("demo"), demo_rows())
    return folder, make_report(folder)


def test_every_table_and_figure_in_every_format(demo: tuple[Path, list[Path]]) -> None:
    folder, paths = demo
    names = {path.relative_to(folder / "report").as_posix() for path in paths}
    tables = ("main", "stays_and_saves", "accuracy", "accuracy_by_depth", "footprint", "statistics")
    figures = (
        "accuracy_against_memory",
        "accuracy_against_reads",
        "accuracy_by_length",
        "accuracy_by_task",
        "accuracy_minus_dense",
    )
    figures += ("needle_heatmap", "depth_by_task", "memory_by_length", "tpot_by_length")
    expected = {f"tables/{name}.{ending}" for name in tables for ending in ("csv", "md", "tex", "parquet")}
    expected |= {f"figures/{name}.{ending}" for name in figures for ending in ("png", "svg", "csv")}
    assert names == expected | {"report.html"}
    assert all(path.stat().st_size > 100 for path in paths)
    there = {path for path in (folder / "report").rglob("*") if path.is_file()}
    assert there == {*paths, folder / "report/.manifest.json"}, "nothing is left over"


def test_the_same_rows_give_the_same_bytes(demo: tuple[Path, list[Path]]) -> None:
    folder, paths = demo
    before = contents(paths)
    assert contents(make_report(folder)) == before


def test_new_rows_renew_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "all_figures", lambda run, cells: [tpot_by_length(run)])  # drawing takes long
    rows = single_rows()
    stored(tmp_path, rows, samples=2, footprints=0)
    make_report(tmp_path)
    assert not (tmp_path / "report/figures/tpot_by_length.png").exists()
    with RunStore.create(tmp_path, rows[2]) as store:
        for row in rows[0][2:]:
            store.append_sample(row)
        store.append_footprint(rows[1][0])
        make_report(tmp_path)  # also while the run is still being written
    assert (tmp_path / "report/figures/tpot_by_length.png").exists()
    assert "Unfinished run" not in (tmp_path / "report/report.html").read_text()


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path) -> None:
    rows = demo_rows()
    make_report(stored(tmp_path, rows, samples=3, footprints=0))
    page = (tmp_path / "report/report.html").read_text()
    assert "Unfinished run: 3 of 160 sample rows and 0 of 8 footprint rows are there." in page
    assert "Time per output token by length: not drawn, no footprint cell has been timed yet." in page
    assert "not measured: not run yet" in page


def test_a_run_without_rows_still_reports(tmp_path: Path) -> None:
    make_report(stored(tmp_path, demo_rows(), samples=0, footprints=0))
    assert "0 of 160 sample rows" in (tmp_path / "report/report.html").read_text()


def test_a_torn_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "all_figures", lambda run, cells: [])
    stored(tmp_path, single_rows())
    with (tmp_path / "samples.jsonl").open("ab") as file:
        file.write(b'{"torn')
    make_report(tmp_path)
    assert "cut short by an interruption" in (tmp_path / "report/report.html").read_text()
    assert "cut short by an interruption" in summary_text(kvscope.load_run(tmp_path))


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href"):
                self.links.append(value or "")


def test_the_page_needs_nothing_but_itself(demo: tuple[Path, list[Path]]) -> None:
    folder, _ = demo
    text = (folder / "report/report.html").read_text()
    page = _Page()
    page.feed(text)
    assert not page.tags & {"link", "img", "iframe"}
    assert "<script src" not in text
    assert "@import" not in text
    assert "svg" in page.tags
    assert len(page.ids) == len(set(page.ids)), "ids are unique over all figures"
    inner = {link[1:] for link in page.links if link.startswith("#")}
    assert inner <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(page.ids)
    files = [link for link in page.links if not link.startswith("#")]
    assert files
    assert all((folder / "report" / link).is_file() for link in files), "links lead to files of this report only"


def test_text_of_a_run_cannot_break_the_page(tmp_path: Path) -> None:
    samples, footprints, info = single_rows()
    odd = "<b>odd</b> & co"
    rows = (
        [row.model_copy(update={"model": odd}) for row in samples],
        [row.model_copy(update={"model": odd}) for row in footprints],
        info.model_copy(update={"model": odd}),
    )
    make_report(stored(tmp_path, rows))
    text = (tmp_path / "report/report.html").read_text()
    assert "&lt;b&gt;odd&lt;/b&gt; &amp; co" in text
    assert "<b>" not in text


def test_bad_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        make_report(tmp_path / "absent")
    with pytest.raises(UsageError, match="holds no run"):
        make_report(tmp_path)
    stored(tmp_path, single_rows())
    (tmp_path / "report").write_text("in the way")
    with pytest.raises(UsageError, match="is in the way"):
        make_report(tmp_path)


def test_summary_of_the_demo() -> None:
    samples, footprints, info = demo_rows()
    text = summary_text(make_run(samples, footprints, info=info, folder="."))
    assert "reference on CPU" in text
    assert "Accuracy (%, 95 % interval) by length in tokens, n = 10 prompts a cell" in text
    assert re.search(r"^random +3\.75 \(15\.6 %\) +11 \(11\.4 %\)$", text, re.MULTILINE)
    assert "ledger, not NVML" in text
    assert "NVML was not measured: no NVIDIA GPU" in text
    assert "there is no verdict on the savings" in text
    assert re.search(r"^random +-\d.*-\d+\.\d \[-\d+\.\d, -\d+\.\d\] worse$", text, re.MULTILINE)
    assert max(len(line) for line in text.splitlines() if line.startswith(("method", "dense", "random"))) < 100


def test_summary_without_a_footprint_pass_has_the_bytes_of_the_prompts() -> None:
    samples, _, info = demo_rows()
    run = make_run(samples, [], info=info.model_copy(update={"footprint_lengths_tokens": ()}), folder=".")
    text = summary_text(run)
    assert re.search(r"^random +2\.55 \(21\.3 %\) .* 11 \(11\.4 %\)$", text, re.MULTILINE)
    assert "No footprint pass: no times, and no verdict on the savings." in text


def test_summary_of_dense_alone_says_why_there_is_no_difference() -> None:
    samples, footprints, info = single_rows()
    text = summary_text(make_run(samples, footprints, info=info, folder="."))
    assert "Accuracy minus dense (points, paired): none, the run has dense alone." in text


def test_summary_of_a_run_with_failures_and_gaps() -> None:
    samples, footprints, info = wide_rows()
    text = summary_text(make_run(samples[:-9], footprints[:-1], info=info, folder="."))
    assert re.search(r"^dense .* oom$", text, re.MULTILINE)
    assert re.search(r"^lsa:threshold=0.5,tau=64 .* not run$", text, re.MULTILINE)
    assert "Unfinished run: 4311 of 4320 sample rows and 71 of 72 footprint rows are there." in text
    assert "KV cache on the GPU (NVML), MiB" in text
    assert re.search(r"^random .* freed$", text, re.MULTILINE)
    assert re.search(r"^quest .* resident$", text, re.MULTILINE)
