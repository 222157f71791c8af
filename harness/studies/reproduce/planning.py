"""From what a user asks for to a reproduction's plan, and the plan as text: what would be measured, and how much."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvscope.errors import UsageError, did_you_mean, shown
from kvscope.harness.passes.facts import ModelFacts, describe_model
from kvscope.harness.studies.reproduce.budgets import runs_at
from kvscope.harness.studies.reproduce.profiles import (
    DIVISORS,
    EQUAL_BYTES,
    Asked,
    lsa_cells,
    pilot_cells,
)
from kvscope.harness.studies.reproduce.running import check_cells, started
from kvscope.harness.studies.reproduce.setup import setup_cells
from kvscope.methods.lsa import printed
from kvscope.results.reproduction import CellPlan, Reproduction
from kvscope.specs import parse_spec
from kvscope.terminal import folded, grid
from kvscope.units import format_length

PROFILES, SIZES = ("lsa", "setup"), ("quick", "full")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan with what runs it.

    Attributes:
        plan: the cells.
        pilots: cells that are measured first, to size budgets.
        equal: methods that are given lsa's bytes.
        facts: of the model.
        overrides: keys of every cell's configuration.
    """

    plan: Reproduction
    pilots: tuple[CellPlan, ...]
    equal: tuple[str, ...]
    facts: ModelFacts
    overrides: Mapping[str, Any]


def make_reproduction(
    profile: str, *, size: str, model: str, lsa: str, divisor: int | None, overrides: Mapping[str, Any]
) -> Planned:
    """Return the plan of a profile, every configuration checked.

    Args:
        profile: ``lsa`` or ``setup``.
        divisor: the paper's lengths are divided by it; None: as the size has it.
        overrides: keys of every cell's configuration.

    Raises:
        UsageError: an unknown size, a method that is no lsa or brings its own window, or what ``kvscope run`` would
            refuse.
    """
    if size not in SIZES:
        raise UsageError(f"There is no profile {shown(size)}.{did_you_mean(size, SIZES)}")
    spec = parse_spec(lsa, kind="method")
    if spec.name != "lsa" or "recency_tokens" in dict(spec.options):
        raise UsageError(f"--lsa is {shown(lsa)}, expected lsa with options, its window (recency_tokens) left out.")
    facts = describe_model(
        model, device=str(overrides.get("device", "auto")), dtype=str(overrides.get("dtype", "auto"))
    )
    if facts.tokenizer is None:
        raise UsageError(f"Model {shown(model)} has random weights, so its answers mean nothing: name another model.")
    size_key = "quick" if size == "quick" else "full"
    has_gpu = facts.device != "cpu"
    asked = Asked(
        size=size_key,  # type: ignore[arg-type]
        model=model, lsa=lsa, divisor=DIVISORS[size_key] if divisor is None else divisor,  # type: ignore[index]
    )  # fmt: skip
    if profile == "lsa":
        shortest_tokens = min(row.tokens for row in printed.TABLE_1)
        if asked.divisor > shortest_tokens:
            raise UsageError(
                f"--divisor {asked.divisor:,} leaves nothing of the paper's {shortest_tokens:,} tokens: give a smaller "
                "one."
            )
        cells = lsa_cells(asked, most_tokens=facts.max_length_tokens, has_gpu=has_gpu)
        pilots = pilot_cells(cells)
        equal = tuple(name for name in EQUAL_BYTES[asked.size] if runs_at(name, facts))
    else:
        cells, pilots, equal = setup_cells(asked, facts=facts), (), ()
    if all(cell.left_out is not None for cell in cells if cell.scored):
        raise UsageError(
            f"Model {shown(model)} takes {facts.max_length_tokens:,} tokens, fewer than any row asks for: give a "
            "larger --divisor."
        )
    plan = Reproduction(
        **started(
            {
                "profile": profile, "size": asked.size, "model": model, "lsa": lsa, "divisor": asked.divisor,
                "window_tokens": asked.window_tokens, "cells": cells,
            }
        )
    )  # fmt: skip
    check_cells(plan, overrides=overrides)
    return Planned(plan=plan, pilots=pilots, equal=equal, facts=facts, overrides=overrides)


def plan_text(planned: Planned, *, width: int | None) -> str:
    """Return the cells as a table, with prompts, and with the prompt tokens that are prefilled."""
    plan = planned.plan
    rows, prompts, tokens = [], 0, 0
    for cell in (*planned.pilots, *plan.cells):
        n = cell.prompts if cell.scored else 0
        cell_tokens = n * sum(cell.lengths_tokens) // len(cell.lengths_tokens)
        if cell.left_out is None:
            prompts, tokens = prompts + n, tokens + cell_tokens
        rows.append(
            [
                cell.name,
                ", ".join(map(format_length, cell.lengths_tokens)),
                f"{n}" if cell.scored else "-",
                f"{len(cell.seeds)}",
                f"{cell_tokens / 1e6:.2f}" if cell.scored else "-",
                ", ".join([*cell.methods, *_equal_names(planned, cell)]),
                f"left out: {cell.left_out}" if cell.left_out else "",
            ]
        )
    asked_equal = EQUAL_BYTES[plan.size] if planned.pilots else ()
    left = [name for name in asked_equal if name not in planned.equal]
    headers = ["cell", "length", "prompts", "seeds", "Mtokens", "methods", ""]
    aligned = ["left", "left", "right", "right", "right", "left", "left"]
    lines = [
        f"{plan.profile}, {plan.size}: {plan.model} on {planned.facts.device}, lengths over {plan.divisor}, window of "
        f"{plan.window_tokens:,} tokens, {plan.lsa}",
        *([plan.scale_sentence] if plan.scaled and plan.profile == "lsa" else []),
        "",
        grid(rows, headers, aligned=aligned, width=width),
        "",
        f"{prompts:,} prompts, {tokens / 1e6:.1f} million prompt tokens. Each is prefilled once, for all methods.",
        *([f"Not at lsa's bytes, for they have no form on this model's cache: {', '.join(left)}."] if left else []),
    ]
    return "\n".join(folded(line, width) if "\n" not in line else line for line in lines)


def _equal_names(planned: Planned, cell: CellPlan) -> list[str]:
    sized = "recency" in cell.methods and cell.role in {pilot.role for pilot in planned.pilots}
    return [f"{name} at lsa's bytes" for name in planned.equal] if sized else []
