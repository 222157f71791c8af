"""Every method of a run against its baseline, on the prompts both answered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from kvscope.errors import UsageError
from kvscope.results.run_schema import RunInfo
from kvscope.results.statistics import Interval, PairedDifference, bootstrap_interval, holm, paired_difference

PAIR_KEY = ["task", "length_tokens", "sample"]
SCORE_COLUMNS = [*PAIR_KEY, "method_label", "status", "reason", "score", "answer_nll", "prompt_sha256", "context_id"]
DEFAULT_MARGIN = 0.01
POOLED = "all prompts"
"""The scope of every prompt that is pooled."""

DifferenceVerdict = Literal["worse", "better", "no difference shown", "inconclusive"]


@dataclass(frozen=True)
class Comparison:
    """One method against the baseline within one scope (all prompts, one length or one task)."""

    scope: str
    method_label: str
    baseline_label: str
    method_mean: float
    baseline_mean: float
    paired: PairedDifference
    p_holm: float
    """Holm-adjusted over the methods of the scope."""
    nll: Interval | None
    """Difference of the answer's negative log-likelihood, nats per token (negative: the method is better)."""

    @property
    def verdict(self) -> DifferenceVerdict:
        """`inconclusive` where too few pairs differ for any test; otherwise by the Holm-adjusted p at 5 %."""
        if self.paired.pairs_for_6_discordant is not None:
            return "inconclusive"
        if self.p_holm >= 0.05:
            return "no difference shown"
        return "worse" if self.paired.is_worse else "better"

    @property
    def sentence(self) -> str:
        """The verdict with what it rests on."""
        paired = self.paired
        if paired.pairs_for_6_discordant is None:
            p = "p < 0.0001" if self.p_holm < 1e-4 else f"p = {self.p_holm:.2g}"
            return f"{self.verdict} ({p} after Holm)"
        differ = "differs" if paired.discordant_clusters == 1 else "differ"
        what = "contexts" if paired.clustered else "pairs"
        return (
            f"inconclusive: {paired.discordant_clusters} of {paired.n_clusters} {what} {differ}, at least 6 are "
            f"needed; about {paired.pairs_for_6_discordant} pairs would do"
        )


def baseline_label(info: RunInfo) -> str | None:
    """The run's baseline: `dense` over the model's own dtype, or None when there is none.

    `dense:kv=int8` is no baseline: it is compared with one.
    """
    found = (method for method in info.methods if method.name == "dense" and not method.options.get("kv"))
    return next((method.label for method in found), None)


def pooled(samples: pd.DataFrame, info: RunInfo) -> pd.DataFrame:
    """The rows that count in pooled scores: all but those of question types that the run excludes by name."""
    if not info.excluded_types:
        return samples
    kinds = zip(samples["task"], samples["question_type"], strict=True)
    return samples[[info.pools(task, kind) for task, kind in kinds]]


def answered(samples: pd.DataFrame) -> pd.DataFrame:
    """The rows with a score."""
    return samples[samples["status"] == "ok"]


def pairs(samples: pd.DataFrame, *, method: str, baseline: str) -> pd.DataFrame:
    """Rows both methods answered: PAIR_KEY, context_id, score and answer_nll of both (`_method`, `_baseline`).

    Raises UsageError when the two saw different prompts under the same key.
    """
    ok = answered(samples)
    columns = [*PAIR_KEY, "score", "answer_nll", "prompt_sha256", "context_id"]
    left = ok.loc[ok["method_label"] == method, columns]
    right = ok.loc[ok["method_label"] == baseline, columns]
    both = left.merge(right, on=PAIR_KEY, suffixes=("_method", "_baseline"), validate="one_to_one")
    differing = both[both["prompt_sha256_method"] != both["prompt_sha256_baseline"]]
    if len(differing):
        first = differing.iloc[0]
        raise UsageError(
            f"{method} and {baseline} answered different prompts at {first['task']}, {first['length_tokens']} tokens, "
            f"sample {first['sample']} ({len(differing)} such pairs): they cannot be compared."
        )
    return both.rename(columns={"context_id_method": "context_id"}).drop(columns="context_id_baseline")


def compare_methods(
    samples: pd.DataFrame,
    *,
    info: RunInfo,
    margin: float = DEFAULT_MARGIN,
    tables: Mapping[str, pd.DataFrame] | None = None,
) -> list[Comparison]:
    """Compare every method with the baseline: pooled over all prompts, by length, by task.

    Question types that the run excludes by name are in none of them.

    Holm's correction runs over the methods of one scope. A scope that repeats the pooled one (a run of one length or
    one task) is left out, and so is a method without a common prompt. Empty when the run has no `dense`.

    Args:
        tables: what `paired_tables` returns of these rows, where it is there already.
    """
    baseline = baseline_label(info)
    if baseline is None:
        return []
    samples = pooled(samples, info)[SCORE_COLUMNS]
    tables = paired_tables(samples, info) if tables is None else tables
    lengths, tasks = sorted(samples["length_tokens"].unique()), samples["task"].unique().tolist()
    return compare_tables(
        tables, baselines=dict.fromkeys(tables, baseline), lengths=lengths, tasks=tasks, margin=margin
    )


