"""Figures and tables as a paper takes them: formats, widths, names, and the same numbers whatever is shown."""

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from synthetic_rows import Rows, demo_rows, wide_rows
from test_figures import covered_pairs, placed_texts
from test_report import stored

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.reports import build
from kvscope.reports.build import all_figures, write_report
from kvscope.reports.cells import accuracy_cells
from kvscope.reports.figure_parts import ReportFigure
from kvscope.reports.latex import MOST_FLOAT_ROWS, TEXT_WIDTH_PT, latex
from kvscope.reports.look import Look, fitted, look, make_look, wearing
from kvscope.reports.shown import shown_run, shown_table
from kvscope.reports.table_parts import Table
from kvscope.reports.tables import all_tables
from kvscope.reports.tables_main import MOST_ROWS
from kvscope.results.frames import Run, load_run, make_run

SWEPT = ["dense", "lsa:budget_tokens=16,tau=4", "lsa", "recency:budget_fraction=0.135"]


def run_of(rows: Rows) -> Run:
    return make_run(rows[0], rows[1], info=rows[2], folder=".")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = stored(tmp_path_factory.mktemp("published"), demo_rows())
    options = ["--format", "pdf,svg,png", "--width", "3.3in", "--no-title", "--methods", "dense,random"]
    assert cli.run_cli(["report", str(folder), *options, "--label", "random=Random 10 %", "--style", "paper"]) == 0
    return folder / "report"


def test_figures_have_the_width_and_their_text_as_fonts(published: Path) -> None:
    names = {path.stem for path in published.glob("figures/*.pdf")}
    assert "memory_by_length" in names
    for name in names:
        pdf = (published / f"figures/{name}.pdf").read_bytes()
        assert b"/FontFile2" in pdf, "TrueType, embedded"
        assert b"/Type3" not in pdf
        assert b"CreationDate" not in pdf
        box = re.search(rb"/MediaBox \[ *0 0 ([\d.]+)", pdf)
        assert box is not None
        assert float(box[1]) == pytest.approx(72 * 3.3, abs=1)
        with Image.open(published / f"figures/{name}.png") as picture:
            assert picture.info["dpi"][0] == pytest.approx(300, abs=0.1)
            assert picture.size[0] == pytest.approx(990, abs=1)
        svg = (published / f"figures/{name}.svg").read_text()
        assert "<text" in svg
        assert "Random 10 %" in svg or name in ("depth_by_task",)
    assert (published / "figures/figures.tex").read_text().count(r"\includegraphics{") == len(names)


def test_chosen_methods_alone_are_shown_with_the_numbers_of_the_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "all_figures", lambda run, cells: [])  # drawing is most of a report's time
    stored(tmp_path, demo_rows())
    write_report(load_run(tmp_path))
    before = pd.read_csv(tmp_path / "report/tables/statistics.csv")
    write_report(load_run(tmp_path), make_look(methods="dense,random"))
    part = pd.read_csv(tmp_path / "report/tables/statistics.csv")
    pd.testing.assert_frame_equal(part, before[before["method_label"] == "random"].reset_index(drop=True))
    text = (tmp_path / "report/tables/statistics.md").read_text()
    assert "Shown: dense, random; the run has more methods." in text
    assert "recency" not in text


@pytest.mark.parametrize(("make", "width_in"), [(demo_rows, 3.3), (demo_rows, 6.9), (wide_rows, 3.3)])
def test_no_text_covers_another_in_a_narrow_figure(make: Any, width_in: float) -> None:
    run = run_of(make(tasks=2) if make is wide_rows else make())
    chosen = Look(width_in=width_in, titled=False, style="paper", names={"lsa:threshold=0.5,tau=64": "LSA"})
    with wearing(chosen):
        drawn = [figure for figure in all_figures(run, accuracy_cells(run)) if isinstance(figure, ReportFigure)]
        assert len(drawn) >= 8
        for figure in drawn:
            width, height = figure.figure.get_size_inches() * figure.figure.dpi
            boxes = placed_texts(figure)
            for text, box in boxes:
                assert min(box.x0, box.y0) >= -1, (figure.name, text)
                assert box.x1 <= width + 1, (figure.name, text)
                assert box.y1 <= height + 1, (figure.name, text)
            assert covered_pairs(boxes, x_px=2, y_px=2) == [], figure.name


def test_a_table_with_chosen_methods_keeps_their_notes_alone() -> None:
    data = pd.DataFrame({"method_label": ["a", "b"]})
    text = pd.DataFrame({"method": ["a", "b"], "x": ["n/m (a)", "n/m (b)"]})
    table = Table("t", "T", "c", data, text, ("(a) why.", "(b) what.", "Else."))
    assert shown_table(table) == table
    with wearing(Look(methods=("b",), names={"b": "B"})):
        shown = shown_table(table)
    assert shown.text["method"].tolist() == ["B"]
    assert shown.data["method_label"].tolist() == ["b"]
    assert shown.notes == ("(b) what.", "Else.", "Shown: B; the run has more methods.")
    assert shown_run(run_of(demo_rows())).info.methods, "no look, no change"


