"""Packing of the reference results: measured pieces, and parts packed before, into one packed run a cell."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reference_cells import Cell, is_done, used_minutes

from kvscope.errors import UsageError
from kvscope.methods.registry import create_method
from kvscope.results.merge import Piece, merge_pieces
from kvscope.results.packed import Rows, is_packed, write_packed
from kvscope.results.run_schema import RunInfo, RunPart
from kvscope.results.store import RUN_FILE, RunStore

MAX_PACKED_BYTES = 5_000_000
SUMMARY_FILE = "cells.json"


def pack_cells(cells: Sequence[Cell], work: Path, out: Path, *, unfinished: str | None = None) -> list[str]:
    """Pack every cell whose pieces are all done; return the names of those that are not.

    Args:
        work: where pieces were measured.
        out: where packed cells go, and where carried parts come from; what cells.json says of others there stays.
        unfinished: why pieces that are not done are packed all the same, with the prompts that every method has a row
            of; None: they are not.

    Raises:
        UsageError: pieces do not belong together, a carried part is not there, rows packed before would be lost, or
            the packed files are larger than may be committed.
    """
    missing = []
    summary = {entry["name"]: entry for entry in _summary(out) if is_packed(out / entry["name"])}
    for cell in cells:
        pieces, not_measured = _pieces(cell, work, out, unfinished)
        if not pieces or (not_measured and unfinished is None):
            missing.append(cell.name)
            continue
        info, rows = merge_pieces(pieces)
        _refuse_loss(out / cell.name, rows)
        write_packed(out / cell.name, info, rows)
        summary[cell.name] = _entry(cell, work, info, rows, n_pieces=_measured(pieces), not_measured=not_measured)
        gone = {part["carried"] for part in cell.parts if "carried" in part} - {each.name for each in cells}
        for name in gone:
            if is_packed(out / name):
                print(f"{cell.name} holds the carried parts of {name} now: remove {out / name} after a look at both.")
    out.mkdir(parents=True, exist_ok=True)
    (out / SUMMARY_FILE).write_text(json.dumps(list(summary.values()), indent=2) + "\n", encoding="utf-8")
    size_bytes = sum(
        path.stat().st_size for path in out.rglob("*") if path.is_file() and "report" not in path.relative_to(out).parts
    )
    print(f"{len(summary)} cells in {out}, {size_bytes:,} bytes")
    if size_bytes > MAX_PACKED_BYTES:
        raise UsageError(f"{out} takes {size_bytes:,} bytes, more than the {MAX_PACKED_BYTES:,} that are committed.")
    return missing


def _n_rows(piece: Piece) -> int:
    rows = piece.rows
    return sum(map(len, (rows.samples, rows.footprints, rows.max_contexts, rows.throughputs)))


def _measured(pieces: Sequence[Piece]) -> int:
    return sum(not piece.info.parts for piece in pieces)


def _pieces(cell: Cell, work: Path, out: Path, unfinished: str | None) -> tuple[list[Piece], list[dict[str, Any]]]:
    """Return what there is of a cell, in the order of its parts, and the parts of which pieces are missing."""
    there: list[Piece] = []
    not_measured: list[dict[str, Any]] = []
    for index, (part, asked) in enumerate(zip(cell.parts, cell.prompts(), strict=True)):
        if "carried" in part:
            carried = _carried(cell, part, out, asked=asked)
            if carried is not None:
                there.append(carried)
                continue
            config = cell.config(part, cell.seeds_of(part)[0])
            tasks, lengths = config.task_labels, config.lengths_tokens
            if unfinished is None:
                raise UsageError(
                    f"Cell {cell.name} carries {', '.join(tasks)} at {', '.join(map(str, lengths))} tokens over from "
                    f"{part['carried']}, but neither {out / cell.name} nor {out / part['carried']} holds such rows: "
                    "restore that folder, or take `carried` away to measure them."
                )
            left = {"tasks": list(tasks), "lengths_tokens": list(lengths), "carried": part["carried"]}
            not_measured.append({**left, "reason": unfinished})
            continue
        found = cell.part_pieces(index)
        undone = [name for name, config in found if not is_done(work / cell.name / name, config)]
        begun = [name for name, _ in found if (work / cell.name / name / RUN_FILE).exists()]
        if undone:
            tasks, lengths = found[0][1].task_labels, found[0][1].lengths_tokens
            left = {"tasks": list(tasks), "lengths_tokens": list(lengths), "pieces_not_done": len(undone)}
            not_measured.append({**left, "pieces": len(found), "reason": unfinished})
        for name in begun if unfinished is not None else [name for name, _ in found if name not in undone]:
            store = RunStore.open(work / cell.name / name)
            piece = Piece(
                name=f"{cell.name}/{name}",
                info=store.info,
                rows=store.rows(),
                command=cell.command(part) if store.info.tasks else None,
                fewer=part.get("fewer"),
                asked_samples=asked,
                unfinished=unfinished if undone else None,
            )
            # Without prompts every row stands for itself; one that was not measured is missing, and said to be.
            if store.info.tasks or name not in undone or _n_rows(piece):
                there.append(piece)
    return there, not_measured


def _carried(cell: Cell, part: dict[str, Any], out: Path, *, asked: int) -> Piece | None:
    """Return a part that was packed before, from this cell's own pack or from the one named; None: neither has it."""
    config = cell.config(part, cell.seeds_of(part)[0])
    seeds = set(cell.seeds_of(part))
    tasks, lengths = config.task_labels, config.lengths_tokens
    for folder in (out / cell.name, out / part["carried"]):
        if not is_packed(folder):
            continue
        store = RunStore.open(folder)
        wanted = [create_method(spec).label for spec in config.methods]
        info = _with_methods(store.info, wanted, asked=config.method_labels)
        rows = [
            row
            for row in store.samples()
            if row.task in tasks and row.length_tokens in lengths and row.seed in seeds and row.method_label in wanted
        ]
        if rows:
            held = info.parts or (RunPart(tasks=info.tasks, lengths_tokens=info.lengths_tokens, samples=info.samples),)
            parts = tuple(
                _narrowed(each, tasks, lengths).model_copy(
                    update={"command": each.command or cell.command(part), "fewer": each.fewer or part.get("fewer")}
                )
                for each in held
                if any(each.holds(row.task, row.length_tokens, row.seed) for row in rows)
            )
            name = f"{folder.name} (packed): {', '.join(tasks)} at {', '.join(map(str, lengths))} tokens"
            lacking = sorted(set(wanted) - {row.method_label for row in rows})
            if lacking:
                raise UsageError(
                    f"{name}: it holds no rows of {', '.join(lacking)}, which cell {cell.name} asks for. Take "
                    "`carried` away to measure the part."
                )
            if sum(each.samples for each in parts) != asked:
                raise UsageError(
                    f"{name}: the cell list says {asked} prompts a cell, which it was not asked for. Mend it."
                )
            info = info.model_copy(update={"tasks": tasks, "lengths_tokens": lengths, "parts": parts})
            return Piece(name=name, info=info, rows=Rows(samples=rows))
    return None


