"""How much of a prompt the labels ask for, and a rule that asks for little enough to be worth predicting.

An indexer that is taught to keep nearly everything passes every test of recall and saves nothing. So labels may ask
for at most 30 % of the chunks there are to choose from, and the rule is made stricter until they do.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.label_choice import LabelChoice
from kvscope.harness.indexers.collection.label_rule import LabelRule
from kvscope.harness.indexers.collection.places import places_of
from kvscope.harness.indexers.collection.reading import Collection

#: Most of the chunks that labels may ask for, and of a prompt that may be kept: above it there is little to save.
MOST_KEPT = 0.3
#: Where a rule begins (docs/lsa-study.md), what makes it stricter, one after the other, and what makes it laxer.
FIRST_TOP_P, FIRST_LEAST_MASS = 0.9, 0.2
STRICTER_MASSES, STRICTER_TOP_PS = (0.3, 0.4, 0.5), (0.8, 0.7, 0.6, 0.5)
LAXER_MASSES = (0.1, 0.05)
#: Share of the refreshes that has to need a chunk: fewer teach too little.
LEAST_NEEDING = 0.25
MOST_LAYERS = 4


@dataclass(frozen=True, kw_only=True)
class LabelShare:
    """What a rule asks for at the refreshes of some documents.

    Attributes:
        top_p, least_mass: of the rule.
        labelled_fraction: mean share of the chunks to choose from that is labelled.
        needing_fraction: share of the refreshes that need a chunk which neither sinks nor window hold.
        refreshes: how many there were.
    """

    top_p: float
    least_mass: float
    labelled_fraction: float
    needing_fraction: float
    refreshes: int

    @property
    def is_little(self) -> bool:
        """Whether it leaves something to predict."""
        return self.labelled_fraction <= MOST_KEPT

    def text(self) -> str:
        """Return it in words."""
        return (
            f"top-p {self.top_p:g}, least mass {self.least_mass:g}: labels ask for {self.labelled_fraction:.1%} of the "
            f"chunks, {self.needing_fraction:.0%} of {self.refreshes} refreshes need a chunk"
        )


def label_share(collections: Sequence[Collection], choice: LabelChoice, *, tau: int) -> LabelShare:
    """Return what labels ask for, means over the refreshes of every document with chunks to choose from.

    Raises:
        UsageError: a rule that the collections cannot answer, or no such refresh.
    """
    rule = choice.rule(collections[0].info)
    labelled = 0.0
    n_needing = n_refreshes = 0
    for collection, index in places_of(collections):
        document = collection.load(index)
        layout = choice.layout(document, collection.info.chunk_tokens)
        if not layout.n_candidates:
            continue
        rows = document.refresh_rows(tau)
        counts = collection.positives(index, rule, tau=tau)[rows, layout.first : layout.last].sum(1)
        labelled += float(counts.sum()) / layout.n_candidates
        n_needing += int((counts > 0).sum())
        n_refreshes += len(rows)
    if not n_refreshes:
        raise UsageError("No document is long enough for a chunk to choose; give longer prompts (--length).")
    return LabelShare(
        top_p=rule.top_p,
        least_mass=rule.least_mass,
        labelled_fraction=round(labelled / n_refreshes, 5),
        needing_fraction=round(n_needing / n_refreshes, 5),
        refreshes=n_refreshes,
    )


def choose_labels(
    collections: Sequence[Collection], *, tau: int, top_p: float = FIRST_TOP_P, least_mass: float = FIRST_LEAST_MASS
) -> list[LabelShare]:
    """Return the rules that were tried, the one to take last.

    While labels ask for more than 30 % of the chunks, the least mass rises and then the top-p falls. Where they ask for
    less and fewer than a quarter of the refreshes need a chunk, the least mass falls, as long as 30 % is not exceeded
    and the collections have such masses.

    Args:
        top_p, least_mass: where to begin.

    Raises:
        UsageError: no rule is strict enough, or none finds a chunk that is needed.
    """

    def measured(top_p: float, least_mass: float) -> LabelShare:
        return label_share(collections, LabelChoice(top_p=top_p, least_mass=least_mass), tau=tau)

    tried = [measured(top_p, least_mass)]
    for stricter in _stricter(top_p, least_mass):
        if tried[-1].is_little:
            break
        tried.append(measured(*stricter))
    if not tried[-1].is_little:
        raise UsageError(
            f"No labels ask for less than {MOST_KEPT:.0%} of the chunks. The strictest were {tried[-1].text()}. This "
            "model reads too much of such prompts for an indexer to save anything; give longer ones (--length)."
        )
    stored = max(collection.info.least_mass for collection in collections)
    for laxer in LAXER_MASSES:
        if len(tried) > 1 and tried[-1].least_mass > least_mass:
            break  # it was made stricter
        if tried[-1].needing_fraction >= LEAST_NEEDING or laxer < stored or laxer >= least_mass:
            continue
        found = measured(top_p, laxer)
        if not found.is_little:
            break
        tried.append(found)
    if not tried[-1].needing_fraction:
        raise UsageError(
            f"No refresh needs a chunk ({tried[-1].text()}), so there is nothing to learn; give longer prompts "
            "(--length) or tasks that this model answers (--task)."
        )
    return tried


def _stricter(top_p: float, least_mass: float) -> Iterator[tuple[float, float]]:
    for mass in STRICTER_MASSES:
        if mass > least_mass:
            least_mass = mass
            yield top_p, mass
    for lower in STRICTER_TOP_PS:
        if lower < top_p:
            yield lower, least_mass


def retrieving_layers(collections: Sequence[Collection], rule: LabelRule, *, tau: int) -> tuple[int, ...]:
    """Return the layers whose attention asks for most chunks at refreshes, at most four, ascending.

    They know best what is needed, so it is their keys and states that an indexer reads.
    """
    votes: Counter[int] = Counter()
    choice = LabelChoice()
    for collection, index in places_of(collections):
        document, info = collection.load(index), collection.info
        layout = choice.layout(document, info.chunk_tokens)
        rows = document.refresh_rows(tau)
        for layer in info.layers:
            alone = collection.positives(index, replace(rule, layers=(layer,)), tau=tau)
            votes[layer] += int(alone[rows, layout.first : layout.last].sum())
    most = [layer for layer, count in votes.most_common(MOST_LAYERS) if count]
    return tuple(sorted(most))


def record_of(tried: Sequence[LabelShare]) -> list[dict[str, Any]]:
    """Return tried rules as plain values."""
    return [asdict(share) for share in tried]
