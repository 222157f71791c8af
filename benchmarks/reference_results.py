"""The committed reference results: run them in pieces, then pack them into ``results/reference/h100``.

    python benchmarks/reference_results.py plan                                # cells, pieces, planned minutes
    python benchmarks/reference_results.py run --work runs/reference --jobs 8  # to the end; the same command goes on
    python benchmarks/reference_results.py pack --work runs/reference --out results/reference/h100
    kvscope report results/reference/h100

A piece is one ``kvscope run`` of a cell under one seed, in a folder of its own: it resumes by itself, so a limit or a
kill loses at most the row that was being measured. What each took is noted as it ends. Pieces of accuracy may share the
GPU (``--jobs``: a small model alone leaves most of it idle); those of memory and time run alone.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvscope.harness.config import RunConfig, make_config
from kvscope.harness.footprint import worker_environment
from kvscope.results.errors import KvscopeError, UsageError
from kvscope.results.packed import merge_pieces, write_packed
from kvscope.results.store import RUN_FILE, RunStore

CELLS_FILE = Path(__file__).parent / "reference_cells.yaml"
MAX_PACKED_BYTES = 5_000_000
USED_FILE = "used.jsonl"
#: A piece is not begun with less time than this left: its process would hardly come to measure anything.
LEAST_PIECE_S = 30.0


@dataclass(frozen=True)
class Cell:
    """One run folder of the result, and the pieces it is measured in.

    Attributes:
        seeds: pieces of each part.
        parts: what each part asks for in place of ``run``'s keys, and, under ``seeds``, its own number of pieces: long
            prompts get fewer than short ones, and one table. A part with fewer than 200 prompts a cell (50 past 128K)
            says why under ``fewer``.
    """

    name: str
    planned_gpu_minutes: float
    seeds: int
    run: dict[str, Any]
    parts: Sequence[dict[str, Any]] = ({},)

    def n_seeds(self, part: dict[str, Any]) -> int:
        """Return the pieces of a part."""
        return int(part.get("seeds", self.seeds))

    def prompts(self) -> list[int]:
        """Return how many prompts a (task, length) of each part has."""
        first = [config for name, config in self.pieces() if name.endswith("seed-0")]
        return [self.n_seeds(part) * config.samples for part, config in zip(self.parts, first, strict=True)]

    def pieces(self) -> list[tuple[str, RunConfig]]:
        """Return the name and the checked configuration of every piece."""
        found = []
        for i, part in enumerate(self.parts):
            values = {**self.run, **{key: value for key, value in part.items() if key not in ("seeds", "fewer")}}
            for seed in range(self.n_seeds(part)):
                name = f"seed-{seed}" if len(self.parts) == 1 else f"part-{i}-seed-{seed}"
                found.append((name, make_config({**values, "seed": seed}, source=f"cell {self.name}")))
        return found


def read_cells(path: Path, only: Sequence[str] = ()) -> list[Cell]:
    """Read the cell list.

    Raises:
        UsageError: it is missing or malformed, or a name in ``only`` is not in it.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))["cells"]
        cells = [Cell(**item) for item in found]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not a list of cells: {error}.") from error
    unknown = sorted(set(only) - {cell.name for cell in cells})
    if unknown:
        raise UsageError(f"There is no cell {unknown[0]!r} in {path.name}: {', '.join(cell.name for cell in cells)}.")
    return [cell for cell in cells if not only or cell.name in only]


def is_done(folder: Path, config: RunConfig) -> bool:
    """Whether a piece has every row it asks for, measured or not."""
    if not (folder / RUN_FILE).exists():
        return False
    store = RunStore.open(folder)
    if config.find_max:
        return len(store.max_contexts()) == len(config.methods)
    if config.throughput:
        return len(store.throughputs()) == len(config.methods) * len(config.lengths_tokens)
    samples = len(config.tasks) * len(config.lengths_tokens) * config.samples * len(config.methods)
    footprints = len(config.footprint_cells_tokens) * len(config.methods)
    return len(store.samples()) == samples and len(store.footprints()) == footprints


def is_shared(config: RunConfig) -> bool:
    """Whether a piece may run beside others: it measures answers, neither memory nor time."""
    return not config.unscored and not config.footprint


