"""Checks of FlashMemory's accuracies: averages, which of them a count can give, and gains against noise."""

from collections.abc import Sequence

from kvscope.harness.studies.flashmemory.check import Check, Group
from kvscope.methods.lsa import printed as paper
from kvscope.results.grim import can_be_a_count, counts_around
from kvscope.results.power import pairs_for_difference

HALF_DIGIT_PERCENT = 0.05
"""Table 1 prints accuracies to one digit."""
LIKELY_DISCORDANCE = 0.10
"""Pairs on which two methods differ where they agree on 90 %."""


def accuracy_groups() -> list[Group]:
    """Return the checks of accuracies."""
    return [
        Group(title="Averages and the gain", checks=(*averages(), *gains(), pairs())),
        Group(title="Accuracies that no single pass over the questions gives (GRIM)", checks=impossible()),
        Group(title="Gains against the noise of single runs", checks=against_noise()),
    ]


def averages() -> tuple[Check, ...]:
    """Return the printed averages of the four columns beside the means of their nine rows."""
    found = []
    for column, average in paper.TABLE_1_AVERAGE.accuracies_percent.items():
        mean = _mean([row.accuracies_percent[column] for row in paper.TABLE_1])
        fits = abs(mean - average) <= 2 * HALF_DIGIT_PERCENT
        found.append(
            Check(
                key=f"average_{column}",
                what=f"average accuracy, {column}",
                printed=average,
                recomputed=mean,
                unit="%",
                digits=2,
                meaning="The average is the mean of the nine rows, each with equal weight."
                if fits
                else "The nine rows cannot give this average, however they were rounded.",
                source=paper.TABLE_1_SOURCE,
            )
        )
    return tuple(found)


def gains() -> tuple[Check, ...]:
    """Return the gain over all rows, and by benchmark."""
    return (
        _gain("gain", "gain over all nine rows", paper.TABLE_1, "The rows give the claim after rounding."),
        *(
            _gain(f"gain_{name}", f"gain, {len(rows)} rows of {name}", rows, _by_benchmark(rows))
            for name in ("LongBench-v2", "LongMemEval", "RULER")
            for rows in [[row for row in paper.TABLE_1 if row.name.startswith(name)]]
        ),
    )


def _gain(key: str, what: str, rows: Sequence[paper.PaperRow], meaning: str) -> Check:
    return Check(
        key=key,
        what=what,
        printed=paper.CLAIMED_GAIN_POINTS,
        recomputed=_mean([row.lsa_percent - row.dense_percent for row in rows]),
        unit="points",
        digits=3,
        meaning=meaning,
        source=paper.ABSTRACT,
    )


def _by_benchmark(rows: Sequence[paper.PaperRow]) -> str:
    lost = sum(row.lsa_percent < row.dense_percent for row in rows)
    return f"Of these rows {lost} lose and {len(rows) - lost} gain, so the sign depends on the benchmark."


def pairs() -> Check:
    """Return how many paired questions could show the claimed gain; their number is printed nowhere."""
    return Check(
        key="pairs_for_gain",
        what="paired questions that show +0.6",
        printed=None,
        recomputed=pairs_for_difference(discordance=LIKELY_DISCORDANCE, difference=paper.CLAIMED_GAIN_POINTS / 100),
        unit="pairs",
        digits=0,
        meaning="So many are needed for 80 % power where the two agree on 90 % of the questions; sample counts are "
        "not printed.",
        source=paper.ABSTRACT,
    )


def impossible() -> tuple[Check, ...]:
    """Return every accuracy that no count of right answers over all questions of its set gives."""
    return tuple(
        _impossible(row, column, percent, n, source)
        for row, n, source in rows_with_questions()
        for column, percent in row.accuracies_percent.items()
        if not can_be_a_count(percent, n=n)
    )


def rows_with_questions() -> list[tuple[paper.PaperRow, int, str]]:
    """Return the rows whose number of questions is public, with that number and where it stands."""
    found = []
    for row in paper.TABLE_1:
        if row.name.startswith("LongMemEval"):
            found.append((row, paper.LONGMEMEVAL_QUESTIONS, paper.LONGMEMEVAL_SOURCE))
        elif row.name in paper.LONGBENCH_QUESTIONS:
            found.append((row, paper.LONGBENCH_QUESTIONS[row.name], paper.LONGBENCH_SOURCE))
    return found


def _impossible(row: paper.PaperRow, column: str, percent: float, n: int, source: str) -> Check:
    below, above = counts_around(percent, n=n)
    nearest = min((below, above), key=lambda k: abs(100 * k / n - percent))
    return Check(
        key=f"grim_{row.label.replace(' ', '_')}_{column}",
        what=f"{row.label}, {column}, of {n}",
        printed=percent,
        recomputed=100 * nearest / n,
        unit="%",
        digits=2,
        meaning=f"{below} and {above} of {n} give {100 * below / n:.1f} and {100 * above / n:.1f} %, so that runs were "
        "averaged or a part was asked.",
        source=source,
    )


def against_noise() -> tuple[Check, ...]:
    """Return the gains on LongBench v2 beside how far single runs of it differ."""
    return tuple(
        Check(
            key=f"noise_{row.label.replace(' ', '_')}",
            what=f"noise of one run, then the gain, {row.label}",
            printed=paper.LONGBENCH_NOISE_POINTS,
            recomputed=gain,
            unit="points",
            meaning=f"The gain lies {'inside' if abs(gain) < paper.LONGBENCH_NOISE_POINTS else 'outside'} what one run "
            "of the same model differs by from the next.",
            source=paper.NOISE_SOURCE,
        )
        for row in paper.TABLE_1
        if row.name.startswith("LongBench")
        for gain in [row.lsa_percent - row.dense_percent]
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
