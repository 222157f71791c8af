"""A report of a run folder whose every name and text is meant to break it."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic_rows import single_rows

from kvscope.errors import UsageError
from kvscope.reports import make_report
from kvscope.reports.export import latex, markdown
from kvscope.reports.legible import legible
from kvscope.reports.summary import summary_text
from kvscope.reports.table_parts import Notes, Table
from kvscope.results.frames import load_run, make_run

ODD = "a$b$_{x}%&#~^`c`|<b>*d*[e](f)\\g\x1b[31m\x9b\u202eh\ni/../../j"
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, dict):
        return {key: renamed(inner, names) for key, inner in value.items()}
    return [renamed(inner, names) for inner in value] if isinstance(value, list | tuple) else value


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    samples, footprints, info = single_rows()
    names = {name: f"{name}{ODD}" for name in ("dense", "niah_single_1", "reference", "every token", "cpu")}
    failed = samples[-1].model_copy(
        update={"status": "failed", "reason": ODD, "score": None, "output": None, "answer_nll_reason": None}
    )
    for name, kind, rows in (
        ("samples.jsonl", type(samples[0]), [*samples[:-1], failed]),
        ("footprint.jsonl", type(footprints[0]), footprints),
    ):
        made = [kind.model_validate(renamed(row.model_dump(), names) | {"prefill": row.prefill}) for row in rows]
        (folder / name).write_text("".join(row.model_dump_json() + "\n" for row in made))
    told = renamed(info.model_dump(), names) | {"environment": {"gpu": ODD, ODD: [ODD]}, "commit": ODD}
    (folder / "run.json").write_text(type(info).model_validate(told).model_dump_json())
    make_report(folder)
    return folder / "report"


def test_no_control_character_reaches_any_file(hostile: Path) -> None:
    read = [path for path in hostile.rglob("*") if path.suffix in (".csv", ".md", ".tex", ".html", ".svg")]
    assert len(read) > 20
    for path in read:
        assert not CONTROLS.search(path.read_bytes().decode()), path.name
    assert not CONTROLS.search(summary_text(load_run(hostile.parent)))


def test_names_are_no_part_of_a_path(hostile: Path) -> None:
    for path in hostile.rglob("*"):
        assert re.fullmatch(r"\.manifest\.json|[a-z0-9_]+(\.[a-z0-9]+)?", path.name)


def test_names_are_text_in_the_page_and_no_script_can_run(hostile: Path) -> None:
    text = (hostile / "report.html").read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;*d*" in text
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy[1]
    written = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)  # of the package itself
    assert not re.search(r"<script(?! type=.application/json)|javascript:|\bon\w+=", written)
    assert text.index("Content-Security-Policy") < text.index("<style>")


def test_tables_keep_their_shape(hostile: Path) -> None:
    for path in hostile.glob("tables/*.md"):
        grid = [line for line in path.read_text().splitlines() if line.startswith("|")]
        assert len(Counter(len(re.findall(r"(?<!\\)\|", line)) for line in grid)) == 1, path.name
    for path in hostile.glob("tables/*.tex"):
        for block in path.read_text().split(r"\begin{table}"):
            rows = [line for line in block.splitlines() if line.endswith(r" \\")]
            assert len(Counter(len(re.findall(r"(?<!\\)&", row)) for row in rows)) <= 1, path.name


def test_escapes_of_markdown_and_latex() -> None:
    cells = ["__x__ snake_case", "a*b`c<d>|e~f$g&amp;h & [i](j)", "[k", "l\n\nm\\"]
    table = Table("odd", "# x", "c", pd.DataFrame(), pd.DataFrame({"h|": cells}))
    text = markdown(table)
    for part in (r"\_\_x\_\_ snake_case", r"a\*b\`c\<d\>\|e\~f\$g\&amp;h & [i\](j)", "l m\\\\", r"## \# x", r"h\|"):
        assert part in text
    text = latex(table)
    parts = [r"\_\_x\_\allowbreak{}\_", r"snake\_\allowbreak{}case", r"\textasciigrave{}c"]
    for part in [*parts, r"{[}k \\", r"l m\textbackslash{} \\", r"\& [i](j)"]:
        assert part in text


def test_labels_at_the_limit_stay_cheap(tmp_path: Path) -> None:
    samples, footprints, info = single_rows()
    label = "dense:" + "x" * 994
    run = make_run(
        [row.model_copy(update={"method_label": label}) for row in samples],
        [row.model_copy(update={"method_label": label}) for row in footprints],
        info=info.model_copy(
            update={"methods": (info.methods[0].model_copy(update={"label": label}),), "plan": (), "model": "m" * 1000}
        ),
        folder=tmp_path,
    )
    from kvscope.reports.build import all_figures
    from kvscope.reports.cells import accuracy_cells
    from kvscope.reports.figure_parts import ReportFigure

    figures = [figure for figure in all_figures(run, accuracy_cells(run)) if isinstance(figure, ReportFigure)]
    assert len(figures) > 4
    for figure in figures:
        assert max(figure.figure.get_size_inches()) < 25


def test_more_methods_than_a_picture_holds_are_in_the_tables_alone() -> None:
    from kvscope.reports.build import all_figures
    from kvscope.reports.cells import accuracy_cells

    samples, footprints, info = single_rows()
    methods = tuple(info.methods[0].model_copy(update={"label": f"dense:{i}"}) for i in range(65))
    run = make_run([], [], info=info.model_copy(update={"methods": methods}), folder=".")
    (skipped,) = all_figures(run, accuracy_cells(run))
    assert "65 methods cannot be told apart" in skipped.reason  # type: ignore[union-attr]
    assert samples
    assert footprints


def test_two_labels_that_look_the_same_are_refused() -> None:
    _, _, info = single_rows()
    methods = tuple(info.methods[0].model_copy(update={"label": label}) for label in ("a\x07", r"a\x07"))
    with pytest.raises(UsageError, match="share the label"):
        legible(make_run([], [], info=info.model_copy(update={"methods": methods, "plan": ()}), folder="."))


def test_letters_of_notes_never_repeat() -> None:
    notes = Notes()
    marks = [notes.mark(str(i)) for i in range(800)]
    assert len(set(marks)) == 800
    assert (marks[0], marks[25], marks[26], marks[702]) == ("n/m (a)", "n/m (z)", "n/m (aa)", "n/m (aaa)")


LIMITED = """
import resource, sys
from kvscope.errors import EnvironmentProblem
from kvscope.reports import make_report
sys.dont_write_bytecode = True  # or a part of it is left, see full_disk
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    make_report(sys.argv[1])
except EnvironmentProblem as problem:
    print(problem)
    sys.exit(problem.exit_code)
"""


def test_a_file_size_limit_leaves_the_report_before(hostile: Path) -> None:
    before = {path: path.read_bytes() for path in hostile.rglob("*") if path.is_file()}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(hostile.parent)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert "File too large" in done.stdout
    assert done.stderr == ""
    assert {path: path.read_bytes() for path in hostile.rglob("*") if path.is_file()} == before
