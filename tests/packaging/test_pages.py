"""The pages hold to the code: commands, options, paths, links and lengths."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer
import yaml

import kvscope
from kvscope import cli
from kvscope.methods.registry import METHODS
from kvscope.results.comparisons import compare_methods
from kvscope.results.frames import load_run
from kvscope.results.share import prompt_shares
from kvscope.results.statistics import Interval
from kvscope.tasks.registry import TASKS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = [ROOT / "benchmarks" / "README.md", *sorted(ROOT.glob("harness/reference_model/*/README.md")),
         *sorted(ROOT.glob("methods/**/README.md"))]  # fmt: skip
#: Its methods and tasks are the reader's own.
OWN_NAMES = ROOT / "docs" / "add-a-method.md"
#: Pages for newcomers: their tables fit a narrow window. The studies and the log are for readers of detail.
NEWCOMERS = ("architecture", "equal-bytes", "index", "measurement", "results", "speed", "use")
NARROW = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs" / f"{name}.md" for name in NEWCOMERS)]
README_WORDS, TABLE_CHARACTERS = 1300, 100
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
INLINE_COMMAND = re.compile(r"`(kvscope [^`]+)`")
#: What stands for a value of the reader's, and shorthand in prose.
SHORTHAND = {"...", "|"}
#: Repository paths as they stand in code spans and commands.
PLACE = re.compile(r"^(?:benchmarks|docs|examples|harness|methods|reports|results|src|tasks|tests)/[\w./-]*\w/?$")


def ids(pages: list[Path]) -> list[str]:
    return [page.relative_to(ROOT).as_posix() for page in pages]


def block_lines(text: str) -> Iterator[str]:
    """Lines of fenced and indented code, with continued lines joined."""
    fenced = [line for block in FENCE.findall(text) for line in block.splitlines()[1:-1]]
    indented = [line.strip() for line in FENCE.sub("", text).splitlines() if re.match(r" {4,}\S", line)]
    joined = "\n".join([*fenced, *indented]).replace("\\\n", " ")
    yield from joined.splitlines()


def commands(text: str) -> list[list[str]]:
    """Every `kvscope ...` of code blocks and code spans, as words."""
    spans = INLINE_COMMAND.findall(FENCE.sub("", text).replace("\n", " "))
    lines = [line.removeprefix("$ ") for line in block_lines(text) if line.removeprefix("$ ").startswith("kvscope ")]
    return [shlex.split(line, comments=True)[1:] for line in [*lines, *spans]]


def faults(words: list[str]) -> list[str]:
    """What a command line names that the command does not have; nothing is run."""
    found: list[str] = []
    command: Any = typer.main.get_command(cli.app)
    rest = list(words)
    while hasattr(command, "commands"):
        if not rest or rest[0] in SHORTHAND or rest[0].startswith("-"):
            break
        # `kvscope lsa train|eval`, and a bare `kvscope lsa`, name a group and its commands.
        names = rest.pop(0).split("|")
        missing = [name for name in names if name not in command.commands]
        if missing:
            return [f"no command {' '.join(missing)!r}"]
        command = command.commands[names[0]]
    known = {
        option: parameter for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    if words[:1] == ["lm-eval"]:
        known = {**lm_eval_options(), **known}  # the rest is lm-eval's
    while rest:
        word = rest.pop(0)
        if word in SHORTHAND or word.startswith("..."):
            continue
        if word.startswith("-"):
            name, _, value = word.partition("=")
            if name not in known:
                found.append(f"no option {name}")
            elif not getattr(known[name], "is_flag", False):
                value = value or (rest.pop(0) if rest else "")
                found += value_faults(name, value)
        elif word.endswith((".yaml", ".yml")) and not (ROOT / word).is_file():
            found.append(f"no file {word}")
        elif PLACE.match(word) and not (ROOT / word).exists():
            found.append(f"no path {word}")
    return found


def lm_eval_options() -> dict[str, Any]:
    from lm_eval._cli import HarnessCLI

    run = HarnessCLI()._subparsers.choices["run"]
    return {option: action for action in run._actions for option in action.option_strings}


def value_faults(option: str, value: str) -> list[str]:
    """What is unknown about an option's value: a method, a task, or a method that is swept."""
    name = re.split(r"[:.]" if option == "--sweep" else ":", value)[0]
    if "." in name:  # package.module:Class, from outside the tree
        return []
    if option in ("-m", "--method", "--sweep") and name not in METHODS and not name.isupper():
        return [f"no method {name!r}"]
    if option in ("-t", "--task") and name not in TASKS and not name.isupper():
        return [f"no task {name!r}"]
    return []


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=ids([*PAGES, *CARDS]))
def test_every_command_on_a_page_exists(page: Path) -> None:
    found = {" ".join(words): faults(words) for words in commands(page.read_text(encoding="utf-8"))}
    if page == OWN_NAMES:
        found = {line: [fault for fault in wrong if "no method" not in fault and "no task" not in fault]
                 for line, wrong in found.items()}  # fmt: skip
    assert {line: wrong for line, wrong in found.items() if wrong} == {}


def test_a_wrong_command_is_found() -> None:
    text = "    kvscope run --modle x \\\n        -m nope\n\n`kvscope studdy ranks`\n\n```\nkvscope list methods\n```\n"
    listed, run, study = commands(text)
    assert faults(run) == ["no option --modle", "no method 'nope'"]
    assert faults(study) == ["no command 'studdy'"]
    assert faults(listed) == faults(["run", "-m", "dense:a=1", "--sweep", "lsa.tau=1,2", "--no-report"]) == []
    assert faults(["run", "examples/none.yaml"]) == ["no file examples/none.yaml"]
    assert faults(["report", "results/reference/none"]) == ["no path results/reference/none"]


