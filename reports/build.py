"""Puts the report together: built aside, then moved into place, so that a reader never sees half of one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd

from kvscope.reports.aside import aside
from kvscope.reports.browser import PromptOf, Samples, browsed
from kvscope.reports.cells import accuracy_cells
from kvscope.reports.coverage import coverage
from kvscope.reports.export import draw_figure, svg_text, write_includes, write_table, write_texts
from kvscope.reports.figure_parts import ReportFigure, SkippedFigure
from kvscope.reports.figures_accuracy import accuracy_by_length, accuracy_by_task
from kvscope.reports.figures_depth import depth_by_task, needle_heatmap
from kvscope.reports.figures_difference import accuracy_minus_dense
from kvscope.reports.figures_memory import memory_by_length, tpot_by_length
from kvscope.reports.figures_pareto import accuracy_against_memory, accuracy_against_reads
from kvscope.reports.figures_residency import resident_over_steps
from kvscope.reports.figures_shares import equal_bytes_figures
from kvscope.reports.html import SAMPLES_PAGE, page, samples_page
from kvscope.reports.legible import legible
from kvscope.reports.look import Look, fitted, look, wearing
from kvscope.reports.place import put_in_place, report_place
from kvscope.reports.shown import shown_run, shown_table
from kvscope.reports.tables import all_tables
from kvscope.results.frames import Run, load_run

REPORT_FOLDER = "report"
MOST_DRAWN = 64
"""Methods, tasks or lengths in figures."""


def build_report(folder: str | Path) -> list[Path]:
    """See `kvscope.reports.make_report`."""
    return write_report(load_run(folder))


def write_report(
    run: Run,
    chosen: Look | None = None,
    *,
    prompt_of: PromptOf | None = None,
    why_no_texts: str = "",
    asked: bool = False,
) -> list[Path]:
    """Write the report of a loaded run into its folder; see `kvscope.reports.make_report`.

    Args:
        chosen: how it is published (``make_look``); None: as it is looked at on a screen.
        prompt_of: gives the text of a prompt and where its evidence stands; None: the page shows no texts.
        why_no_texts: what it says then.
        asked: whether texts were asked for, so that more are built.

    Raises:
        UsageError: as there, or the look names methods that the run does not have.
    """
    run = legible(run)
    target = run.folder / REPORT_FOLDER
    worn = worn_by(run, chosen)
    with report_place(target) as aside, wearing(worn):
        names = [
            path.relative_to(aside).as_posix()
            for path in _write(
                run, aside, partial(browsed, prompt_of=prompt_of, why_no_texts=why_no_texts, asked=asked)
            )
        ]
        put_in_place(aside, target, names)
    return [target / name for name in names]


def worn_by(run: Run, chosen: Look | None) -> Look:
    """Return the look of a run's report; see `kvscope.reports.look.fitted`.

    Raises:
        UsageError: it names methods that the run does not have.
    """
    labels = [method.label for method in run.info.methods]
    return Look() if chosen is None else fitted(chosen, labels, where=str(run.folder))


def all_figures(run: Run, cells: pd.DataFrame) -> list[ReportFigure | SkippedFigure]:
    """The report's figures, in the order they are read; one that cannot be drawn says why.

    `cells` comes from `accuracy_cells(run)`.
    """
    counts = {
        "methods": len(run.info.methods),
        "tasks": len(run.info.tasks),
        "lengths": len({*run.info.lengths_tokens, *run.footprint["length_tokens"]}),
    }
    for what, count in counts.items():
        if count > MOST_DRAWN:
            reason = f"{count} {what} cannot be told apart in a picture (at most {MOST_DRAWN}); the tables hold them"
            return [SkippedFigure("figures", "Figures", reason)]
    return [
        accuracy_against_memory(run, cells),
        accuracy_against_reads(run, cells),
        *equal_bytes_figures(run, cells),
        accuracy_by_length(run, cells),
        accuracy_minus_dense(run),
        accuracy_by_task(run, cells),
        needle_heatmap(run),
        depth_by_task(run),
        memory_by_length(run),
        tpot_by_length(run),
        *resident_over_steps(run),
    ]


def _write(run: Run, folder: Path, browse: Callable[[Run], Samples]) -> list[Path]:
    tables_folder, figures_folder = folder / "tables", folder / "figures"
    tables_folder.mkdir()
    figures_folder.mkdir()
    cells = accuracy_cells(run)
    part = shown_run(run)
    labels = [method.label for method in part.info.methods]
    figures = all_figures(part, cells[cells["method_label"].isin(labels)])
    drawn = [figure for figure in figures if isinstance(figure, ReportFigure)]
    with aside([partial(draw_figure, figure, figures_folder) for figure in drawn]):
        tables = [shown_table(table) for table in all_tables(run, cells)]
        written = [path for table in tables for path in write_table(table, tables_folder)]
        written += [path for figure in drawn for path in write_texts(figure, figures_folder)]
        files = {path.name: path for path in written}
        svgs = {
            figure.name: file.read_text(encoding="utf-8")
            if (file := files.get(f"{figure.name}.svg"))
            else svg_text(figure)
            for figure in drawn
        }
        if "pdf" in look().formats:
            written.append(write_includes(drawn, figures_folder))
        samples = browse(part)
        pages = {"report.html": page(run, tables, figures, svgs, coverage(run), samples)}
        for number in range(1, len(samples.pages)):
            pages[SAMPLES_PAGE.format(number + 1)] = samples_page(run, samples, number)
        for name, text in pages.items():
            (folder / name).write_text(text, encoding="utf-8")
    return [*written, *(folder / name for name in pages)]
