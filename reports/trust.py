"""Times that are not to be trusted: what a row itself says about the machine it was timed on."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from kvscope.results.frames import records

MOST_LOAD_PER_CORE = 1.25
"""Load average per core above which a host was busy with more than the measurement: a process that uses every core is a
load of 1 a core by itself."""
MOST_SPREAD = 1.5
"""Ratio of the 90th to the 10th percentile of the steps above which their median says little."""


def time_doubts(row: Mapping[str, Any]) -> str:
    """Return why the times of a footprint or throughput row are not to be trusted; empty where nothing speaks against.

    A row of an earlier version that says neither load nor spread is judged by the rest.
    """
    found = []
    others = row.get("other_processes")
    if others:
        found.append(f"{others} other process{'es' if others > 1 else ''} on the GPU")
    load, cores = row.get("load_1min"), row.get("cpu_cores")
    if load is not None and cores and load > MOST_LOAD_PER_CORE * cores:
        found.append(f"host load {load:.1f} on {cores} cores")
    low, high = row.get("tpot_p10_s", row.get("step_p10_s")), row.get("tpot_p90_s", row.get("step_p90_s"))
    if low is not None and high is not None and high > MOST_SPREAD * low:
        found.append(f"p90 of the steps is over {MOST_SPREAD:g} times p10")
    return "; ".join(found)


def with_doubts(frame: pd.DataFrame) -> pd.DataFrame:
    """Return footprint or throughput rows with the column `time_doubts`: empty where times may be trusted."""
    return frame.assign(time_doubts=[time_doubts(row) if row["status"] == "ok" else "" for row in records(frame)])
