"""Tables of scores: accuracy by method and length, and the paired statistics against dense."""

from typing import Any

import pandas as pd

from kvscope.reports.cells import ALL_TASKS, comparisons, pool_notes
from kvscope.reports.table_parts import Notes, Table, excluded_notes
from kvscope.reports.ties import tie_notes
from kvscope.reports.units import length_text, number, p_text, percent, points, with_interval
from kvscope.results.comparisons import baseline_label
from kvscope.results.frames import Run, records


def accuracy_table(run: Run, cells: pd.DataFrame) -> Table:
    """Accuracy by task, method and length, with interval and count, and the paired difference to dense below it."""
    notes = Notes()
    lengths = list(run.info.lengths_tokens)
    baseline = baseline_label(run.info)
    rows: list[dict[str, str]] = []
    for (task, label), group in cells.groupby(["task", "method_label"], sort=False):
        by_length = {cell["length_tokens"]: cell for cell in records(group)}
        name = "tasks of every length" if task == ALL_TASKS and pool_notes(run.info) else str(task)
        head = {"task": name, "method": str(label)}
        rows.append(
            head
            | {"value": "accuracy (%)"}
            | {length_text(length): _accuracy_text(by_length[length], notes) for length in lengths}
        )
        if baseline is not None and label != baseline:
            rows.append(
                head
                | {"value": "minus dense (points)"}
                | {length_text(length): _difference_text(by_length[length], notes) for length in lengths}
            )
    caption = (
        "Accuracy in percent with its 95 % interval and the number of scored prompts n; below it the paired difference "
        "to dense in percentage points with its 95 % interval, on the prompts both answered. Prompts that could not be "
        "run count in neither."
    )
    columns = ["task", "method", "value", *map(length_text, lengths)]
    return Table(
        "accuracy",
        "Accuracy by method and length",
        caption,
        cells,
        pd.DataFrame(rows, columns=columns),
        (*notes.lines(), *pool_notes(run.info), *excluded_notes(run.info), *tie_notes(run)),
    )


def _accuracy_text(cell: dict[str, Any], notes: Notes) -> str:
    if cell["accuracy"] is None:
        return notes.mark(cell["reason"] or "no prompt was asked for")
    lacking = cell["n_not_measured"] + cell["n_missing"]
    count = f"n={cell['n']}" + (f" of {cell['n'] + lacking}" if lacking else "")
    return f"{with_interval(cell['accuracy'], cell['ci_low'], cell['ci_high'])} {count}"


def _difference_text(cell: dict[str, Any], notes: Notes) -> str:
    if cell["difference_to_dense"] is None:
        return notes.mark(cell["note"])
    return with_interval(cell["difference_to_dense"], cell["difference_low"], cell["difference_high"], text=points)


_INTEGERS = (
    "n_pairs", "n_contexts", "lost", "won", "lost_contexts", "won_contexts", "pairs_for_6_discordant",
    "noninferiority_pairs_needed", "equivalence_pairs_needed", "nll_pairs",
)  # fmt: skip
STATISTICS_COLUMNS = [
    "scope",
    "method_label",
    "baseline_label",
    "n_pairs",
    "n_contexts",
    "design_effect",
    "method_accuracy",
    "baseline_accuracy",
    "difference",
    "difference_low",
    "difference_high",
    "interval",
    "lost",
    "won",
    "lost_contexts",
    "won_contexts",
    "test",
    "p_value",
    "p_holm",
    "verdict",
    "pairs_for_6_discordant",
    "margin",
    "noninferiority",
    "noninferiority_p_value",
    "noninferiority_pairs_needed",
    "noninferiority_power",
    "equivalence",
    "equivalence_p_value",
    "equivalence_pairs_needed",
    "nll_difference",
    "nll_low",
    "nll_high",
    "nll_pairs",
    "sentence",
]


