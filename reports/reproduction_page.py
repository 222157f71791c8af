"""The tables of a reproduction for a page of the documentation: narrow, every number from the CSV files beside it."""

from typing import Any

from tabulate import tabulate

from kvscope.reports.claims import Claim, quantity
from kvscope.reports.claims_lsa import lsa_claims
from kvscope.reports.table_1 import table_1_records
from kvscope.results.reproduction import Loaded

CLAIM_WORDS = {
    "share_mean_of_ratios": "13.5 %: mean of ratios, KV alone",
    "share_mean_of_ratios_all": "the same, keys counted",
    "share_ratio_of_means": "10.7 %: ratio of means, KV alone",
    "share_at_493k": "> 90 % saved at 493K",
    "share_at_500k": "> 90 % saved at 500K",
    "share_at_512k": "> 90 % saved at 512K",
    "gain": "+0.6 points",
    "noninferior": "loses less than a point",
    "recency_far_below": "recency far below",
    "random_far_below": "random far below",
    "mrcr_falls": "MRCR falls",
    "nothing_needed_accuracy": "nothing needed: accuracy",
    "nothing_needed_share": "nothing needed: share",
}


def page_markdown(loaded: Loaded) -> str:
    """Return the claims and Table 1 as Markdown tables of at most 100 columns."""
    claims = {claim.key: claim for claim in lsa_claims(loaded)}
    equal = {key: f"better than {key[12:-6]}, same bytes" for key in claims if key.startswith("better_than_")}
    rows = [
        [words, _paper(claims[key]), _ours(claims[key]), f"{claims[key].n:,}", claims[key].verdict]
        for key, words in (CLAIM_WORDS | equal).items()
        if key in claims and claims[key].ours is not None
    ]
    headers = ["claim", "paper", "measured", "n", "verdict"]
    parts = [
        _table(rows, headers),
        _table(_rows(loaded), ["row", "n", "dense", "lsa", "its share", "recency", "random"]),
    ]
    if loaded.plan.scaled:
        parts.insert(0, loaded.plan.scale_sentence)
    return "\n\n".join(parts) + "\n"


def _paper(claim: Claim) -> str:
    return "-" if claim.paper is None else quantity(claim.paper, claim.unit).replace(" points", "")


def _ours(claim: Claim) -> str:
    assert claim.ours is not None
    sign = "+" if claim.unit == "points" else ""
    ends = (claim.low, claim.high)
    shown = [f"{round(value, 1) + 0.0:{sign}.1f}" for value in (claim.ours, *ends) if value is not None]
    return shown[0] if len(shown) < 3 else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _rows(loaded: Loaded) -> list[list[str]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in table_1_records(loaded):
        found.setdefault(row["row"], {})[row["method"]] = row
    return [
        [
            name,
            str(methods["dense"]["n"]),
            *(_percent(methods[method].get("accuracy")) for method in ("dense", "lsa")),
            _percent(methods["lsa"].get("share")),
            *(_percent(methods[method].get("accuracy")) for method in ("recency", "random")),
        ]
        for name, methods in found.items()
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _table(rows: list[list[str]], headers: list[str]) -> str:
    made: str = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return made
