"""Tables, figures and the page of a reproduction, made from its cells' rows alone."""

from pathlib import Path

from kvscope.files import whole_file
from kvscope.reports.build import REPORT_FOLDER
from kvscope.reports.claim_rows import cell_rows
from kvscope.reports.claims import claims_table
from kvscope.reports.claims_lsa import lsa_claims
from kvscope.reports.export import csv_text, write_figure, write_table
from kvscope.reports.figure_parts import ReportFigure
from kvscope.reports.figures_reproduction import reproduction_figures
from kvscope.reports.html import inline_svg, table_context, template
from kvscope.reports.place import put_in_place, report_place
from kvscope.reports.reproduction_page import page_markdown
from kvscope.reports.setup_dependence import setup_figures, setup_table
from kvscope.reports.subtitle import device_of
from kvscope.reports.summary import text_of
from kvscope.reports.table_1 import prompts_table, table_1
from kvscope.reports.table_parts import Table
from kvscope.results.reproduction import Loaded
from kvscope.terminal import folded

PAGE = "page.md"
"""Tables for a page of the documentation."""


def reproduction_text(loaded: Loaded, *, width: int | None = None) -> str:
    """Return the tables as plain text, with what is missing; lines of at most ``width`` columns, None for any."""
    parts = [f"{table.title}\n{text_of(table, width=width)}" for table in tables_of(loaded)]
    return folded("\n\n".join([heading(loaded), *parts, *warnings(loaded)]), width)


def write_reproduction(loaded: Loaded) -> list[Path]:
    """Write ``report/`` (tables, figures, ``report.html``), and beside it CSV files and ``page.md``; return the paths.

    Raises:
        UsageError: ``report`` is a link or a file.
        EnvironmentProblem: the folder cannot be written; the report before is kept.
    """
    kept = _write_kept(loaded)
    target = loaded.folder / REPORT_FOLDER
    with report_place(target) as aside:
        names = [path.relative_to(aside).as_posix() for path in _write(loaded, aside)]
        put_in_place(aside, target, names)
    return [*kept, *(target / name for name in names)]


def _write_kept(loaded: Loaded) -> list[Path]:
    """Write what is kept beside the rows: the tables as CSV, and the page's tables made of them."""
    texts = {f"{table.name}.csv": csv_text(table.data) for table in tables_of(loaded)}
    if loaded.plan.profile == "lsa":
        texts[PAGE] = page_markdown(loaded)
    paths = []
    for name, text in texts.items():
        paths.append(loaded.folder / name)
        with whole_file(paths[-1]) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return paths


def tables_of(loaded: Loaded) -> list[Table]:
    """Return the tables in the order they are read; the first is what the reproduction is for."""
    if loaded.plan.profile == "setup":
        return [setup_table(loaded), prompts_table(loaded)]
    claims = lsa_claims(loaded)
    return [claims_table(claims, loaded.plan), table_1(loaded), prompts_table(loaded)]


def figures_of(loaded: Loaded) -> list[ReportFigure]:
    """Return what can be drawn."""
    if loaded.plan.profile == "setup":
        return setup_figures(loaded)
    return reproduction_figures(loaded)


def heading(loaded: Loaded) -> str:
    """Return the model, the device and the profile in a line."""
    plan = loaded.plan
    run = next(iter(loaded.runs.values()), None)
    device = "" if run is None else f" on {device_of(run.info)}"
    return f"kvscope reproduce {plan.profile} --profile {plan.size}: {plan.model}{device}"


def warnings(loaded: Loaded) -> list[str]:
    """Return what is missing, left out or scaled, a sentence each."""
    plan, found = loaded.plan, []
    if plan.scaled and plan.profile == "lsa":
        found.append(plan.scale_sentence)
    for cell in plan.cells:
        run = loaded.runs.get(cell.name)
        if cell.left_out is not None:
            found.append(f"{cell.name} was left out: {cell.left_out}.")
        elif run is None:
            found.append(f"{cell.name} has not run yet.")
        elif cell.scored and (missing := cell_rows(loaded, cell, run).missing):
            found.append(f"Unfinished: {missing}.")
    return found


def _write(loaded: Loaded, folder: Path) -> list[Path]:
    tables_folder, figures_folder = folder / "tables", folder / "figures"
    tables_folder.mkdir()
    figures_folder.mkdir()
    tables, figures = tables_of(loaded), figures_of(loaded)
    written = [path for table in tables for path in write_table(table, tables_folder)]
    written += [path for figure in figures for path in write_figure(figure, figures_folder)]
    drawn = [
        {
            "name": figure.name,
            "caption": figure.caption,
            "svg": inline_svg(figure, (figures_folder / f"{figure.name}.svg").read_text(encoding="utf-8")),
        }
        for figure in figures
    ]
    run = next(iter(loaded.runs.values()), None)
    html = folder / "report.html"
    html.write_text(
        template("reproduction.html.j2").render(
            plan=loaded.plan,
            title=heading(loaded),
            device="nothing measured yet" if run is None else device_of(run.info),
            warnings=warnings(loaded),
            tables=[table_context(table) for table in tables],
            figures=drawn,
        ),
        encoding="utf-8",
    )
    return [*written, html]
