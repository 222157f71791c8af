"""What ``public_models.py`` measured: packed for keeping, and its figures.

    python benchmarks/public_models_result.py pack --work runs/gemma --out results/reference/CARD/gemma-3-270m
    python benchmarks/public_models_result.py result --run results/reference/CARD/gemma-3-270m \\
        --run results/reference/CARD/smollm2-135m --out benchmarks/results/public_models_CARD.json

``pack`` takes runs that are whole: no weights, and nothing of the indexer but its card. ``result`` has accuracy, the
paired difference to dense, and two shares of bytes: of all of dense's, and of those in layers that a method manages
(the model's own sliding windows are left out of both sides).
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from measure import ended, rounded, say
from public_models import BYTES_FILE, CARD_FILE, TASKS_FILE
from public_models_methods import INDEXER

from kvscope.errors import UsageError
from kvscope.files import make_folder, whole_file
from kvscope.reports.shares import without_share
from kvscope.results.comparisons import answered, cluster_names, pairs, texts_of
from kvscope.results.frames import Run, load_run, records
from kvscope.results.merge import Piece, merge_pieces
from kvscope.results.packed import write_packed
from kvscope.results.share import prompt_shares
from kvscope.results.statistics import mean_interval, paired_difference
from kvscope.results.store import RUN_FILE, RunStore

RECALL_FILE = "recall.json"
DENSE = "dense"
TIME_KEYS = (
    "method_label", "length_tokens", "tpot_s", "tpot_p10_s", "tpot_p90_s", "step_backend", "resident_kv_bytes",
    "metadata_bytes", "dense_kv_bytes", "bytes_read_per_step", "status", "reason",
)  # fmt: skip
FOOTPRINT_KEYS = (
    "method_label", "length_tokens", "sequences", "verdict", "verdict_reason", "kv_nvml_bytes", "predicted_kv_bytes",
    "resident_kv_bytes", "metadata_bytes", "dense_kv_bytes", "tpot_s", "status", "reason",
)  # fmt: skip


def run_folders(place: Path) -> list[Path]:
    """Return the runs in a folder, by name."""
    return sorted(path.parent for path in place.glob(f"*/{RUN_FILE}"))


def pack(work: Path, out: Path, *, command: str) -> None:
    """Write what is kept of a model's runs.

    Raises:
        UsageError: nothing is there, or a run lacks rows.
    """
    folders = run_folders(work)
    if not folders:
        raise UsageError(f"{work} holds no run of public_models.py.")
    make_folder(out)
    for folder in folders:
        store = RunStore.open(folder)
        piece = Piece(name=folder.name, info=store.info, rows=store.rows(), command=command)
        write_packed(out / folder.name, *merge_pieces([piece]))
        say(f"{folder.name}: {len(store.samples()):,} answers, {len(store.footprints())} footprints")
    for source in (work / TASKS_FILE, work / BYTES_FILE, work / INDEXER / CARD_FILE, work / "recall" / RECALL_FILE):
        if source.exists():
            shutil.copy(source, out / source.name)


def shares(rows: pd.DataFrame, window_bytes: int) -> dict[str, float]:
    """Return a method's bytes over dense's, mean over prompts: of all layers, and of the managed ones."""
    held = rows["resident_kv_bytes"].astype(float) + rows["metadata_bytes"].astype(float)
    managed = (held - window_bytes) / (rows["dense_kv_bytes"].astype(float) - window_bytes)
    return {"held_of_dense": float(prompt_shares(rows).mean()), "held_of_managed": float(managed.mean())}


def cell(samples: pd.DataFrame, label: str, window_bytes: int) -> dict[str, Any]:
    """Return a method's figures on the prompts that dense answered, too."""
    ok = answered(samples)
    rows = ok[ok["method_label"] == label]
    scores = mean_interval(rows["score"].to_numpy(float), clusters=_clusters(rows))
    found = {
        "method_label": label, "n": len(rows), "accuracy": scores.mean, "ci_low": scores.low, "ci_high": scores.high,
        **shares(rows, window_bytes),
        "bytes_read_per_step": float(rows["bytes_read_per_step"].astype(float).mean()),
        "not_measured": int((samples["method_label"] == label).sum()) - len(rows),
        "ties": int(rows["tie"].fillna(value=False).astype(bool).sum()),
    }  # fmt: skip
    if label != DENSE:
        table = pairs(samples, method=label, baseline=DENSE)
        paired = paired_difference(
            table["score_method"].to_numpy(float), table["score_baseline"].to_numpy(float), clusters=_clusters(table)
        )
        found |= {
            "pairs": len(table), "difference": paired.difference.mean, "difference_low": paired.difference.low,
            "difference_high": paired.difference.high, "lost": paired.lost, "won": paired.won,
        }  # fmt: skip
    return found


