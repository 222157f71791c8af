"""Sample rows by cell, as columns: what tables of accuracy count without making an object of each row."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from kvscope.results.comparisons import cluster_names, texts_of
from kvscope.results.statistics import mean_interval

Places = npt.NDArray[np.intp]
NOWHERE: Places = np.empty(0, dtype=np.intp)


class Answers:
    """The columns of sample rows that accuracies are made of. A cell is the places of its rows, in their order."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self._rows = rows
        self._ok = (rows["status"] == "ok").to_numpy(dtype=bool)
        self._score = rows["score"].to_numpy(dtype=np.float64)
        self._contexts = Contexts(rows["context_id"])

    def accuracy(self, places: Places) -> dict[str, object]:
        """Return n, n_not_measured, and of scored rows accuracy, ci_low, ci_high and interval."""
        ok = places[self._ok[places]]
        cell: dict[str, object] = {"n": len(ok), "n_not_measured": len(places) - len(ok)}
        if len(ok):
            found = mean_interval(self._score[ok], clusters=self._contexts.clusters(ok))
            cell |= {"accuracy": found.mean, "ci_low": found.low, "ci_high": found.high, "interval": found.kind}
        return cell

    def failures(self, places: Places) -> list[str]:
        """Return why rows have no score, one clause a status: the reason of its first row."""
        without = places[~self._ok[places]][::-1]
        if not len(without):
            return []
        failed = self._rows[["status", "reason"]].iloc[without]
        found = dict(zip(failed["status"], failed["reason"], strict=True))
        return [f"{status}: {reason}" for status, reason in found.items()]


class Contexts:
    """Which rows share a context."""

    def __init__(self, names: "pd.Series[Any]") -> None:
        self._names = texts_of(names)

    def clusters(self, places: Places) -> list[str] | None:
        """Return cluster names for resampling; None when no row has a shared context."""
        return None if self._names is None else cluster_names(self._names[places].tolist())


def by_cell(rows: pd.DataFrame, columns: Sequence[str]) -> dict[Any, Places]:
    """Places of rows by the values of some columns (a tuple), in the order in which those are first there."""
    if not len(rows):
        return {}
    cells = rows.groupby(list(columns), sort=False).indices
    return {key: np.asarray(places, dtype=np.intp) for key, places in cells.items()}
