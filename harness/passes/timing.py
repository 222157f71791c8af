"""What stands beside a time, so that a reader can judge it: the spread of its steps, and how busy the host was."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np


def spread_s(step_s: Sequence[float]) -> tuple[float, float]:
    """Return the 10th and the 90th percentile of the seconds of steps, at least one."""
    low_s, high_s = np.quantile(step_s, [0.1, 0.9])
    return float(low_s), float(high_s)


def host_load() -> dict[str, Any]:
    """Return the columns ``load_1min`` and ``cpu_cores``; None for what the system does not tell."""
    return {"load_1min": load_1min(), "cpu_cores": usable_cores()}


def load_1min() -> float | None:
    """Return the host's load average over the last minute."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows has no such function
        return None


def usable_cores() -> int | None:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
