"""The table of `v4_lsa.py`: what is asked is fixed before the first row, and how rows become accuracy, bytes, verdicts.

Three accountings, as shares of the cache's CSA entries, native indexer keys and HCA entries, windows left out as in the
paper: `paper` counts resident CSA entries and their native keys, `with_hca` the HCA entries too, `with_keys` also the
keys and states that lsa keeps to choose by. `held` is everything on the device over dense's, windows included: what
docs/results.md calls lsa's share. The paper's own figures are 13.1, 15.4 and 18.0 % in the first three
(`kvscope verify flashmemory`).
"""

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from indexers_gate import Cell, command, fix_plan, is_answered

import kvscope
from kvscope.errors import UsageError
from kvscope.harness.engine.names import resolve_model, sampled_revision
from kvscope.methods.indexer_files import indexer_hash
from kvscope.results.comparisons import SCORE_COLUMNS, answered, compare_tables, pairs, pooled
from kvscope.results.share import prompt_shares
from kvscope.units import format_length

SEED, PILOT_SEED = 320, 900
"""Below 1000, as evaluation's are; none of them chose anything."""
PILOT_SAMPLES = 2
MARGIN = 0.01
GAIN_POINTS, PAPER_PERCENT = 0.6, 13.5
PRINTED_PERCENT = {"paper": 13.1, "with_hca": 15.4, "with_keys": 18.0}
"""The paper's mean over nine rows, in the three accountings."""
ACCOUNTINGS = (*PRINTED_PERCENT, "held")
LEAST_PAIRS = 1_000
KINDS = ("csa_kv", "indexer_keys", "hca_kv", "window", "buffers")
ROWS = ("dense", "lsa_ours", "lsa_paper", "lsa_pages", "recency", "random")
SMALL_CHUNK_TOKENS = 2048
"""Tokens of a forward: eager attention masks every one of them against every entry."""


@dataclass(frozen=True)
class Plan:
    """What is asked."""

    tasks: tuple[str, ...]
    lengths_tokens: tuple[int, ...]
    samples: int

    @property
    def pairs(self) -> int:
        """Pairs of every method with dense."""
        return len(self.tasks) * len(self.lengths_tokens) * self.samples


@dataclass(frozen=True)
class Runs:
    """How a cell is run.

    Attributes:
        deadline_s: by ``time.time``; no prompt is begun after it.
        extra: more of the command line.
    """

    model: str
    device: str
    jobs: int
    deadline_s: float
    note: Callable[[str], None]
    extra: tuple[str, ...] = ()

    def answer(self, cell: Cell, folder: Path) -> str | None:
        """Answer what is missing of a cell; return why it is not whole, None where it is.

        Raises:
            UsageError: the run ended by an error.
        """
        if is_answered(cell, folder):
            return None
        left_s = self.deadline_s - time.time()
        if left_s < 1:
            return f"no time for {cell.name}"
        began_s = time.time()
        asked = command(cell, folder, model=self.model, lsa="", device=self.device, jobs=self.jobs)
        asked[-1] = f"prefill_chunk_tokens={SMALL_CHUNK_TOKENS}"
        code = subprocess.run([*asked, *self.extra, "--time-limit", f"{left_s:.0f}"], check=False).returncode
        self.note(f"{cell.name}: {cell.prompts} prompts, {time.time() - began_s:.0f} s, exit {code}")
        if is_answered(cell, folder):
            return None
        if time.time() < self.deadline_s:
            raise UsageError(f"{cell.name} ended before its prompts (exit {code}): see above.")
        return f"the time was over in {cell.name}"


def cell_of(plan: Plan, length_tokens: int, specs: Mapping[str, str], *, samples: int, seed: int) -> Cell:
    """Return the run of one length."""
    return Cell(format_length(length_tokens).lower(), plan.tasks, (length_tokens,), samples, seed,
                tuple(specs.values()))  # fmt: skip


def pilot(plan: Plan, folder: Path, *, ours: Path, run: Runs) -> dict[str, Any]:
    """Return lsa's share of dense's bytes at every length, by a few prompts."""
    shares: dict[str, float] = {}
    for length_tokens in plan.lengths_tokens:
        cell = cell_of(plan, length_tokens, {"lsa": f"lsa:indexer={ours}"}, samples=PILOT_SAMPLES, seed=PILOT_SEED)
        if why := run.answer(cell, folder):
            return {"unfinished": why}
        rows = answered(kvscope.load_run(folder / cell.name).samples)
        if rows.empty:
            raise UsageError(f"The pilot at {length_tokens:,} tokens has no answer: see '{folder / cell.name}'.")
        shares[str(length_tokens)] = round(float(prompt_shares(rows).mean()), 4)
    run.note(f"lsa's share of dense's bytes: {shares}")
    return {"shares": shares, "indexer": indexer_hash(ours)}


