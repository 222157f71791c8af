"""``kvscope dsa eval``: how much of the attention an indexer's tokens hold, by length and budget, from shards alone.

Four choices of the same number of tokens: the indexer's, the oracle's (most attention, summed over heads), the last
tokens, and random ones; each with the query's own token. ``mass`` is the share of the attention they hold, ``overlap``
the share of the oracle's tokens among them. Collections that hold a sample of the tokens give estimates; one made with
``--token-samples`` above the prompt's length gives exact figures.

Shapes: R rows (recorded steps), S stored tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from kvscope.harness.engine.devices import resolve_device
from kvscope.harness.indexers.collection.reading import open_collections
from kvscope.harness.indexers.dsa.objective import (
    TokenExample,
    check_model,
    check_tokens,
    example,
    layer_scores,
    share_taken,
)
from kvscope.harness.indexers.tables import write_tables
from kvscope.methods.dsa.indexer_files import FILES
from kvscope.methods.dsa.lightning import Lightning
from kvscope.methods.indexer_files import indexer_hash
from kvscope.paths import check_out, user_path
from kvscope.units import format_length

BUDGETS_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096)
POLICIES = ("indexer", "oracle", "recency", "random")
COLUMNS = ("length_tokens", "task", "layer", "policy", "budget_tokens", "mass", "overlap", "rows")
Key = tuple[int, str, str, str, int]


def evaluate(
    folders: Sequence[str | Path],
    indexer_spec: str,
    out: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    note: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Measure an indexer on collections it was not trained on; write CSV, Markdown and JSON.

    Args:
        seed: of the random policy.

    Returns:
        The table's rows, keys as ``COLUMNS``; ``task`` and ``layer`` also "all".

    Raises:
        UsageError: the indexer belongs to another model or other layers than the collections, or these are damaged or
            hold no single tokens.
    """
    target = user_path(out, what="out")
    check_out(target)
    collections = open_collections(folders)
    check_tokens(collections)
    info = collections[0].info
    folder = FILES.folder(indexer_spec)
    indexer = FILES.load(folder).to(resolve_device(device))
    check_model(indexer.config, info, folder=str(folder))
    seen = {entry["id"] for entry in indexer.config.trained.get("data", ())}
    sums: dict[Key, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    exact = True
    for collection in collections:
        if collection.id in seen:
            note(f"note: the indexer was trained on '{collection.folder}': these figures are no test of it.")
        for index, document in enumerate(collection.documents):
            found = example((collection, index), next(indexer.parameters()).device)
            exact = exact and bool((found.weight_S == 1).all())
            draws = torch.Generator().manual_seed(seed * 1_000_003 + index)
            add_document(sums, found, indexer, length_tokens=document.length_tokens, task=document.task, draws=draws)
    rows = table_rows(sums)
    about = {
        "indexer": f"{folder.name}@{indexer_hash(folder)}",
        "layers": list(indexer.config.layers),
        "heads": indexer.config.heads,
        "key_dim": indexer.config.key_dim,
        "collections": [collection.id for collection in collections],
        "documents": sum(map(len, collections)),
        "tokens": "every one" if exact else "a sample, so estimates",
    }
    write_tables(
        target, rows, about, columns=COLUMNS, title="Attention held by the chosen tokens", summary=summary_text
    )
    return rows


@torch.inference_mode()
def add_document(
    sums: dict[Key, list[float]],
    found: TokenExample,
    indexer: Lightning,
    *,
    length_tokens: int,
    task: str,
    draws: torch.Generator,
) -> None:
    """Add one document's mass, overlap and rows, for every layer, policy and budget that leaves something out."""
    for at, layer in enumerate(indexer.config.layers):
        target = found.target_RLS[:, at]
        scores = {
            "indexer": layer_scores(indexer.layer(layer), found.query_RLM[:, at], found.key_LSM[at]),
            "oracle": target,
            "recency": found.position_S.float().expand_as(target),
            "random": torch.rand(target.shape, generator=draws).to(target.device),
        }
        for budget in BUDGETS_TOKENS:
            if budget >= found.n_tokens:
                continue
            best = share_taken(scores["oracle"], found, budget)
            n_best = (best * found.weight_S).sum(1)
            for policy, score in scores.items():
                taken = share_taken(score, found, budget)
                mass = (taken * found.weight_S * target).sum()
                overlap = ((torch.minimum(taken, best) * found.weight_S).sum(1) / n_best).sum()
                for name, where in ((task, str(layer)), (task, "all"), ("all", str(layer)), ("all", "all")):
                    entry = sums[length_tokens, name, where, policy, budget]
                    for place, value in enumerate((float(mass), float(overlap), float(len(target)))):
                        entry[place] += value


def table_rows(sums: dict[Key, list[float]]) -> list[dict[str, Any]]:
    """Return the table, sorted: lengths ascending, all tasks and all layers first."""

    def order(key: Key) -> tuple[Any, ...]:
        length, task, layer, policy, budget = key
        return (length, task != "all", task, -1 if layer == "all" else int(layer), POLICIES.index(policy), budget)

    rows = []
    for key in sorted(sums, key=order):
        mass, overlap, n = sums[key]
        values = (*key, round(mass / n, 5), round(overlap / n, 5), int(n))
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def summary_text(rows: Iterable[dict[str, Any]], *, tablefmt: str = "simple") -> str:
    """Return mass and overlap of each policy and layer by budget and length."""
    rows = [row for row in rows if row["task"] == "all"]
    lengths = sorted({row["length_tokens"] for row in rows})
    by_key = {(r["policy"], r["layer"], r["budget_tokens"], r["length_tokens"]): r for r in rows}
    layers = sorted({row["layer"] for row in rows}, key=lambda layer: -1 if layer == "all" else int(layer))
    table = []
    for policy in POLICIES:
        for layer in layers if policy in ("indexer", "oracle") else ["all"]:
            for budget in BUDGETS_TOKENS:
                cells = [_cell(by_key.get((policy, layer, budget, length))) for length in lengths]
                if any(cells):
                    table.append([policy, layer, budget, *cells])
    header = ["choice", "layer", "tokens", *(format_length(n) for n in lengths)]
    text = tabulate(table, headers=header, tablefmt=tablefmt, disable_numparse=True)
    return f"{text}\n\nEach cell: share of the attention held / of the oracle's tokens chosen."


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{row['mass']:.1%} / {row['overlap']:.0%}"