def test_readme_has_commands_to_check() -> None:
    assert len(commands((ROOT / "README.md").read_text(encoding="utf-8"))) >= 5


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as Markdown viewers make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        place, _, anchor = unquote(target).partition("#")
        path = page.parent / place if place else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", [*PAGES, *CARDS], ids=ids([*PAGES, *CARDS]))
def test_relative_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title, here\n[a](#a-title-here) [b](#none) [c](none.md) [d](page.md#none) [e](https://example.org)\n"
    )
    assert broken_links(page) == ["#none", "none.md", "page.md#none"]


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_paths_in_code_spans_exist(page: Path) -> None:
    if page.name in ("CHANGELOG.md", "log.md"):
        pytest.skip("history names what was there then")
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8")))
    missing = [span for span in spans if PLACE.match(span) and "NAME" not in span and not (ROOT / span).exists()]
    assert missing == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


def wide_lines(text: str) -> list[str]:
    return [line for line in FENCE.sub("", text).splitlines() if line.startswith("|") and len(line) > TABLE_CHARACTERS]


@pytest.mark.parametrize("page", NARROW, ids=ids(NARROW))
def test_tables_fit_a_narrow_window(page: Path) -> None:
    assert wide_lines(page.read_text(encoding="utf-8")) == []
    assert wide_lines(f"|{'-' * TABLE_CHARACTERS}|") != []


MEASURED = [
    *(ROOT / "docs" / f"{name}.md" for name in ("equal-bytes", "results", "speed")),
    ROOT / "benchmarks" / "README.md",
]


@pytest.mark.parametrize("page", MEASURED, ids=ids(MEASURED))
def test_no_table_mixes_cards(page: Path) -> None:
    tables = re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(tables) > 3
    assert [table for table in tables if "H100" in table and "H200" in table] == []


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == kvscope.__version__
    assert f'\nversion = "{kvscope.__version__}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"\n## {kvscope.__version__} - " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def share_percent(cell: str) -> dict[int, tuple[float, int]]:
    """lsa's share by length as docs/results.md defines it, in %, with the number of prompts."""
    rows = load_run(ROOT / "results" / "reference" / "h100" / cell).samples
    rows = rows[rows.method == "lsa"]
    assert set(rows.step_backend) == {"eager"}
    share = 100 * prompt_shares(rows)
    by_length = share.groupby(rows.length_tokens)
    return {int(length): (float(value.mean()), len(value)) for length, value in by_length}  # type: ignore[call-overload]


def test_lsas_share_has_one_value_on_all_pages() -> None:
    shares = {**share_percent("lsa"), **share_percent("lsa-long")}
    texts = {length: f"{value:.1f} %" for length, (value, _) in shares.items()}
    assert texts == {16_384: "13.6 %", 32_768: "12.8 %", 65_536: "11.0 %", 131_072: "7.9 %"}
    for name in ("docs/results.md", "docs/lsa-study.md"):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        for length, text in texts.items():
            row = f"| {length // 1024}K"
            found = [line for line in lines if line.startswith(row) and f"| {shares[length][1]:,} |" in line]
            assert found, (name, length)
            assert all(line.rstrip("| ").endswith(text) for line in found), (name, length)


def test_todays_indexer_is_on_the_page_as_its_rows_have_it() -> None:
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    for cell, lengths in (("lsa", (16_384, 32_768)), ("lsa-256k", (262_144,)), ("lsa-512k", (524_288,))):
        run = load_run(ROOT / "results" / "reference" / "h200" / cell)
        samples = run.samples[run.samples.method.isin(["dense", "lsa"])]
        paired = {each.scope: each.paired.difference for each in compare_methods(samples, info=run.info)}
        for length in lengths:
            rows = samples[samples.length_tokens == length]
            (line,) = [each for each in page if each.startswith(f"| H200, {length // 1024}K")]
            accuracy = 100 * rows.groupby("method").score.mean()
            share = 100 * prompt_shares(rows[rows.method == "lsa"]).mean()
            shown = [f"{accuracy[name]:.1f} %" for name in ("dense", "lsa")]
            found = paired.get(f"{length} tokens", paired["all prompts"])  # a run of one length is pooled alone
            shown += [in_points(found, decimals=1), f"{share:.1f} % |"]
            assert [part for part in shown if part not in line] == [], line
        if cell == "lsa":
            test = in_points(paired["all prompts"], decimals=2)
            share = 100 * prompt_shares(samples[samples.method == "lsa"]).mean()
            readme = (ROOT / "README.md").read_text(encoding="utf-8")
            assert f"holds {share:.1f} % of dense's bytes" in readme
            accuracy = 100 * samples.groupby("method").score.mean()
            assert f"| `dense` | 100 % | {accuracy['dense']:.1f} % | |" in readme
            assert f"| `lsa` | {share:.1f} % | {accuracy['lsa']:.1f} % | {test} |" in readme
            for name in ("README.md", "docs/results.md", "docs/lsa-study.md", "methods/lsa/indexers/README.md"):
                assert test in (ROOT / name).read_text(encoding="utf-8"), (name, test)


def in_points(found: Interval, *, decimals: int) -> str:
    assert found.low is not None
    assert found.high is not None
    mean, low, high = (f"{100 * each:+.{decimals}f}" for each in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"
