"""One HTML page with everything inside: tables, figures as SVG, where the numbers come from. No script, no network."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from kvscope.reports.coverage import Coverage
from kvscope.reports.figure_parts import ReportFigure, SkippedFigure, device_of
from kvscope.reports.table_parts import Table
from kvscope.reports.units import length_text
from kvscope.results.frames import Run
from kvscope.results.run_schema import RunPart

_NUMBER = re.compile(r"^[+\-]?[\d,.]+( |$|%)|^n/m |^< |^\d+ / \d+")


def page(
    run: Run,
    tables: list[Table],
    figures: list[ReportFigure | SkippedFigure],
    svgs: dict[str, str],
    state: Coverage,
) -> str:
    """The whole page; `svgs` maps a figure's name to its SVG file's text."""
    drawn = [
        {
            "name": figure.name,
            "title": figure.title,
            "caption": figure.caption,
            "svg": inline_svg(figure, svgs[figure.name]),
        }
        for figure in figures
        if isinstance(figure, ReportFigure)
    ]
    info = run.info
    return template("report.html.j2").render(
        info=info,
        device=device_of(info),
        state=state,
        warnings=[*state.sentences(), *run.messages],
        tables=[table_context(table) for table in tables],
        figures=drawn,
        skipped=[figure for figure in figures if isinstance(figure, SkippedFigure)],
        environment=_lines(info.environment),
        config=json.dumps(info.config, indent=2, sort_keys=True),
        parts=[_part_context(part) for part in info.parts],
        resumptions=[(note.started_utc, note.commit, _lines(note.environment)) for note in info.resumptions],
    )


def inline_svg(figure: ReportFigure, text: str) -> Markup:
    """The `<svg>` element alone, with ids that no other figure of the page has, and a label for screen readers."""
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{figure.name}-', body)
    body = re.sub(r'(xlink:href="|href="|url\()#', rf"\g<1>#{figure.name}-", body)
    label = escape(f"{figure.title}. {figure.caption}")
    # matplotlib wrote the figure, and escaped what its texts hold.
    return Markup(body.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))  # nosec


def table_context(table: Table) -> dict[str, Any]:
    """What the templates need of a table: columns and rows with the kind of each column."""
    columns = list(table.text.columns)
    kinds = [_kind([str(cell) for cell in table.text[column]]) for column in columns]
    rows = [[str(cell) for cell in row] for row in table.text.itertuples(index=False)]
    return {
        "name": table.name,
        "title": table.title,
        "caption": table.caption,
        "notes": table.notes,
        "columns": list(zip(columns, kinds, strict=True)),
        "rows": [list(zip(row, kinds, strict=True)) for row in rows],
    }


def _part_context(part: RunPart) -> dict[str, Any]:
    counts = [f"{cell.samples} of {cell.task} at {length_text(cell.length_tokens)}: {cell.reason}" for cell in part.cut]
    return {
        "what": f"{', '.join(part.tasks)} at {', '.join(map(length_text, part.lengths_tokens))}",
        "n": part.samples,
        "notes": [*([part.fewer] if part.fewer else []), *counts],
        "commit": part.commit,
        "lines": [
            ("started", part.started_utc or "not known"),
            ("seeds", ", ".join(map(str, part.seeds)) or "not known"),
            ("command", part.command or "not known"),
            *_lines(part.environment),
        ],
        "resumptions": [(note.started_utc, note.commit, _lines(note.environment)) for note in part.resumptions],
    }


def _kind(cells: list[str]) -> str:
    """CSS class of a column: `num` is set to the right, `long` gets room for sentences."""
    if cells and all(_NUMBER.match(cell) for cell in cells):
        return "num"
    return "long" if max((len(cell) for cell in cells), default=0) > 26 else "text"


def _lines(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Nested values as `a.b`, `value` pairs; a null says so."""
    lines: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += [(f"{key}.{inner}", text) for inner, text in _lines(value)]
        else:
            lines.append((key, "not known" if value is None else str(value)))
    return lines


@cache
def template(name: str) -> Template:
    """Return a page's template; whatever it is given is text, never markup."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    settings = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return settings.get_template(name)
