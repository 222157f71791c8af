"""The report's tables.

Tidy data (CSV, Parquet) has one row a cell, full precision, and a reason beside every null. The text form (Markdown,
LaTeX, HTML, terminal) is rounded, has units in its headers, and never an unexplained blank: `n/m (a)` points to a note.
"""

import pandas as pd

from kvscope.reports.depth import depth_table
from kvscope.reports.table_parts import Table
from kvscope.reports.tables_accuracy import accuracy_table, statistics_table
from kvscope.reports.tables_limits import limit_tables
from kvscope.reports.tables_main import main_table
from kvscope.reports.tables_memory import footprint_table, stays_table
from kvscope.reports.tables_shares import share_tables
from kvscope.reports.tables_types import type_tables
from kvscope.results.frames import Run


def all_tables(run: Run, cells: pd.DataFrame) -> list[Table]:
    """The report's tables, in the order they are read; `cells` comes from `accuracy_cells(run)`."""
    return [
        main_table(run, cells),
        *share_tables(run, cells),
        stays_table(run, cells),
        accuracy_table(run, cells),
        *type_tables(run),
        depth_table(run),
        footprint_table(run),
        statistics_table(run),
        *limit_tables(run),
    ]
