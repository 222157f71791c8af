"""Two runs joined on the prompts that both answered: which methods stand against each other, and what has no partner.

A prompt is known by its task, its length and the hash of its text. Its number may differ, as it does in merged runs.
"""

from collections import Counter
from dataclasses import dataclass

import pandas as pd

from kvscope.errors import UsageError, did_you_mean
from kvscope.results.comparisons import PAIR_KEY, answered, pooled
from kvscope.results.frames import Run, records

PROMPT = ["task", "length_tokens", "prompt_sha256", "_copy"]
"""What tells a prompt; `_copy` counts prompts of a task that are word for word the same."""
_COLUMNS = [*PAIR_KEY, "prompt_sha256", "context_id", "status", "reason", "score", "answer_nll", "output"]

_LOST = "no answer in B"
MethodPair = tuple[str, str]
"""(label in the first run, label in the other)."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Rows of one task and length that are in no comparison.

    Attributes:
        why: what keeps them out, with A for the first run and B for the other.
        n: how many prompts.
        lost: whether A answered them and B could not.
    """

    methods: MethodPair
    why: str
    lost: bool
    task: str
    length_tokens: int
    n: int


@dataclass(frozen=True, kw_only=True)
class Joined:
    """Two runs, joined.

    Attributes:
        pairs: the methods compared.
        tables: for each of them the prompts that both answered, with the columns of `comparisons.pairs`: `_baseline` is
            the first run's, `_method` the other's. `same_answer`: whether the texts are the same; `row_baseline` and
            `row_method`: where the rows stand in the runs' samples.
        gaps: prompts without a partner, without an answer, or out of pooled scores.
        left_out: labels of each run that are compared with nothing.
    """

    pairs: tuple[MethodPair, ...]
    tables: tuple[pd.DataFrame, ...]
    gaps: tuple[Gap, ...]
    left_out: tuple[tuple[str, ...], tuple[str, ...]]


def method_pairs(first: Run, other: Run, asked: MethodPair | None = None) -> tuple[MethodPair, ...]:
    """Return which methods of two runs stand against each other.

    The two asked for, or else every label that both runs have, and with it the one label that each has alone. Where a
    run has several labels of its own nothing says which belong together: they are left out.

    Raises:
        UsageError: a run lacks a label that is asked for, or no two methods belong together.
    """
    mine, theirs = ([method.label for method in run.info.methods] for run in (first, other))
    if asked is not None:
        for label, labels, run in zip(asked, (mine, theirs), (first, other), strict=True):
            if label not in labels:
                raise UsageError(f"{run.folder} has no method {label!r}.{did_you_mean(label, labels)}")
        return (asked,)
    own = [label for label in mine if label not in theirs]
    others = [label for label in theirs if label not in mine]
    found = [(label, label) for label in mine if label in theirs]
    if len(own) == len(others) == 1:
        found.append((own[0], others[0]))
    if not found:
        raise UsageError(
            f"{first.folder} and {other.folder} have no method in common ({', '.join(mine)} against "
            f"{', '.join(theirs)}): say which belong together with --pair A_METHOD B_METHOD."
        )
    return tuple(found)


def join(first: Run, other: Run, asked: MethodPair | None = None) -> Joined:
    """Join two runs on their prompts.

    Raises:
        UsageError: as `method_pairs`.
    """
    pairs = method_pairs(first, other, asked)
    tables, gaps = [], []
    for pair in pairs:
        table, without = _joined(first, other, pair)
        tables.append(table)
        gaps += without
    left_out = [
        tuple(method.label for method in run.info.methods if method.label not in {pair[side] for pair in pairs})
        for side, run in enumerate((first, other))
    ]
    return Joined(pairs=pairs, tables=tuple(tables), gaps=tuple(gaps), left_out=(left_out[0], left_out[1]))


def _joined(first: Run, other: Run, pair: MethodPair) -> tuple[pd.DataFrame, list[Gap]]:
    """Return the prompts that both answered, and what keeps the others out."""
    left, right = (_prompts(run, label) for run, label in zip((first, other), pair, strict=True))
    both = left.merge(right, on=PROMPT, how="outer", suffixes=("_baseline", "_method"), indicator=True)
    why = pd.Series(None, index=both.index, dtype=object)
    why[both["_merge"] == "left_only"] = "only in A"
    why[both["_merge"] == "right_only"] = "only in B"
    common = both["_merge"] == "both"
    for name, run in (("baseline", "A"), ("method", "B")):
        unanswered = common & why.isna() & (both[f"status_{name}"] != "ok")
        why[unanswered] = f"no answer in {run} (" + both.loc[unanswered, f"status_{name}"].astype(object) + ")"
    unpooled = common & why.isna() & ~(both["pooled_baseline"].eq(True) & both["pooled_method"].eq(True))
    why[unpooled] = "its question type counts in no pooled score"
    counts = Counter(
        (row["_why"], row["task"], row["length_tokens"])
        for row in records(both[why.notna()].assign(_why=why[why.notna()])[["_why", "task", "length_tokens"]])
    )
    gaps = [
        Gap(methods=pair, why=reason, lost=reason.startswith(_LOST), task=task, length_tokens=length, n=n)
        for (reason, task, length), n in sorted(counts.items())
    ]
    matched = both[why.isna()]
    matched = matched.assign(same_answer=matched["output_baseline"] == matched["output_method"])
    names = {"context_id_baseline": "context_id", "sample_baseline": "sample"}
    of_both = [f"{name}_{side}" for name in ("score", "answer_nll", "row") for side in ("baseline", "method")]
    return matched.rename(columns=names)[[*PAIR_KEY, "context_id", "same_answer", *of_both]].reset_index(
        drop=True
    ), gaps


def _prompts(run: Run, label: str) -> pd.DataFrame:
    """The rows of one method, one a prompt: `pooled` says whether it counts in pooled scores, `row` where it stands."""
    rows = run.samples[run.samples["method_label"] == label]
    counted = pooled(rows, run.info).index
    frame = rows[_COLUMNS].assign(pooled=rows.index.isin(counted), row=rows.index)
    return frame.assign(_copy=frame.groupby(PROMPT[:3], sort=False).cumcount())


def renumbered(first: Run, other: Run) -> int:
    """Return how many (task, length, sample) both runs have with different prompts: other seeds, tokenizers or data."""
    keys = [
        answered(run.samples)[[*PAIR_KEY, "prompt_sha256"]].drop_duplicates(PAIR_KEY).astype({"sample": "int64"})
        for run in (first, other)
    ]
    both = keys[0].merge(keys[1], on=PAIR_KEY)
    return int((both["prompt_sha256_x"] != both["prompt_sha256_y"]).sum())