def run_piece(
    folder: Path, config: RunConfig, *, limit_s: float | None, jobs: float = 1, gpu: int | None = None
) -> None:
    """Run or continue one piece in a process of its own, and note what it took.

    Args:
        jobs: how many such processes share a GPU; each counts for its part of the time.
        gpu: the one to run on; None: as this process sees them.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    values = config.model_dump(mode="json", exclude_unset=True)
    environment = worker_environment()
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // round(jobs)))
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    started_s = time.monotonic()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(values, file)
        file.flush()
        limit = [] if limit_s is None else ["--time-limit", f"{limit_s:.0f}"]
        command = [sys.executable, "-m", "kvscope.cli", "run", file.name, "--quiet", "--out", str(folder), *limit]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - started_s
    note = {"piece": folder.name, "seconds": round(seconds / jobs, 1), "jobs": jobs, "exit_code": done.returncode}
    with (folder.parent / USED_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(note) + "\n")
    if done.returncode not in (0, 1):
        raise UsageError(
            f"{folder.parent.name}/{folder.name} ended with {done.returncode}: {done.stderr.strip()[-600:]}"
        )


def used_minutes(work: Path, cell: Cell) -> float:
    """Return the minutes of the GPU that a cell took so far; processes that shared it count for their part."""
    path = work / cell.name / USED_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return round(sum(json.loads(line)["seconds"] for line in lines) / 60, 2)


def run_cells(cells: Sequence[Cell], work: Path, *, limit_s: float | None, jobs: int, gpus: int = 1) -> bool:
    """Run pieces in order until all are done or the time is over; return whether all are.

    Args:
        jobs: pieces of accuracy that run at once; those that measure memory or time always run alone.
        gpus: how many GPUs the pieces of accuracy are dealt out over.
    """
    started_s = time.monotonic()
    pending = [
        (cell, name, config)
        for cell in cells
        for name, config in cell.pieces()
        if not is_done(work / cell.name / name, config)
    ]

    free_gpus: queue.SimpleQueue[int] = queue.SimpleQueue()

    def run_one(cell: Cell, name: str, config: RunConfig, n_jobs: float, gpu: int | None = None) -> bool:
        folder = work / cell.name / name
        left_s = None if limit_s is None else limit_s - (time.monotonic() - started_s)
        if left_s is not None and left_s < LEAST_PIECE_S:
            print(f"stopped before {cell.name} {name}: the same command continues", flush=True)
            return False
        run_piece(folder, config, limit_s=left_s, jobs=n_jobs, gpu=gpu)
        done = is_done(folder, config)
        used = f"{used_minutes(work, cell)} of {cell.planned_gpu_minutes} min used"
        print(f"{cell.name} {name}: {'done' if done else 'unfinished'}, {used}", flush=True)
        return done

    shared = [piece for piece in pending if is_shared(piece[2])]
    n_jobs = max(1, min(jobs, len(shared)))
    for slot in range(n_jobs):
        free_gpus.put(slot % gpus)

    def run_shared(piece: tuple[Cell, str, RunConfig]) -> bool:
        gpu = free_gpus.get()
        try:
            return run_one(*piece, max(1, n_jobs / gpus), gpu if gpus > 1 else None)
        finally:
            free_gpus.put(gpu)

    with ThreadPoolExecutor(n_jobs) as pool:
        states = list(pool.map(run_shared, shared))
    states += [run_one(*piece, 1) for piece in pending if not is_shared(piece[2])]
    return all(states)


def pack_cells(cells: Sequence[Cell], work: Path, out: Path) -> list[str]:
    """Pack every cell whose pieces are all done; return the names of those that are not.

    Raises:
        UsageError: the packed files are larger than may be committed.
    """
    missing, summary = [], []
    for cell in cells:
        pieces = [(work / cell.name / name, config) for name, config in cell.pieces()]
        if not all(is_done(folder, config) for folder, config in pieces):
            missing.append(cell.name)
            continue
        stores = [RunStore.open(folder) for folder, _ in pieces]
        info, rows = merge_pieces([(store.info, store.rows()) for store in stores])
        write_packed(out / cell.name, info, rows)
        summary.append(
            {
                "name": cell.name,
                "planned_gpu_minutes": cell.planned_gpu_minutes,
                "used_gpu_minutes": used_minutes(work, cell),
                "pieces": len(pieces),
                "fewer": [part["fewer"] for part in cell.parts if "fewer" in part],
                "rows": sum(map(len, (rows.samples, rows.footprints, rows.max_contexts, rows.throughputs))),
                "device": info.environment.get("gpu") or "CPU",
            }
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "cells.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    size_bytes = sum(
        path.stat().st_size for path in out.rglob("*") if path.is_file() and "report" not in path.relative_to(out).parts
    )
    print(f"{len(summary)} cells in {out}, {size_bytes:,} bytes")
    if size_bytes > MAX_PACKED_BYTES:
        raise UsageError(f"{out} takes {size_bytes:,} bytes, more than the {MAX_PACKED_BYTES:,} that are committed.")
    return missing


def plan_text(cells: Sequence[Cell], work: Path | None) -> str:
    """Return the cells with their pieces and minutes; every configuration is checked."""
    lines = []
    for cell in cells:
        pieces = cell.pieces()
        config = pieces[0][1]
        counts = sorted(set(cell.prompts()))
        what = "find-max" if config.find_max else "throughput" if config.throughput else ""
        what = what or ("footprint" if config.unscored else f"accuracy, n = {' and '.join(map(str, counts))}")
        used = "" if work is None else f", {used_minutes(work, cell)} used"
        lines.append(
            f"{cell.name:<34} {what:<18} {len(pieces)} piece(s), {len(config.methods)} methods, "
            f"{cell.planned_gpu_minutes} min planned{used}"
        )
    total = sum(cell.planned_gpu_minutes for cell in cells)
    return "\n".join([*lines, f"{total:g} GPU-minutes planned in all"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, do, say; 0 done, 1 something is still to be measured, 2 usage."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("action", choices=("plan", "run", "pack"))
    parser.add_argument("--cells", type=Path, default=CELLS_FILE, help="the cell list")
    parser.add_argument("--cell", action="append", default=[], metavar="NAME", help="only this one; repeatable")
    parser.add_argument("--work", type=Path, default=None, help="where pieces are measured")
    parser.add_argument("--out", type=Path, default=None, help="where packed results go")
    parser.add_argument("--jobs", type=int, default=1, help="pieces of accuracy that share the GPU")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that these pieces are dealt out over")
    parser.add_argument("--limit-s", type=float, default=None, help="stop after this time")
    options = parser.parse_args(arguments)
    try:
        cells = read_cells(options.cells, options.cell)
        if options.action == "plan":
            print(plan_text(cells, options.work))
            return 0
        if options.work is None:
            raise UsageError("Say where the pieces are: --work DIR.")
        if options.action == "run":
            return (
                0
                if run_cells(cells, options.work, limit_s=options.limit_s, jobs=options.jobs, gpus=options.gpus)
                else 1
            )
        if options.out is None:
            raise UsageError("Say where the packed results go: --out DIR.")
        missing = pack_cells(cells, options.work, options.out)
    except KvscopeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if missing:
        print(f"not packed, still to be measured: {', '.join(missing)}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
