"""The page of a report: its policy, its contents, what points say, and samples that no text of a run turns to code."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic_rows import Rows, demo_rows, wide_rows
from test_report import stored

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.reports import browser, build, html
from kvscope.reports.browser import browsed, chosen_rows
from kvscope.reports.build import write_report
from kvscope.reports.hover import tip, with_titles
from kvscope.reports.html import inert_json
from kvscope.reports.look import make_look
from kvscope.reports.samples import marked, segments
from kvscope.results.frames import Run, load_run, make_run

EVIL = "</script><script>alert(1)</script><!-- & \u2028 <img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Elements of a page with their attributes, and the text of each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.raw: list[tuple[str, dict[str, str], str]] = []
        self._open: tuple[str, dict[str, str]] | None = None
        self._parts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.elements.append((tag, values))
        if tag in ("script", "style"):
            self._open, self._parts = (tag, values), []

    def handle_data(self, data: str) -> None:
        if self._open:
            self._parts.append(data)

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == self._open[0]:
            self.raw.append((*self._open, "".join(self._parts)))
            self._open = None

    @property
    def policy(self) -> dict[str, list[str]]:
        (content,) = [a["content"] for t, a in self.elements if a.get("http-equiv") == "Content-Security-Policy"]
        return {words[0]: words[1:] for words in (part.split() for part in content.split(";"))}

    @property
    def samples(self) -> dict[str, Any]:
        (text,) = [text for _, attrs, text in self.raw if attrs.get("id") == "samples-data"]
        return dict(json.loads(text))


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without figures: drawing is most of their time."""
    monkeypatch.setattr(build, "all_figures", lambda run, cells: [])


def run_of(rows: Rows) -> Run:
    return make_run(rows[0], rows[1], info=rows[2], folder=".")