def pilot_shares(path: Path) -> dict[int, float]:
    """Return the shares that a pilot found.

    Raises:
        UsageError: there was none.
    """
    if not path.is_file():
        raise UsageError(f"'{path}' is missing: the step pilot comes first.")
    return {int(key): value for key, value in json.loads(path.read_text(encoding="utf-8"))["shares"].items()}


def specs_at(indexers: Mapping[str, Path], share: float) -> dict[str, str]:
    """Return the methods of one length, by the names of the table's rows."""
    return {
        "dense": "dense",
        "lsa_ours": f"lsa:indexer={indexers['ours']}",
        "lsa_paper": f"lsa:indexer={indexers['paper']}",
        "lsa_pages": f"lsa:indexer={indexers['ours']},policy=pages",
        "recency": f"recency:share={share:g}",
        "random": f"random:share={share:g}",
    }


def fill(
    plan: Plan, folder: Path, *, indexers: Mapping[str, Path], shares: Mapping[int, float], run: Runs
) -> dict[str, Any]:
    """Fix the plan, answer what is missing, and judge.

    Returns:
        The plan and the table; or ``unfinished``, why the same call has to go on.

    Raises:
        UsageError: rows of another plan, or a run that ended by an error.
    """
    where, _ = resolve_model(run.model)
    record = {
        "model_revision": sampled_revision(where, None),
        "indexers": {name: indexer_hash(path) for name, path in indexers.items()},
        **json.loads(json.dumps(asdict(plan))), "pairs": plan.pairs, "seed": SEED, "margin_points": 100 * MARGIN,
        "shares": {str(length): share for length, share in shares.items()},
    }  # fmt: skip
    fix_plan(folder, record)
    tables: dict[str, list[pd.DataFrame]] = {name: [] for name in ROWS}
    held: dict[str, list[pd.DataFrame]] = {name: [] for name in ROWS}
    not_answered = dict.fromkeys(ROWS, 0)
    for length_tokens in plan.lengths_tokens:
        specs = specs_at(indexers, shares[length_tokens])
        cell = cell_of(plan, length_tokens, specs, samples=plan.samples, seed=SEED)
        if why := run.answer(cell, folder):
            return {"unfinished": why}
        found = kvscope.load_run(folder / cell.name)
        labels = dict(zip(specs, [method.label for method in found.info.methods], strict=True))
        rows = pooled(found.samples, found.info)
        for name, label in labels.items():
            mine = rows[rows["method_label"] == label]
            not_answered[name] += int((mine["status"] != "ok").sum())
            tables[name].append(_pairs(rows, label, labels["dense"], f"{length_tokens}"))
            held[name].append(held_bytes(answered(mine), answered(rows[rows["method_label"] == labels["dense"]])))
    whole = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
    measured = {name: pd.concat(parts, ignore_index=True) for name, parts in held.items()}
    return {
        "plan": record, "enough_pairs": plan.pairs >= LEAST_PAIRS, "not_answered": not_answered,
        "accuracy": _accuracy(whole), "bytes": _bytes(measured), "claims": _claims(whole, measured),
    }  # fmt: skip


def _pairs(rows: pd.DataFrame, label: str, dense: str, cell: str) -> pd.DataFrame:
    if label == dense:
        found = pairs(rows[SCORE_COLUMNS], method=dense, baseline=dense)
    else:
        found = pairs(rows[SCORE_COLUMNS], method=label, baseline=dense)
    # Contexts are named within a run.
    found["context_id"] = [None if pd.isna(each) else f"{cell} {each}" for each in found["context_id"]]
    return found