def _with_methods(info: RunInfo, labels: Sequence[str], *, asked: Sequence[str]) -> RunInfo:
    """Return a run as if it had been asked for some of its methods: rows of one method do not depend on the others.

    Args:
        labels: the methods' own labels, as rows have them.
        asked: the same as a configuration writes them.
    """
    held = {method.label: method for method in info.methods}
    if not set(labels) < set(held):
        return info
    return info.model_copy(
        update={
            "methods": tuple(held[label] for label in labels),
            "identity": {**info.identity, "methods": list(asked)},
            "plan": tuple(cell for cell in info.plan if cell.method_label in labels),
        }
    )


def _narrowed(part: RunPart, tasks: Sequence[str], lengths: Sequence[int]) -> RunPart:
    return part.model_copy(
        update={
            "tasks": tuple(task for task in part.tasks if task in tasks),
            "lengths_tokens": tuple(length for length in part.lengths_tokens if length in lengths),
        }
    )


def _refuse_loss(folder: Path, rows: Rows) -> None:
    """Refuse to replace a pack by one that lacks prompts which it holds."""
    if not is_packed(folder):
        return
    new = {(row.task, row.length_tokens, row.prompt_sha256, row.method_label) for row in rows.samples}
    lost = [
        row
        for row in RunStore.open(folder).samples()
        if (row.task, row.length_tokens, row.prompt_sha256, row.method_label) not in new
    ]
    if lost:
        raise UsageError(
            f"{folder} holds {len(lost)} rows that this pack lacks (the first: {lost[0].method_label} on "
            f"{lost[0].task} at {lost[0].length_tokens} tokens, seed {lost[0].seed}). Mark their part `carried` in the "
            "cell list, or remove the folder to replace it."
        )


def _entry(
    cell: Cell, work: Path, info: RunInfo, rows: Rows, *, n_pieces: int, not_measured: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return what cells.json says of a packed cell."""
    carried_minutes = sum(float(item.get("used_gpu_minutes") or 0) for item in cell.carried)
    parts = [
        {
            "tasks": list(part.tasks),
            "lengths_tokens": list(part.lengths_tokens),
            "n": part.samples,
            "seeds": _ranges(part.seeds),
            "commit": part.commit,
            **({"fewer": part.fewer} if part.fewer else {}),
            **({"cut": [cut.model_dump() for cut in part.cut]} if part.cut else {}),
        }
        for part in info.parts
    ]
    return {
        "name": cell.name,
        "planned_gpu_minutes": cell.planned_gpu_minutes,
        "used_gpu_minutes": round(carried_minutes + used_minutes(work, cell), 2),
        "pieces": n_pieces,
        "rows": sum(map(len, (rows.samples, rows.footprints, rows.max_contexts, rows.throughputs))),
        "device": info.environment.get("gpu") or "CPU",
        **({"parts": parts} if parts else {}),
        **({"carried": list(cell.carried)} if cell.carried else {}),
        **({"not_measured": not_measured} if not_measured else {}),
    }


def _ranges(seeds: Sequence[int]) -> str:
    """Write seeds as ``0-15`` or ``0-7, 9``."""
    texts, ordered = [], sorted(seeds)
    while ordered:
        first = ordered[0]
        run = [seed for place, seed in enumerate(ordered) if seed == first + place]
        texts.append(str(first) if len(run) == 1 else f"{first}-{run[-1]}")
        ordered = ordered[len(run) :]
    return ", ".join(texts)


def _summary(out: Path) -> list[dict[str, Any]]:
    path = out / SUMMARY_FILE
    try:
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise UsageError(f"{path} is corrupt: {error}. Restore it from its source.") from error
    return found
