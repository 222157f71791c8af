"""What a recipe at equal bytes has measured: what lacks, its tables, and its packed form, from which a run goes on.

A run folder is packed by whole lengths: prompts of some tasks alone would change what a pooled score is over, and a
packed prompt keeps its number, by which a later run knows what is done.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvscope.errors import UsageError
from kvscope.harness.passes.config import RunConfig
from kvscope.methods.registry import create_method
from kvscope.reports.cells import accuracy_cells
from kvscope.reports.shares import share_cells, without_share
from kvscope.results.frames import Run, load_run, records
from kvscope.results.joining import join
from kvscope.results.merge import Piece, merge_pieces
from kvscope.results.packed import Rows, is_packed, write_packed
from kvscope.results.run_schema import RunInfo
from kvscope.results.statistics import paired_difference
from kvscope.results.store import RUN_FILE, RunStore

KNOWN, UNKNOWN = "known", "unknown"
#: Where the method begins in the rows of a folder -> the folder's name.
FOLDER_OF = {"last_token": KNOWN, "question": UNKNOWN}
#: What the name of a packed folder of the runs with the question unknown ends with.
UNKNOWN_ENDING = "-question"
#: How far what a share came to may be from what was asked, of the latter.
MOST_OFF = 0.1


def amounts(config: RunConfig, run: Run | None, *, footprints: bool) -> list[dict[str, Any]]:
    """Return for every length how many rows a step asks for and how many of these are there.

    Args:
        run: what was measured; None: nothing.
        footprints: whether the step is one of memory and times, not of answers.
    """
    labels = {create_method(spec).label for spec in config.methods}  # as rows have them
    rows = None if run is None else run.footprint if footprints else run.samples
    if rows is not None:
        rows = rows[rows["method_label"].isin(labels)]
        if not footprints:
            rows = rows[rows["task"].isin(config.task_labels) & (rows["sample"] < config.samples)]
    each = len(labels) * (1 if footprints else len(config.tasks) * config.samples)
    found = {} if rows is None else rows["length_tokens"].value_counts().to_dict()
    return [{"length_tokens": n, "rows_asked": each, "rows_there": int(found.get(n, 0))} for n in config.lengths_tokens]


def whole_lengths(counts: Iterable[Mapping[str, Any]]) -> list[int]:
    """Return the lengths of which every row is there."""
    return [count["length_tokens"] for count in counts if count["rows_there"] >= count["rows_asked"]]


def begun(folder: Path) -> bool:
    """Whether a folder holds a run."""
    return (folder / RUN_FILE).exists()


def found_runs(folders: Sequence[Path], work: Path) -> dict[str, Run]:
    """Return the runs of folders, by whether the question was known when a method chose; those of `work` without any.

    Raises:
        UsageError: a folder holds no run, two are of one kind, or none has the question known.
    """
    if not folders:
        folders = [work / KNOWN, *([work / UNKNOWN] if begun(work / UNKNOWN) else [])]
    found: dict[str, Run] = {}
    for folder in folders:
        run = load_run(folder)
        kind = FOLDER_OF[str(run.info.identity.get("method_from", "last_token"))]
        if kind in found:
            raise UsageError(
                f"{found[kind].folder} and {folder} both have the question {kind}: give one of them, or go on from a "
                "packed one with `run --start`."
            )
        found[kind] = run
    if KNOWN not in found:
        raise UsageError(f"{folders[0]} has the question unknown: give the run with the question known as well.")
    return found


def tables(
    known: Run, unknown: Run | None, *, lengths: Sequence[int], question_lengths: Sequence[int]
) -> dict[str, Any]:
    """Return cells of whole lengths, shares that were missed, and what knowing the question gives where it is there."""
    known = _narrowed(known, lengths)
    cells = records(share_cells(known, accuracy_cells(known)))
    result: dict[str, Any] = {"cells": cells, "more_than_a_tenth_off": missed_shares(cells)}
    if unknown is not None and question_lengths:
        result["question"] = question_rows(known, _narrowed(unknown, question_lengths))
    return result


def missed_shares(cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the cells whose bytes are more than a tenth off what was asked for, held or read."""
    found = []
    for cell in cells:
        came_to = None if cell["asked_of"] is None else cell[f"{cell['asked_of']}_of_dense"]
        if came_to is not None and abs(came_to - cell["asked_share"]) > MOST_OFF * cell["asked_share"]:
            found.append({key: cell[key] for key in ("length_tokens", "method_label", "asked_of", "asked_share")})
            found[-1]["came_to"] = came_to
    return found