def _clusters(rows: pd.DataFrame) -> list[str] | None:
    texts = texts_of(rows["context_id"])
    return None if texts is None else cluster_names(texts.tolist())


def plain_label(label: str) -> str:
    """Return a label with its share in words, by which a method at the shares of several lengths is pooled."""
    setting, of, _ = without_share(label)
    return f"{setting} at its share" if of else setting


def pooled(runs: Iterable[Run], window_bytes: int) -> list[dict[str, Any]]:
    """Return what is tested, over all lengths: each at the share of its length."""
    samples = pd.concat([run.samples for run in runs], ignore_index=True)
    samples["method_label"] = samples["method_label"].map(plain_label)
    return [cell(samples, label, window_bytes) for label in samples["method_label"].unique()]


def by_length(run: Run, window_bytes: int) -> list[dict[str, Any]]:
    """Return every (length, method) of a run, and of each task of it."""
    found = []
    for length, rows in run.samples.groupby("length_tokens"):
        for label in rows["method_label"].unique():
            mine = cell(rows, label, window_bytes)
            scores = answered(rows[rows["method_label"] == label]).groupby("task")["score"].mean()
            found.append({"length_tokens": int(length), **mine, "by_task": scores.to_dict()})
    return found


def result_of(place: Path) -> dict[str, Any]:
    """Return one model's figures.

    Raises:
        UsageError: the folder has not what ``pack`` writes.
    """
    note = place / TASKS_FILE
    if not note.exists():
        raise UsageError(f"{place} has no {TASKS_FILE}: give a folder that `pack` wrote, or --work of a run.")
    tasks = json.loads(note.read_text(encoding="utf-8"))
    runs = {folder.name: load_run(folder) for folder in run_folders(place)}
    if not (place / BYTES_FILE).exists() or not runs:
        raise UsageError(f"{place} has no {BYTES_FILE} or no run yet: go on with public_models.py, step `test`.")
    all_bytes = json.loads((place / BYTES_FILE).read_text(encoding="utf-8"))
    window_bytes = all_bytes["window_bytes"]
    tested = [run for name, run in runs.items() if name.startswith("test-")]
    first = next(iter(runs.values()))
    recall = place / RECALL_FILE
    return {
        "model": first.info.model,
        "environment": first.info.environment,
        "tasks": tasks,
        "bytes": all_bytes,
        "pooled": pooled(tested, window_bytes) if tested else [],
        "test": [row for run in tested for row in by_length(run, window_bytes)],
        "compare": [
            row for name, run in runs.items() if name.startswith("compare-") for row in by_length(run, window_bytes)
        ],
        "footprint": [
            {key: row[key] for key in FOOTPRINT_KEYS}
            for name, run in runs.items() if name == "footprint" for row in records(run.footprint)
        ],
        "times": [
            {key: row[key] for key in TIME_KEYS}
            for name, run in runs.items() if name.startswith("times-") for row in records(run.footprint)
        ],
        "recall": json.loads(recall.read_text(encoding="utf-8")) if recall.exists() else None,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Pack, or write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("pack", "result"))
    parser.add_argument("--work", type=Path, help="of `pack`: what public_models.py wrote")
    parser.add_argument("--run", type=Path, action="append", metavar="FOLDER", help="of `result`: what `pack` wrote")
    parser.add_argument("--command", default="python benchmarks/public_models.py", help="of `pack`: what measured it")
    parser.add_argument("--out", type=Path, required=True, help="folder that `pack` writes, JSON that `result` writes")
    given = parser.parse_args(arguments)
    if given.do == "pack":
        if given.work is None:
            raise UsageError("Say what is to be packed: --work DIR.")
        pack(given.work, given.out, command=given.command)
        return 0
    if not given.run:
        raise UsageError("Say whose figures: --run FOLDER, repeatable.")
    result = {"benchmark": "public_models", "models": [result_of(folder) for folder in given.run]}
    with whole_file(given.out) as path:
        path.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