def prompt_of(row: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    text = f"{EVIL} {'x' * 900} needle {row['sample']} {'y' * 900}"
    start = text.index("needle")
    return text, [(start, start + 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = demo_rows()
    samples = [row.model_copy(update={"output": EVIL}) if row.sample == 0 else row for row in rows[0]]
    made = stored(tmp_path_factory.mktemp("page"), (samples, rows[1], rows[2]))
    write_report(load_run(made), make_look(formats="svg"), prompt_of=prompt_of)
    return made / "report"


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def test_the_policy_allows_the_two_scripts_and_the_one_style_by_hash_and_nothing_else(page: Page) -> None:
    def hashes(tag: str) -> list[str]:
        texts = [text for name, attrs, text in page.raw if name == tag and attrs.get("type") != "application/json"]
        return [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts]

    assert page.policy["default-src"] == ["'none'"]
    assert page.policy["script-src"] == hashes("script")
    assert len(hashes("script")) == 2
    assert page.policy["style-src"] == hashes("style")
    assert set(page.policy) == {"default-src", "script-src", "style-src", "base-uri", "form-action"}
    for tag, attrs in page.elements:
        assert "style" not in attrs, f"the policy would refuse the style of a {tag}"
        assert not [name for name in attrs if name.startswith("on")]
        assert "src" not in attrs


def test_the_vendored_file_is_the_one_that_was_named() -> None:
    folder = Path(html.__file__).parent / "assets/datatables"
    script = (folder / "dataTables.min.js").read_text()
    assert script.startswith("/*! DataTables 3.1.5\n")
    assert "MIT" in (folder / "LICENSE.txt").read_text()
    assert "</script" not in script
    assert hashlib.sha256(script.encode()).hexdigest() in (folder / "README.md").read_text()


def test_contents_lead_to_every_part(page: Page) -> None:
    ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
    links = [attrs["href"][1:] for tag, attrs in page.elements if tag == "a" and attrs["href"].startswith("#")]
    assert set(links) <= ids
    parts = {"main", "figures", "figure-accuracy_minus_dense", "statistics", "footprint", "samples-title", "sources"}
    assert parts <= set(links)


def test_cells_are_sorted_by_their_numbers(page: Page) -> None:
    assert html._order("1,024 (15.6 %)") == 1024
    assert html._order("-0.6 [-0.8, -0.4]") == -0.6
    assert html._order("512K") == 512 * 1024
    assert html._order("n/m (a)") == ""
    assert html._order("niah_single_1") is None
    assert html._order("2026-11-30") is None
    ordered = [attrs["data-order"] for tag, attrs in page.elements if tag == "td" and "data-order" in attrs]
    assert len(ordered) > 50


def test_points_say_method_value_interval_and_n(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    said = re.findall(r'<g class="tip"[^>]*><title>([^<]*)</title>', text)
    assert any(re.fullmatch(r"random, 1K: \d+\.\d \[\d+\.\d, \d+\.\d\] %, n = 10", each) for each in said)
    assert any(re.search(r"points, n = 40 pairs", each) for each in said)
    assert any(each.endswith("measured while answering (ledger; no footprint cell)") for each in said)
    assert any(re.search(r"\d ms, 64 steps", each) for each in said)
    assert any("depth" in each for each in said)
    assert 'id="tip:' not in text
    svg = (folder / "figures/accuracy_by_length.svg").read_text()
    assert '<g class="tip"' in svg, "the file alone says it, too"


def test_what_a_point_says_is_text() -> None:
    assert with_titles(f'<g id="{tip("a")}" clip-path="url(#b)"><use/></g>') == (
        '<g class="tip" clip-path="url(#b)"><title>a</title><use/></g>'
    )
    assert len(tip("x" * 5000)) < 400
    assert "\n" not in tip("a\nb")


def test_answers_and_prompts_are_data_that_cannot_end_their_element(folder: Path, page: Page) -> None:
    text = (folder / "report.html").read_text()
    assert "alert(1)</script>" not in text
    assert "<img" not in text
    data = page.samples
    first = next(prompt for prompt in data["prompts"] if prompt["sample"] == 0)
    assert first["answers"][0][2].startswith("</script><script>alert(1)")
    assert first["text"][0][1].startswith("</script><script>alert(1)")
    assert "evidence" in {kind for kind, _ in first["text"]}
    assert ["evidence", "needle"] in first["text"]
    assert sum(part if kind == "gap" else len(part) for kind, part in first["text"]) == len(prompt_of(first)[0]) + 5
    assert [len(prompt["answers"]) for prompt in data["prompts"]] == [4] * 40
    assert data["labels"][data["baseline"]] == "dense"


def test_json_refuses_numbers_that_are_none_and_keeps_nulls() -> None:
    assert inert_json({"a": None}) == '{"a":null}'
    assert inert_json(["<&>"]) == '["\\u003c\\u0026\\u003e"]'
    for number in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            inert_json([number])


def test_rows_without_a_score_or_a_depth_are_null() -> None:
    samples, footprints, info = demo_rows()
    failed = {"status": "failed", "reason": "broke <b>", "score": None, "output": None, "answer_nll_reason": None}
    odd = [row.model_copy(update=failed | {"depth": None}) if row.sample == 1 else row for row in samples]
    found = browsed(make_run(odd, footprints, info=info, folder="."), None, why_no_texts="none")
    inert_json(list(found.pages))
    prompt = next(each for each in found.pages[0] if each["sample"] == 1)
    assert prompt["depth"] is None
    assert prompt["answers"][0] == [None, "failed", "broke <b>", 0]
    assert found.texts == "none"


def test_a_large_run_shows_prompts_that_tell_methods_apart_of_every_task_and_length(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = run_of(wide_rows(tasks=2))
    cells = run.samples.groupby(["task", "length_tokens"]).ngroups
    monkeypatch.setattr(browser, "MOST_ROWS", 9 * 3 * cells)
    rows, n_found = chosen_rows(run)
    assert n_found == len(run.samples) // 9
    assert set(rows.groupby(["task", "length_tokens", "sample"]).size()) == {9}, "all answers of a prompt"
    assert set(rows.groupby(["task", "length_tokens"])["sample"].nunique()) == {3}
    key = ["task", "length_tokens", "sample"]

    def n_differing(frame: pd.DataFrame) -> "pd.Series[Any]":
        score = frame["score"].astype(float).fillna(-1)
        return score.groupby([frame[name] for name in key]).nunique()

    shown, everything = n_differing(rows) > 1, n_differing(run.samples) > 1
    assert shown.mean() >= everything.mean()
    found = browsed(run, None)
    assert sum(map(len, found.pages)) == 3 * cells
    assert f"{3 * cells:,} of {n_found:,} prompts" in html._samples_context(found, 0)["said"]


@pytest.mark.usefixtures("no_figures")
def test_samples_that_one_page_does_not_hold_go_on_in_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    most_bytes = browser.MOST_PAGE_BYTES
    monkeypatch.setattr(browser, "MOST_PAGE_BYTES", 5_000)
    folder = stored(tmp_path, demo_rows())
    paths = write_report(load_run(folder))
    names = sorted(path.name for path in paths if path.suffix == ".html")
    assert len(names) > 2
    assert names == ["report.html", *(f"samples_{i}.html" for i in range(2, len(names) + 1))]
    pages = {name: Page((folder / "report" / name).read_text()) for name in names}
    assert sum(len(page.samples["prompts"]) for page in pages.values()) == 40
    for name, page in pages.items():
        links = {attrs["href"] for tag, attrs in page.elements if tag == "a" and attrs["href"].endswith(".html")}
        assert set(names) - {name} <= links
        assert page.policy["script-src"]
    monkeypatch.setattr(browser, "MOST_PAGE_BYTES", most_bytes)
    write_report(load_run(folder))
    assert sorted(path.name for path in (folder / "report").glob("*.html")) == ["report.html"], "old pages are removed"


def test_texts_are_built_within_a_budget_and_a_fault_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(demo_rows())
    monkeypatch.setattr(browser, "MOST_TEXT_TOKENS", 20_000)
    found = browsed(run, prompt_of)
    told = [prompt for prompt in found.pages[0] if "text" in prompt]
    assert 0 < sum(prompt["tokens"] for prompt in told) <= 20_000
    assert {prompt["length"] for prompt in told} >= {1024, 2048}
    assert {prompt["task"] for prompt in told} == {0, 1}, "not one task's before the other's"
    assert found.texts.startswith(f"Texts of {len(told)} prompts are built again")

    def other(row: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        raise UsageError("another prompt is built now.")

    assert browsed(run, other).texts == "Texts of prompts are not shown: another prompt is built now."


def test_a_page_stays_under_five_million_bytes(tmp_path: Path) -> None:
    folder = stored(tmp_path, wide_rows(tasks=2))
    write_report(load_run(folder), make_look(formats="svg"), prompt_of=prompt_of)
    for path in (folder / "report").glob("*.html"):
        assert path.stat().st_size < 5_000_000, path.name


def test_segments_of_a_prompt_are_whole_and_marked() -> None:
    text = "a" * 500 + "KEY" + "b" * 10 + "VALUE" + "c" * 500
    spans = [(500, 503), (513, 518)]
    parts = segments(text, spans)
    assert [part for kind, part in parts if kind == "evidence"] == ["KEY", "VALUE"]
    assert sum(part if isinstance(part, int) else len(part) for _, part in parts) == len(text)
    assert ">>>KEY<<<bbbbbbbbbb>>>VALUE<<<" in marked(text, spans)
    assert segments("", []) == []


@pytest.mark.usefixtures("no_figures")
def test_the_command_builds_texts_where_the_model_is_at_hand(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run_cli(["report", str(folder.parent), "--no-prompts"]) == 0
    text = (folder / "report.html").read_text()
    assert "Texts of prompts are left out: kvscope report --prompts builds them" in text
    run = load_run(folder.parent)
    away = Run(run.samples, run.footprint, run.info.model_copy(update={"model": "who/knows", "config": {}}), folder)
    assert cli.prompt_texts(away, asked=None)[1].startswith("Texts of prompts are left out, for the model's tokenizer")
    capsys.readouterr()
