"""Times that are not to be trusted: what a row itself says about the machine it was timed on."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from kvscope.results.frames import records
from kvscope.results.quiet import load_class_doubt, others_doubt

MOST_SPREAD = 1.5
"""Ratio of the 90th to the 10th percentile of the steps above which their median says little."""


def time_doubts(row: Mapping[str, Any]) -> str:
    """Return why the times of a footprint or throughput row are not to be trusted; empty where nothing speaks against.

    A row of an earlier version that says neither load nor spread is judged by the rest.
    """
    found = [others_doubt(row.get("other_processes")), load_class_doubt(row.get("load_1min"), row.get("cpu_cores"))]
    low, high = row.get("tpot_p10_s", row.get("step_p10_s")), row.get("tpot_p90_s", row.get("step_p90_s"))
    if low is not None and high is not None and high > MOST_SPREAD * low:
        found.append(f"p90 of the steps is over {MOST_SPREAD:g} times p10")
    return "; ".join(filter(None, found))


def with_doubts(frame: pd.DataFrame) -> pd.DataFrame:
    """Return footprint or throughput rows with the column `time_doubts`: empty where times may be trusted."""
    return frame.assign(time_doubts=[time_doubts(row) if row["status"] == "ok" else "" for row in records(frame)])
