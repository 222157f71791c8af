"""How an evaluation of an indexer is written: rows as CSV, rows and circumstances as JSON, a summary as Markdown."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kvscope.files import make_folder, whole_file

CSV_FILE, MARKDOWN_FILE, JSON_FILE = "recall.csv", "recall.md", "recall.json"


def write_tables(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    about: Mapping[str, Any],
    *,
    columns: Sequence[str],
    title: str,
    summary: Callable[..., str],
) -> None:
    """Write the tables of an evaluation into a folder, which is made.

    Args:
        rows: with the keys ``columns``.
        about: what was measured on what, by name.
        summary: takes rows and ``tablefmt``.

    Raises:
        UsageError: the folder cannot be made.
        EnvironmentProblem: the disk is full; a table is written whole or not at all.
    """
    make_folder(folder)
    with whole_file(folder / CSV_FILE) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    with whole_file(folder / JSON_FILE) as temporary:
        temporary.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    lines = [f"# {title}", "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    lines += [summary(rows, tablefmt="github"), ""]
    with whole_file(folder / MARKDOWN_FILE) as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