def held_bytes(rows: pd.DataFrame, dense: pd.DataFrame) -> pd.DataFrame:
    """Return bytes by kind and shares of every prompt that a method and dense answered.

    What is chosen counts by its mean over the refreshes, the rest as it is behind the last step.

    Args:
        rows, dense: answered rows of the method and of dense.

    Raises:
        UsageError: rows without bytes by kind: the model keeps no compressed entries.
    """
    keys = ["task", "length_tokens", "sample"]
    both = rows.merge(dense[[*keys, "kv_bytes_by_kind"]], on=keys, suffixes=("", "_dense"))
    found = []
    for row in both.to_dict("records"):
        kinds, whole = row["kv_bytes_by_kind"], row["kv_bytes_by_kind_dense"]
        if not isinstance(kinds, Mapping) or not isinstance(whole, Mapping):
            raise UsageError("The rows have no bytes by kind: give a model with compressed entries.")
        full = sum(whole[kind] for kind in ("csa_kv", "indexer_keys", "hca_kv"))
        mean = _mean_over_last(row["residency"])
        kinds = {**kinds, "csa_kv": mean * kinds["csa_kv"], "indexer_keys": mean * kinds["indexer_keys"]}
        chosen = kinds["csa_kv"] + kinds["indexer_keys"]
        shares = {
            "paper": chosen / full,
            "with_hca": (chosen + kinds["hca_kv"]) / full,
            "with_keys": (chosen + kinds["hca_kv"] + row["metadata_bytes"]) / full,
            "held": (row["resident_kv_bytes"] + row["metadata_bytes"]) / row["dense_kv_bytes"],
        }
        own = {"choosing": row["metadata_bytes"], "host": row["host_kv_bytes"]}
        found.append({**{key: row[key] for key in keys}, **shares, **kinds, **own})
    columns = [*keys, *ACCOUNTINGS, *KINDS, "choosing", "host"]
    return pd.DataFrame(found, columns=columns)


def _mean_over_last(residency: Any) -> float:
    """Return the mean of a choice's size over the refreshes, as a share of the last; 1 where nothing is chosen."""
    if not isinstance(residency, Mapping):
        return 1.0
    tokens = list(residency["resident_tokens"])
    return float(sum(tokens) / len(tokens) / tokens[-1]) if tokens and tokens[-1] else 1.0


def _accuracy(tables: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, Any]]:
    """Scope -> row -> accuracy, difference to dense, interval and verdict; Holm's correction runs within a scope."""
    others = {name: each for name, each in tables.items() if name != "dense"}
    first = tables["dense"]
    lengths, tasks = sorted(first["length_tokens"].unique()), sorted(first["task"].unique())
    found: dict[str, dict[str, Any]] = {}
    baselines = dict.fromkeys(others, "dense")
    for each in compare_tables(others, baselines=baselines, lengths=lengths, tasks=tasks, margin=MARGIN):
        change = each.paired.difference
        found.setdefault(each.scope, {})[each.method_label] = {
            "n": each.paired.n_pairs, "contexts": each.paired.n_clusters,
            "dense_percent": round(100 * each.baseline_mean, 2), "percent": round(100 * each.method_mean, 2),
            "points": round(100 * change.mean, 3),
            "interval_95_points": [None if end is None else round(100 * end, 3) for end in (change.low, change.high)],
            "interval_kind": change.kind, "lost": each.paired.lost, "won": each.paired.won,
            "difference": each.verdict, "noninferiority": each.paired.noninferiority.verdict,
            "equivalence": each.paired.equivalence.verdict,
        }  # fmt: skip
    return found


def _bytes(measured: Mapping[str, pd.DataFrame]) -> dict[str, dict[str, dict[str, float]]]:
    """Row -> scope (all prompts, each length) -> means: bytes by kind, and shares in percent."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, rows in measured.items():
        scopes = {"all prompts": rows}
        scopes |= {
            f"{length} tokens": rows[rows["length_tokens"] == length] for length in rows["length_tokens"].unique()
        }
        found[name] = {
            scope: {
                **{f"{kind}_bytes": round(float(each[kind].mean())) for kind in (*KINDS, "choosing", "host")},
                **{f"{share}_percent": round(100 * float(each[share].mean()), 2) for share in ACCOUNTINGS},
            }
            for scope, each in scopes.items()
            if len(each)
        }
    return found


def _claims(tables: Mapping[str, pd.DataFrame], measured: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Return the paper's two claims beside what was measured, for each row of lsa."""
    accuracy = _accuracy(tables).get("all prompts", {})
    found = {}
    for name in ("lsa_ours", "lsa_paper", "lsa_pages"):
        shares = {each: round(100 * float(measured[name][each].mean()), 2) for each in ACCOUNTINGS}
        row = accuracy.get(name, {})
        low, high = row.get("interval_95_points", (None, None))
        found[name] = {
            **{f"{each}_percent": value for each, value in shares.items()},
            **{f"{each}_within_{PAPER_PERCENT}": value <= PAPER_PERCENT for each, value in shares.items()},
            f"interval_holds_plus_{GAIN_POINTS}": None if low is None else bool(low <= GAIN_POINTS <= high),
            "rises": None if low is None else bool(low > 0), "falls": None if high is None else bool(high < 0),
        }  # fmt: skip
    return found
