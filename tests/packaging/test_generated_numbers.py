"""Tables of the pages that are declared generated: the file they come from, word for word, and its numbers in a CSV.

A page declares one by `<!-- generated: PATH -->` before it and `<!-- end of generated -->` behind it. PATH is a
committed `page.md` of a reproduction, and every number in it stands in a CSV file beside it, rounded as it is shown.
"""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^<!-- generated: (\S+) -->\n(.*?)^<!-- end of generated -->", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?![\w.])")


def differing(page: str, root: Path) -> list[str]:
    """Generated blocks of a page that are not what their file says."""
    return [path for path, text in BLOCK.findall(page) if text.strip() != (root / path).read_text().strip()]


def not_in_csv(page_file: Path) -> list[str]:
    """Numbers of measured columns in a `page.md` that no CSV file beside it has, as a value or as a fraction."""
    values: set[str] = set()
    for path in page_file.parent.glob("*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.reader(file):
                values |= {text for cell in row for text in shown(cell)}
    found = []
    for line in page_file.read_text(encoding="utf-8").splitlines():
        for cell in line.strip("| ").split("|")[1:]:
            found += [text for text in NUMBER.findall(cell) if text.replace(",", "").lstrip("+") not in values]
    return found


def shown(cell: str) -> set[str]:
    """A value as pages may show it."""
    try:
        value = float(cell)
    except ValueError:
        return set()
    return {f"{round(factor * value, digits) + 0.0:.{digits}f}" for factor in (1, 100) for digits in (0, 1, 2)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_tables_are_their_files(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert differing(text, ROOT) == []
    begun, ended = (re.findall(rf"^<!-- {words}", text, re.MULTILINE) for words in ("generated:", "end of generated"))
    assert len(begun) == len(ended) == len(BLOCK.findall(text))


def test_numbers_of_committed_reproductions_are_in_their_csv_files() -> None:
    pages = sorted((ROOT / "results").glob("reference/*/*/page.md"))
    assert {str(page): not_in_csv(page) for page in pages} == {str(page): [] for page in pages}


def test_what_is_not_generated_is_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("| claim | ours | n |\n|---|---|---|\n| 13.5 % | +0.6 [-0.4, 12.3] | 1,200 |\n")
    (tmp_path / "claims.csv").write_text("claim,ours,low,high,n\nx,0.61,-0.4,0.1234,1200\n")
    assert not_in_csv(tmp_path / "page.md") == [], "12.3 is 0.1234 in percent"
    (tmp_path / "claims.csv").write_text("claim,ours,low,high,n\nx,0.66,-0.4,0.1244,1201\n")
    assert not_in_csv(tmp_path / "page.md") == ["+0.6", "12.3", "1,200"]
    page = f"text\n<!-- generated: page.md -->\n{(tmp_path / 'page.md').read_text()}<!-- end of generated -->\n"
    assert differing(page, tmp_path) == []
    assert differing(page.replace("12.3", "12.4"), tmp_path) == ["page.md"]