def statistics_table(run: Run) -> Table:
    """Paired comparison of every method with dense: pooled, by length and by task."""
    rows, texts = [], []
    nll = False
    for found in comparisons(run):
        paired, difference = found.paired, found.paired.difference
        safe, same = paired.noninferiority, paired.equivalence
        nll = nll or found.nll is not None
        rows.append(
            {
                "scope": found.scope,
                "method_label": found.method_label,
                "baseline_label": found.baseline_label,
                "n_pairs": paired.n_pairs,
                "n_contexts": paired.n_clusters,
                "design_effect": paired.design_effect,
                "method_accuracy": found.method_mean,
                "baseline_accuracy": found.baseline_mean,
                "difference": difference.mean,
                "difference_low": difference.low,
                "difference_high": difference.high,
                "interval": difference.kind,
                "lost": paired.lost,
                "won": paired.won,
                "lost_contexts": paired.lost_clusters,
                "won_contexts": paired.won_clusters,
                "test": paired.test,
                "p_value": paired.p_value,
                "p_holm": found.p_holm,
                "verdict": found.verdict,
                "pairs_for_6_discordant": paired.pairs_for_6_discordant,
                "margin": safe.margin,
                "noninferiority": safe.verdict,
                "noninferiority_p_value": safe.p_value,
                "noninferiority_pairs_needed": safe.pairs_needed,
                "noninferiority_power": safe.power,
                "equivalence": same.verdict,
                "equivalence_p_value": same.p_value,
                "equivalence_pairs_needed": same.pairs_needed,
                "nll_difference": found.nll.mean if found.nll else None,
                "nll_low": found.nll.low if found.nll else None,
                "nll_high": found.nll.high if found.nll else None,
                "nll_pairs": found.nll.n if found.nll else 0,
                "sentence": found.sentence,
            }
        )
        texts.append(
            {
                "scope": _scope_text(found.scope),
                "method": found.method_label,
                "pairs": str(paired.n_pairs),
                "accuracy (%)": percent(found.method_mean),
                "dense (%)": percent(found.baseline_mean),
                "difference (points)": with_interval(difference.mean, difference.low, difference.high, text=points),
                "lost / won": f"{paired.lost} / {paired.won}",
                "p": p_text(paired.p_value),
                "p (Holm)": p_text(found.p_holm),
                "verdict": found.sentence if paired.pairs_for_6_discordant is not None else found.verdict,
                f"non-inferior at {number(100 * safe.margin)} point": _with_pairs(safe.verdict, safe.pairs_needed),
                f"equivalent at {number(100 * same.margin)} point": _with_pairs(same.verdict, same.pairs_needed),
            }
        )
    data = pd.DataFrame(rows, columns=STATISTICS_COLUMNS).astype(dict.fromkeys(_INTEGERS, "Int64"))
    notes = (
        () if rows else ("No comparison: the run has no dense, or no prompt that dense and another method answered.",)
    )
    caption = (
        "Every method against dense on the prompts both answered. Intervals are 95 %: paired bootstrap, or Tango's "
        "score interval where nearly all pairs end alike. Lost / won: pairs on which dense or the method scores "
        "higher. p: exact McNemar (exact sign test for graded scores), Holm-adjusted over the methods of one scope. "
        "Where questions share a context, contexts are resampled and tested, not questions. Non-inferiority is "
        "one-sided, 5 %; equivalence is that on both sides (TOST). Pairs needed are those of a new test on new seeds, "
        "not of this one continued."
    )
    if rows and not nll:
        caption += " The answer's negative log-likelihood was not requested."
    text = pd.DataFrame(texts) if texts else pd.DataFrame(columns=["scope", "method", "verdict"])
    return Table(
        "statistics",
        "Paired statistics against dense",
        caption,
        data,
        text,
        (*notes, *excluded_notes(run.info), *tie_notes(run)),
    )


def _with_pairs(verdict: str, pairs_needed: int | None) -> str:
    return verdict if pairs_needed is None else f"{verdict} (needs about {pairs_needed:,} pairs)"


def _scope_text(scope: str) -> str:
    number_of, _, unit = scope.partition(" ")
    return f"{length_text(int(number_of))} tokens" if unit == "tokens" and number_of.isdecimal() else scope
