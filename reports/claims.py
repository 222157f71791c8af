"""A published claim beside what was measured, and the table of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isinf

import pandas as pd

from kvscope.reports.table_parts import Table
from kvscope.results.claims import ClaimVerdict, Range, verdict_of
from kvscope.results.reproduction import Reproduction

COLUMNS = [
    "key", "claim", "accounting", "source", "paper", "unit", "asked_low", "asked_high", "ours", "ci_low", "ci_high",
    "n", "discordant", "lost", "won", "verdict", "why",
]  # fmt: skip
CAPTION = (
    "Each claim beside what was measured. A verdict needs the whole 95 % interval: inside the range that was fixed "
    "before, it is reproduced; outside, not reproduced; on an end, inconclusive. Rows of the paper's table have equal "
    "weight; their intervals are joined by squaring and adding (MOVER). Differences are paired on the same prompts; "
    "`-, +` counts pairs lost and won, the discordant ones. KV alone includes the model's own sliding-window layers."
)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One claim with its measurement, in the claim's unit.

    Attributes:
        key: names it in CSV.
        text: in words.
        accounting: what counts as held, where it is about bytes; else ``-``.
        source: what measured it (ledger, NVML, answers).
        paper: as claimed; None where the paper claims nothing of the kind.
        unit: ``%``, ``points`` or ``x``.
        asked: values that count as the claim, fixed before; None where none was.
        ours, low, high: measured.
        n: prompts, or pairs; None without any.
        lost, won: discordant pairs.
        unmeasurable: why it cannot be measured here; empty where it can.
        missing: why it decides nothing yet; empty where all is there.
        note: what else a reader has to know.
    """

    key: str
    text: str
    accounting: str = "-"
    source: str
    paper: float | None
    unit: str
    asked: Range | None = None
    ours: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    lost: int | None = None
    won: int | None = None
    unmeasurable: str = ""
    missing: str = ""
    note: str = ""

    @property
    def verdict(self) -> ClaimVerdict:
        """What the interval says of it."""
        if self.unmeasurable:
            return "not measurable here"
        if self.missing or self.asked is None:
            return "inconclusive"
        return verdict_of(self.low, self.high, self.asked)

    @property
    def why(self) -> str:
        """What the verdict rests on, beside the numbers."""
        parts = [self.unmeasurable]
        if not self.unmeasurable:
            parts.append(f"unfinished: {self.missing}" if self.missing else "")
            if self.ours is not None and self.low is None and not self.missing:
                parts.append("no interval")
        return "; ".join(part for part in (*parts, self.note) if part)

    @property
    def discordant(self) -> int | None:
        """Pairs on which the two methods differ."""
        return None if self.lost is None or self.won is None else self.lost + self.won


def at_scale(claim: Claim, plan: Reproduction) -> Claim:
    """Return a claim as lengths that are not the paper's leave it: measured, with a verdict that decides nothing."""
    if not plan.scaled or claim.unmeasurable:
        return claim
    told = "" if claim.asked is None else f" (at these: {claim.verdict})"
    return replace(claim, unmeasurable=f"lengths are the paper's over {plan.divisor}{told}")


def claims_table(claims: Sequence[Claim], plan: Reproduction) -> Table:
    """Return the table of claims."""
    data = pd.DataFrame([_record(claim) for claim in claims], columns=COLUMNS).astype(
        {"n": "Int64", "discordant": "Int64", "lost": "Int64", "won": "Int64"}
    )
    text = pd.DataFrame([_text(claim) for claim in claims])
    caption = f"{plan.scale_sentence} {CAPTION}" if plan.scaled else CAPTION
    return Table("claims", f"Claims of FlashMemory-DeepSeek-V4, measured on {plan.model}", caption, data, text)


def _record(claim: Claim) -> dict[str, object]:
    asked = claim.asked
    return {
        "key": claim.key, "claim": claim.text, "accounting": claim.accounting, "source": claim.source,
        "paper": claim.paper, "unit": claim.unit,
        "asked_low": None if asked is None or isinf(asked.low) else asked.low,
        "asked_high": None if asked is None or isinf(asked.high) else asked.high,
        "ours": claim.ours, "ci_low": claim.low, "ci_high": claim.high, "n": claim.n, "discordant": claim.discordant,
        "lost": claim.lost, "won": claim.won, "verdict": claim.verdict, "why": claim.why,
    }  # fmt: skip


def _text(claim: Claim) -> dict[str, str]:
    known = claim.low is not None and claim.high is not None
    ends = f"[{_signed(claim.low or 0.0, claim.unit)}, {_signed(claim.high or 0.0, claim.unit)}]"
    return {
        "claim": claim.text,
        "paper": "not claimed" if claim.paper is None else quantity(claim.paper, claim.unit),
        "ours": "-" if claim.ours is None else quantity(claim.ours, claim.unit),
        "95 % interval": ends if known else "-",
        "n": "-" if claim.n is None else f"{claim.n:,}",
        "-, +": "-" if claim.lost is None else f"{claim.lost}, {claim.won}",
        "verdict": claim.verdict,
        "counts as the claim": "-" if claim.asked is None else claim.asked.text(claim.unit),
        "accounting": claim.accounting,
        "source": claim.source,
        "why": claim.why or "-",
    }


def quantity(value: float, unit: str) -> str:
    """Return a value with its unit; differences carry their sign."""
    return f"{_signed(value, unit)} {unit}"


def _signed(value: float, unit: str) -> str:
    digits = 2 if unit == "x" else 1
    # No minus before what rounds to nil.
    return f"{round(value, digits) + 0.0:{'+' if unit == 'points' else ''}.{digits}f}"