def question_rows(known: Run, unknown: Run) -> list[dict[str, Any]]:
    """Accuracy with the question unknown and known to the choice, by method and length, on the same prompts."""
    joined = join(unknown, known)
    found = []
    for (label, _), table in zip(joined.pairs, joined.tables, strict=True):
        setting, _, share = without_share(label)
        for length, rows in table.groupby("length_tokens"):
            clusters = None if rows["context_id"].isna().all() else rows["context_id"].tolist()
            paired = paired_difference(
                rows["score_method"].to_numpy(float), rows["score_baseline"].to_numpy(float), clusters=clusters
            )
            found.append(
                {
                    "length_tokens": int(length),
                    "method": setting,
                    "asked_share": share,
                    "n": len(rows),
                    "accuracy_question_unknown": float(rows["score_baseline"].mean()),
                    "accuracy_question_known": float(rows["score_method"].mean()),
                    "known_minus_unknown": paired.difference.mean,
                    "difference_low": paired.difference.low,
                    "difference_high": paired.difference.high,
                }
            )
    return sorted(found, key=lambda row: (row["length_tokens"], row["asked_share"] or 0, row["method"]))


def pack(folder: Path, out: Path, *, lengths: Sequence[int], command: str) -> int:
    """Pack the whole lengths of a run folder for keeping; return the bytes of its files.

    Args:
        command: what measured it, for its record.

    Raises:
        UsageError: no length is whole, or the pack in `out` holds rows that this one would not.
    """
    if not lengths:
        raise UsageError(f"{folder} has every row of no length yet: run it to the end of one first.")
    store = RunStore.open(folder)
    rows = Rows(
        samples=[row for row in store.samples() if row.length_tokens in lengths],
        footprints=store.footprints(),
    )
    info, rows = merge_pieces(
        [Piece(name=str(folder), info=_of_lengths(store.info, lengths), rows=rows, command=command)]
    )
    if is_packed(out):
        kept = _keys(rows)
        lost = [key for key in _keys(RunStore.open(out).rows()) if key not in kept]
        if lost:
            raise UsageError(
                f"{out} holds {len(lost)} rows that {folder} lacks (the first: {', '.join(map(str, lost[0]))}). Begin "
                f"the run from it (`run --start {out}`), or remove it to replace it."
            )
    write_packed(out, info, rows)
    return sum(path.stat().st_size for path in out.iterdir() if path.is_file())


def start_from(packed: Path, work: Path, *, tell: Callable[[str], None]) -> None:
    """Begin run folders in `work` with the rows of packed ones, unless they have begun.

    Args:
        packed: the pack with the question known; that with it unknown is looked for beside it.

    Raises:
        UsageError: it is no packed run of one seed.
    """
    beside = packed.with_name(packed.name + UNKNOWN_ENDING)
    for source, folder in ((packed, work / KNOWN), (beside, work / UNKNOWN)):
        if source == beside and not begun(beside):
            continue
        store = RunStore.open(source)
        if not is_packed(source) or [part.seeds for part in store.info.parts] != [(store.info.seed,)]:
            raise UsageError(f"{source} is no run that `equal_bytes.py pack` wrote: give that folder to --start.")
        if begun(folder):
            tell(f"{folder} has begun and goes on as it is")
            continue
        (part,) = store.info.parts
        info = store.info.model_copy(update={"parts": (), "resumptions": part.resumptions})
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        with RunStore.create(partial, info) as begins:
            begins.begin()
            begins.append_samples(store.samples())
            for row in store.footprints():
                begins.append_footprint(row)
        partial.rename(folder)
        tell(f"{folder} begins with {len(store.samples()):,} answers of {source}")


def _narrowed(run: Run, lengths: Sequence[int]) -> Run:
    """Return the run as if it had been asked for these lengths alone."""
    samples = run.samples[run.samples["length_tokens"].isin(lengths)].reset_index(drop=True)
    return replace(run, samples=samples, info=_of_lengths(run.info, lengths))


def _of_lengths(info: RunInfo, lengths: Sequence[int]) -> RunInfo:
    """Return what run.json says of some lengths; its `config` still has what was asked for."""
    timed = info.footprint_lengths_tokens
    return info.model_copy(
        update={
            "lengths_tokens": tuple(lengths),
            "identity": {**info.identity, "lengths_tokens": list(lengths)},
            "plan": tuple(cell for cell in info.plan if cell.length_tokens in {*lengths, *timed}),
        }
    )


def _keys(rows: Rows) -> dict[tuple[Any, ...], None]:
    """What tells rows apart: of answers the prompt's hash as well."""
    answers = [(row.method_label, row.task, row.length_tokens, row.sample, row.prompt_sha256) for row in rows.samples]
    return dict.fromkeys([*answers, *((row.method_label, row.length_tokens) for row in rows.footprints)])
