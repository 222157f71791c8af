"""What claims are made of: a cell's accuracies, paired differences and shares of bytes, each with its interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from kvscope.results.claims import careful_difference, weighted_sum
from kvscope.results.comparisons import SCORE_COLUMNS, answered, cluster_names, pairs, pooled, texts_of
from kvscope.results.frames import Run
from kvscope.results.reproduction import CellPlan, Loaded
from kvscope.results.share import prompt_shares
from kvscope.results.statistics import (
    Interval,
    PairedDifference,
    bootstrap_interval,
    mean_interval,
    paired_difference,
)


@dataclass(frozen=True)
class CellRows:
    """A measured cell. Methods are named by what they stand for (``dense``, ``lsa``, ``random_equal``)."""

    plan: CellPlan
    run: Run

    @cached_property
    def _answered(self) -> pd.DataFrame:
        return answered(pooled(self.run.samples, self.run.info))

    @cached_property
    def _scores(self) -> pd.DataFrame:
        return self._answered[SCORE_COLUMNS]

    @cached_property
    def _by_label(self) -> dict[str | None, pd.DataFrame]:
        return {str(label): rows for label, rows in self._answered.groupby("method_label", sort=False)}

    def rows(self, name: str) -> pd.DataFrame:
        """Return the answered rows of a method; none where the cell has not that method. They must not be changed."""
        found = self._by_label.get(self.plan.methods.get(name))
        return self._answered.iloc[:0] if found is None else found

    def n(self, name: str) -> int:
        """Return how many prompts a method answered."""
        return len(self.rows(name))

    @cached_property
    def missing(self) -> str:
        """Why nothing may be decided from the cell yet; empty where every prompt has an answer of every method."""
        for name in self.plan.methods:
            found = self.n(name)
            if found < self.plan.prompts:
                return f"{found} of {self.plan.prompts} prompts of {self.plan.name} under {name}"
        return ""

    def accuracy(self, name: str) -> Interval | None:
        """Return a method's accuracy; None without an answer. Tasks weigh alike: each has as many prompts."""
        rows = self.rows(name)
        if not len(rows):
            return None
        return mean_interval(rows["score"].to_numpy(float), clusters=_clusters(rows["context_id"]))

    def difference(self, name: str, baseline: str = "dense") -> PairedDifference | None:
        """Return a method minus another on the prompts that both answered; None without such."""
        labels = self.plan.methods.get(name), self.plan.methods.get(baseline)
        if None in labels:
            return None
        table = pairs(self._scores, method=str(labels[0]), baseline=str(labels[1]))
        if not len(table):
            return None
        return paired_difference(
            table["score_method"].to_numpy(float),
            table["score_baseline"].to_numpy(float),
            clusters=_clusters(table["context_id"]),
        )

    def share(self, name: str, *, accounting: str) -> Interval | None:
        """Return a method's share of dense's bytes, mean over prompts; None where the bytes are not known."""
        rows = self.rows(name)
        rows = rows[rows["dense_kv_bytes"].notna()]
        if not len(rows):
            return None
        values = np.asarray(prompt_shares(rows, accounting=accounting), dtype=np.float64)
        return bootstrap_interval(values, clusters=_clusters(rows["context_id"]))

    def dense_bytes(self) -> float:
        """Return what dense holds of a prompt, mean."""
        return float(self.rows("lsa")["dense_kv_bytes"].astype("float64").mean())


def cell_rows(loaded: Loaded, cell: CellPlan, run: Run) -> CellRows:
    """Return a cell of a reproduction with its rows; the same at every call, with what was worked out of them."""
    kept: dict[str, CellRows] = loaded.memo.setdefault("cell_rows", {})
    return kept.setdefault(cell.name, CellRows(cell, run))


@dataclass(frozen=True)
class Pooled:
    """Cells together, each row of the paper's table with equal weight.

    Attributes:
        interval: of the mean of the cells.
        n: prompts, or pairs.
        lost, won: discordant pairs, over all; None where nothing is paired.
        missing: why it decides nothing yet; empty where nothing is missing.
    """

    interval: Interval | None
    n: int = 0
    lost: int | None = None
    won: int | None = None
    missing: str = ""


def pooled_share(
    cells: Sequence[CellRows], *, accounting: str, by_bytes: bool = False, name: str = "lsa", planned: int
) -> Pooled:
    """Return the mean of the cells' shares, or with ``by_bytes`` the share of all cells' bytes together."""
    found = [(cell, share) for cell in cells if (share := cell.share(name, accounting=accounting)) is not None]
    if not found:
        return Pooled(None, missing="no row is measured")
    weights = [cell.dense_bytes() if by_bytes else 1.0 for cell, _ in found]
    total = sum(weights)
    interval = weighted_sum([share for _, share in found], [weight / total for weight in weights])
    return Pooled(interval, interval.n, missing=_missing([cell for cell, _ in found], planned))


def pooled_difference(cells: Sequence[CellRows], name: str, baseline: str = "dense", *, planned: int) -> Pooled:
    """Return the mean of the cells' paired differences."""
    found = [(cell, paired) for cell in cells if (paired := cell.difference(name, baseline)) is not None]
    if not found:
        return Pooled(None, missing="no row is measured")
    interval = weighted_sum([careful_difference(paired) for _, paired in found], [1 / len(found)] * len(found))
    return Pooled(
        interval,
        interval.n,
        lost=sum(paired.lost for _, paired in found),
        won=sum(paired.won for _, paired in found),
        missing=_missing([cell for cell, _ in found], planned),
    )


def _missing(cells: Sequence[CellRows], planned: int) -> str:
    if len(cells) < planned:
        return f"{len(cells)} of {planned} rows"
    return next((cell.missing for cell in cells if cell.missing), "")


def _clusters(names: "pd.Series[Any]") -> list[str] | None:
    texts = texts_of(names)
    return None if texts is None else cluster_names(texts.tolist())
