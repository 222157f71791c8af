"""The table of `v4_lsa.py` as Markdown."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate
from v4_lsa_table import ACCOUNTINGS, KINDS, LEAST_PAIRS, PAPER_PERCENT, PRINTED_PERCENT, ROWS

from kvscope.units import format_length


def markdown(found: Mapping[str, Any]) -> str:
    """Return the table in words."""
    plan = found["plan"]
    lengths = ", ".join(format_length(length) for length in plan["lengths_tokens"])
    lines = [
        "# LSA on the small DeepSeek-V4",
        "",
        f"{plan['pairs']:,} pairs a method were planned before the first row: {', '.join(plan['tasks'])} at {lengths}, "
        f"seed {plan['seed']}, margin {plan['margin_points']:g} point. Dense is the native top-k over all entries.",
        "",
        *([] if found["enough_pairs"] else [f"**Fewer than {LEAST_PAIRS:,} pairs: this decides nothing.**", ""]),
        "## Accuracy",
        "",
        _accuracy_text(found["accuracy"].get("all prompts", {})),
        "",
        *_by_scope(found["accuracy"]),
        "## Bytes on the device, KiB, means over prompts and steps",
        "",
        _bytes_text(found["bytes"]),
        "",
        "`paper`: resident CSA entries and native keys; `+ HCA`: HCA entries, too; `+ keys`: and what lsa keeps to "
        "choose by; all over the cache without windows. `held`: everything over dense's. "
        "The paper's own in the first three: "
        f"{', '.join(f'{value:g} %' for value in PRINTED_PERCENT.values())}.",
        "",
        "## The paper's claims",
        "",
        *_claim_lines(found["claims"]),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["interval_95_points"]
    return f"{row['points']:+.2f}" + ("" if low is None else f" [{low:+.2f}, {high:+.2f}]")


def _accuracy_text(rows: Mapping[str, Any]) -> str:
    header = ["", "n", "%", "dense %", "difference, points", "lost", "won", "within a point", "difference"]
    lines = [
        [name, row["n"], f"{row['percent']:.1f}", f"{row['dense_percent']:.1f}", _interval(row), row["lost"],
         row["won"], row["noninferiority"], row["difference"]]
        for name, row in rows.items()
    ]  # fmt: skip
    return tabulate(lines, headers=header, tablefmt="github", disable_numparse=True)


def _by_scope(accuracy: Mapping[str, Mapping[str, Any]]) -> list[str]:
    scopes = [scope for scope in accuracy if scope != "all prompts"]
    if not scopes:
        return []
    names = [name for name in ROWS if name != "dense"]
    lines = []
    for scope in scopes:
        rows = accuracy[scope]
        dense = next(iter(rows.values()))["dense_percent"]
        lines.append([scope, f"{dense:.1f}", *(_interval(rows[name]) if name in rows else "-" for name in names)])
    return [tabulate(lines, headers=["", "dense %", *names], tablefmt="github", disable_numparse=True), ""]


def _bytes_text(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    kinds = (*KINDS, "choosing", "host")
    header = ["", "", *(kind.replace("_", " ") for kind in kinds), "paper", "+ HCA", "+ keys", "held"]
    lines = [
        [name, scope, *(f"{row[f'{kind}_bytes'] / 1024:,.1f}" for kind in kinds),
         *(f"{row[f'{share}_percent']:.1f} %" for share in ACCOUNTINGS)]
        for name, scopes in found.items()
        for scope, row in scopes.items()
    ]  # fmt: skip
    return tabulate(lines, headers=header, tablefmt="github", disable_numparse=True)


def _claim_lines(claims: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, claim in claims.items():
        said = ", ".join(
            f"{share} {claim[f'{share}_percent']:.1f} %"
            + (" (holds)" if claim[f"{share}_within_{PAPER_PERCENT}"] else " (does not)")
            for share in ACCOUNTINGS
        )
        moved = "rises" if claim["rises"] else "falls" if claim["falls"] else "moves by nothing that shows"
        lines.append(f"- {name}: at most {PAPER_PERCENT:g} % of the cache: {said}. Accuracy {moved}.")
    return lines