def compare_tables(
    tables: Mapping[str, pd.DataFrame],
    *,
    baselines: Mapping[str, str],
    lengths: Sequence[int],
    tasks: Sequence[str],
    margin: float = DEFAULT_MARGIN,
) -> list[Comparison]:
    """Compare methods with their baselines in every scope: all pairs, by length and by task where there are several.

    Args:
        tables: method label -> its pairs, with the columns of `pairs`.
        baselines: method label -> label of what it is compared with.
    """
    found = _compare_within(POOLED, tables, baselines=baselines, margin=margin)
    for length in lengths if len(lengths) > 1 else []:
        within = {label: table[table["length_tokens"] == length] for label, table in tables.items()}
        found += _compare_within(f"{length} tokens", within, baselines=baselines, margin=margin)
    for task in tasks if len(tasks) > 1 else []:
        within = {label: table[table["task"] == task] for label, table in tables.items()}
        found += _compare_within(task, within, baselines=baselines, margin=margin)
    return found


def compare_runs(
    first: pd.DataFrame, second: pd.DataFrame, *, names: tuple[str, str], margin: float = DEFAULT_MARGIN
) -> list[Comparison]:
    """Compare two runs' answers to the same prompts: over all, and by task where there are several.

    Of one method in two precisions or batches, this is the noise floor: how far answers move with nothing to be
    compared. Holm's correction has one comparison a scope, so it leaves p as it is.

    Args:
        first, second: sample rows of one method each; the first is the baseline.
        names: what to call them.

    Raises UsageError when they saw different prompts under the same key, as with other seeds.
    """
    before, after = names
    runs = [first[SCORE_COLUMNS].assign(method_label=before), second[SCORE_COLUMNS].assign(method_label=after)]
    both = pd.concat(runs, ignore_index=True)
    table = pairs(both, method=after, baseline=before)
    tasks = table["task"].unique().tolist()
    return compare_tables({after: table}, baselines={after: before}, lengths=(), tasks=tasks, margin=margin)


def paired_tables(samples: pd.DataFrame, info: RunInfo) -> dict[str, pd.DataFrame]:
    """Method label -> its pairs with the run's baseline; none where it has no baseline."""
    baseline = baseline_label(info)
    if baseline is None:
        return {}
    samples = answered(samples[SCORE_COLUMNS])
    others = [method.label for method in info.methods if method.label != baseline]
    return {label: pairs(samples, method=label, baseline=baseline) for label in others}


def cluster_names(context_ids: Sequence[str | None]) -> list[str] | None:
    """Cluster names for resampling, or None when no row has a shared context. A row without one stands alone."""
    if list(context_ids).count(None) == len(context_ids):
        return None
    return [f"row {index}" if name is None else f"context {name}" for index, name in enumerate(context_ids)]


def _compare_within(
    scope: str, tables: Mapping[str, pd.DataFrame], *, baselines: Mapping[str, str], margin: float
) -> list[Comparison]:
    tables = {label: table for label, table in tables.items() if len(table)}
    results = {
        label: paired_difference(
            table["score_method"].to_numpy(float),
            table["score_baseline"].to_numpy(float),
            margin=margin,
            clusters=_clusters(table),
        )
        for label, table in tables.items()
    }
    adjusted = holm([result.p_value for result in results.values()])
    return [
        Comparison(
            scope=scope,
            method_label=label,
            baseline_label=baselines[label],
            method_mean=float(tables[label]["score_method"].mean()),
            baseline_mean=float(tables[label]["score_baseline"].mean()),
            paired=result,
            p_holm=p_holm,
            nll=_nll(tables[label]),
        )
        for (label, result), p_holm in zip(results.items(), adjusted, strict=True)
    ]


def _nll(table: pd.DataFrame) -> Interval | None:
    scored = table.dropna(subset=["answer_nll_method", "answer_nll_baseline"])
    if not len(scored):
        return None
    gap = scored["answer_nll_method"].to_numpy(float) - scored["answer_nll_baseline"].to_numpy(float)
    return bootstrap_interval(gap, clusters=_clusters(scored))


def _clusters(table: pd.DataFrame) -> list[str] | None:
    names = texts_of(table["context_id"])
    return None if names is None else cluster_names(names.tolist())


def texts_of(column: "pd.Series[Any]") -> npt.NDArray[np.object_] | None:
    """The texts of a column, None for a null; None in place of all where every one is null."""
    if not column.notna().any():
        return None
    texts = np.array(column.array, dtype=object)
    texts[column.isna().to_numpy()] = None
    return texts
