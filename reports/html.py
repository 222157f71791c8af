"""One HTML page with everything inside: tables, figures as SVG, samples, where the numbers come from. No network.

Its scripts are DataTables and `assets/report.js`; the page's policy lets these two run, by their hashes, and nothing
else. Without scripts everything but the samples is there.
"""

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from kvscope.reports.browser import Samples
from kvscope.reports.coverage import Coverage
from kvscope.reports.figure_parts import ReportFigure, SkippedFigure
from kvscope.reports.look import look
from kvscope.reports.subtitle import device_of
from kvscope.reports.table_parts import Table
from kvscope.reports.units import length_text
from kvscope.results.frames import Run
from kvscope.results.run_schema import RunPart

_FIRST_NUMBER = re.compile(r"(?:< )?([+\-]?\d[\d,]*(?:\.\d+)?)([KM])?(?=$|[\s%(\[])")
#: On a narrow screen a figure scrolls: the least of its type has so many pixels.
_LEAST_PX, _LEAST_PT = 12.1, 6.5
_WIDTHS = """  #figure-{name} svg {{ width: min(100%, {wide_px:.0f}px); }}
  @media screen and (max-width: 700px) {{ #figure-{name} svg {{ width: {narrow_px:.0f}px; }} }}
"""
_NUMBER = re.compile(r"^[+\-]?[\d,.]+( |$|%)|^n/m |^< |^\d+ / \d+")


SAMPLES_PAGE = "samples_{}.html"


def page(
    run: Run,
    tables: list[Table],
    figures: list[ReportFigure | SkippedFigure],
    svgs: dict[str, str],
    state: Coverage,
    samples: Samples | None = None,
) -> str:
    """The whole page; `svgs` maps a figure's name to its SVG file's text."""
    shown = [figure for figure in figures if isinstance(figure, ReportFigure)]
    drawn = [
        {
            "name": figure.name,
            "title": figure.title,
            "caption": figure.caption,
            "svg": inline_svg(figure, svgs[figure.name]),
        }
        for figure in shown
    ]
    info = run.info
    widths = "".join(
        _WIDTHS.format(name=figure.name, wide_px=1.4 * units, narrow_px=_LEAST_PX / _LEAST_PT * units)
        for figure in shown
        for units in (72 * float(figure.figure.get_size_inches()[0]),)
    )
    return template("report.html.j2").render(
        **_shell(widths),
        info=info,
        device=device_of(info),
        state=state,
        warnings=[*state.sentences(), *run.messages],
        tables=[table_context(table) for table in tables],
        figures=drawn,
        endings=(*look().formats, "csv"),
        skipped=[figure for figure in figures if isinstance(figure, SkippedFigure)],
        environment=_lines(info.environment),
        config=json.dumps(info.config, indent=2, sort_keys=True),
        parts=[_part_context(part) for part in info.parts],
        resumptions=[(note.started_utc, note.commit, _lines(note.environment)) for note in info.resumptions],
        samples=None if samples is None or not samples.n_found else _samples_context(samples, 0),
    )


def samples_page(run: Run, samples: Samples, number: int) -> str:
    """A page of samples beside the report; `number` counts from 1, the second of all."""
    return template("samples.html.j2").render(**_shell(""), info=run.info, samples=_samples_context(samples, number))


def _samples_context(samples: Samples, number: int) -> dict[str, Any]:
    n_shown = sum(map(len, samples.pages))
    said = f"Prompts: {n_shown:,}."
    if n_shown < samples.n_found:
        said = (
            f"{n_shown:,} of {samples.n_found:,} prompts, of every task and length as many: first those that a method "
            "answers otherwise than dense, then those that one fails. kvscope samples shows any."
        )
    names = ["report.html", *(SAMPLES_PAGE.format(place + 1) for place in range(1, len(samples.pages)))]
    links = [(None if place == number else name, str(place + 1)) for place, name in enumerate(names)]
    return {
        "said": said,
        "texts": samples.texts,
        "links": links if len(links) > 1 else [],
        "columns": ", ".join(samples.head["labels"]),
        "json": inert_json({**samples.head, "prompts": samples.pages[number]}),
    }


def inert_json(value: object) -> Markup:
    """JSON that ends no element and begins no comment, whatever its texts are; numbers that JSON lacks are refused."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    # Of what HTML knows, `<` alone matters within a script element.
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))  # nosec


def _shell(more_style: str) -> dict[str, Any]:
    """What a page of any kind needs: style, scripts, and the policy that allows these alone."""
    style = f"\n{_asset('report.css')}{more_style}"
    scripts = [_asset("datatables/dataTables.min.js"), _asset("report.js")]
    allowed = " ".join(_hash(text) for text in scripts)
    policy = f"default-src 'none'; script-src {allowed}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    # Files of the package, not of a run.
    return {"style": Markup(style), "scripts": [Markup(text) for text in scripts], "policy": Markup(policy)}  # nosec


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _asset(name: str) -> str:
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")


def inline_svg(figure: ReportFigure, text: str) -> Markup:
    """The `<svg>` element alone, with ids that no other figure of the page has, and a label for screen readers.

    Styles become attributes: the page's policy allows its own style sheet alone.
    """
    body = text[text.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{figure.name}-', body)
    body = re.sub(r'(xlink:href="|href="|url\()#', rf"\g<1>#{figure.name}-", body)
    body = re.sub(r'style="([^"]*)"', _as_attributes, body)
    body = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", body, count=1)
    label = escape(f"{figure.title}. {figure.caption}")
    # matplotlib wrote the figure, and escaped what its texts hold.
    return Markup(body.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))  # nosec


def _as_attributes(found: re.Match[str]) -> str:
    pairs = (item.partition(":") for item in found[1].split(";") if item.strip())
    # The style sheet has the family: a machine without DejaVu Sans takes the next of nearly its widths.
    return " ".join(f'{name.strip()}="{value.strip()}"' for name, _, value in pairs if name.strip() != "font-family")


def table_context(table: Table) -> dict[str, Any]:
    """What the templates need of a table: columns and rows with the kind of each column."""
    columns = list(table.text.columns)
    kinds = [_kind([str(cell) for cell in table.text[column]]) for column in columns]
    rows = [[str(cell) for cell in row] for row in table.text.itertuples(index=False)]
    numeric = [all(_order(row[place]) is not None for row in rows) for place in range(len(columns))]
    return {
        "name": table.name,
        "title": table.title,
        "caption": table.caption,
        "notes": table.notes,
        "columns": list(zip(columns, kinds, strict=True)),
        "rows": [
            [(cell, kind, _order(cell) if by else None) for cell, kind, by in zip(row, kinds, numeric, strict=True)]
            for row in rows
        ],
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


def _order(cell: str) -> float | str | None:
    """What a cell is sorted by where its column has numbers: the first of it, a length in tokens; None for a text."""
    if cell.startswith("n/m "):
        return ""
    found = _FIRST_NUMBER.match(cell)
    if found is None:
        return None
    return float(found[1].replace(",", "")) * {"K": 1024, "M": 1024**2}.get(found[2], 1)


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