def test_labels_with_commas_and_equals_signs_are_found() -> None:
    names = ["recency:budget_fraction=0.135=Recency", "lsa=LSA", "lsa:budget_tokens=16,tau=4=LSA = 16"]
    worn = fitted(
        make_look(methods="lsa,recency:budget_fraction=0.135,lsa:budget_tokens=16,tau=4", names=names), SWEPT, where="R"
    )
    assert worn.methods == tuple(SWEPT[1:])
    assert worn.names == {SWEPT[1]: "LSA = 16", "lsa": "LSA", SWEPT[3]: "Recency"}
    assert (make_look(width="84mm").width_in, make_look(width="240pt").width_in) == pytest.approx((3.307, 3.321), 1e-3)
    assert look() == Look()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--format", "pdf,eps"], "'eps' is no format"),
        (["--width", "3.3"], "'3.3' is no width: write 3.3in, 84mm or 240pt, 2 to 20 inches."),
        (["--width", "1in"], "is no width"),
        (["--width", "nanin"], "is no width"),
        (["--style", "poster"], "write screen or paper"),
        (["--label", "random"], "write LABEL=NAME"),
        (["--label", "randon=R"], "Did you mean 'random'?"),
        (["--label", "random= "], "gives no name"),
        (["--label", "random=dense"], "two methods would be called 'dense'"),
        (["--label", "random=a", "--label", "random=b"], "--label names 'random' twice: keep one."),
        (["--methods", "dense,randon"], "has no method 'randon'. Did you mean 'random'?"),
        (["--methods", ","], "has no method ''"),
    ],
)
def test_bad_options_are_one_sentence_and_write_nothing(
    options: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stored(tmp_path, demo_rows(), samples=8, footprints=0)
    assert cli.run_cli(["report", str(folder), *options]) == UsageError.exit_code
    said = capsys.readouterr()
    assert sentence in said.err
    assert said.out == "", "no table goes before a refusal"
    assert not list(folder.glob("report/*/*"))


def test_a_width_without_room_for_names_says_so(tmp_path: Path) -> None:
    folder = stored(tmp_path, demo_rows())
    with pytest.raises(UsageError, match="leave no room beside the names"):
        write_report(load_run(folder), make_look(width="2in", names=[f"random={'Long name ' * 5}"]))


def widths_pt(text: str) -> list[float]:
    """Sum of the columns of every table, where they have widths."""
    found = []
    for spec in re.findall(r"\\begin\{(?:tabular|longtable)\}\{(@.*@\{\})\}", text):
        shares = [float(share) for share in re.findall(r"p\{([\d.]+)\\linewidth\}", spec)]
        found.append(TEXT_WIDTH_PT * sum(shares) + 6 * (len(shares) - 1) if shares else 0.0)
    return found


@pytest.mark.parametrize("make", [demo_rows, lambda: wide_rows(tasks=2)])
def test_latex_tables_fit_the_text(make: Any) -> None:
    run = run_of(make())
    n_long = 0
    for table in all_tables(run, accuracy_cells(run)):
        text = latex(table)
        assert max(widths_pt(text)) <= TEXT_WIDTH_PT + 1, table.name
        assert text.count(r"\toprule") >= 1
        is_long = len(table.text) > MOST_FLOAT_ROWS
        n_long += is_long
        assert (r"\begin{longtable}" in text) == is_long
        columns = {str(column) for column in table.text.columns}
        heads = re.findall(r"\\toprule\n(.*) \\\\", text)
        told = {cell.replace(r"\allowbreak{}", "").replace("\\", "") for head in heads for cell in head.split(" & ")}
        assert columns <= told, "no column is lost"
    assert n_long >= (1 if make is not demo_rows else 0)


def test_the_main_table_has_ten_rows_at_most_dense_among_them() -> None:
    samples, footprints, info = demo_rows()
    others = [f"random:seed={i}" for i in range(1, 12)]

    def copies(rows: list[Any]) -> list[Any]:
        more = [row.model_copy(update={"method_label": o}) for row in rows for o in others if row.method == "random"]
        return [*rows, *more]

    random = next(method for method in info.methods if method.name == "random")
    methods = (*info.methods, *(random.model_copy(update={"label": label}) for label in others))
    run = make_run(copies(samples), copies(footprints), info=info.model_copy(update={"methods": methods}), folder=".")
    main = all_tables(run, accuracy_cells(run))[0]
    assert (main.name, len(main.text)) == ("main", MOST_ROWS)
    assert main.text["method"].iloc[0] == "dense"
    assert len(main.text.columns) == 6
    assert "5 methods are in the other tables alone" in main.notes[-1]


def test_the_main_table_stands_at_the_longest_length_that_dense_was_measured_at() -> None:
    run = run_of(wide_rows(tasks=2))
    main = all_tables(run, accuracy_cells(run))[0]
    assert set(main.data["length_tokens"]) == {256 * 1024}, "dense ran out of memory at 512K"
    assert main.text.iloc[0].str.startswith("n/m").tolist() == [False] * 5 + [True]
    assert "at 256K tokens" in main.caption
