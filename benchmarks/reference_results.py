"""The committed reference results: run them in pieces, then pack them into ``results/reference/h100``.

    python benchmarks/reference_results.py plan                                # cells, pieces, planned minutes
    python benchmarks/reference_results.py run --work runs/reference --jobs 15 --mps  # the same command goes on
    python benchmarks/reference_results.py pack --work runs/reference --out results/reference/h100
    kvscope report results/reference/h100

A piece is one ``kvscope run`` of a cell under one seed, in a folder of its own: it resumes by itself, so a limit or a
kill loses at most the row that was being measured. What each took is noted as it ends. Pieces of accuracy may share the
GPU (``--jobs``: a small model alone leaves most of it idle; ``--mps`` lets their kernels run side by side); those of
memory and time run alone.

Parts that the cell list marks ``carried`` are not measured: ``pack`` takes their rows, and the record of what measured
them, from what was packed before.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import yaml
from reference_cells import CELLS_FILE, USED_FILE, Cell, is_done, read_cells, used_minutes
from reference_pack import pack_cells

from kvscope.errors import KvscopeError, UsageError
from kvscope.harness.passes.config import RunConfig
from kvscope.harness.passes.mps import multi_process_service
from kvscope.harness.passes.process import worker_environment

#: A piece is not begun with less time than this left: its process would hardly come to measure anything.
LEAST_PIECE_S = 30.0


def is_shared(config: RunConfig) -> bool:
    """Whether a piece may run beside others: it measures answers, neither memory nor time."""
    return not config.unscored and not config.footprint


def run_piece(
    folder: Path,
    config: RunConfig,
    *,
    limit_s: float | None,
    jobs: float = 1,
    gpu: int | None = None,
    clients: Mapping[str, str] | None = None,
) -> None:
    """Run or continue one piece in a process of its own, and note what it took.

    Args:
        jobs: how many such processes share a GPU; each counts for its part of the time.
        gpu: the one to run on; None: as this process sees them.
        clients: what makes it a client of the Multi-Process Service; None: it is none.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    values = config.model_dump(mode="json", exclude_unset=True)
    environment = {**worker_environment(), **(clients or {})}
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // round(jobs)))
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    started_s = time.monotonic()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        yaml.safe_dump(values, file)
        file.flush()
        limit = [] if limit_s is None else ["--time-limit", f"{limit_s:.0f}"]
        command = [
            sys.executable,
            "-m",
            "kvscope.cli",
            "run",
            file.name,
            "--quiet",
            "--no-report",
            "--out",
            str(folder),
        ]
        command += limit
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.monotonic() - started_s
    note = {"piece": folder.name, "seconds": round(seconds / jobs, 1), "jobs": jobs, "exit_code": done.returncode}
    if clients:
        note["mps"] = True
    with (folder.parent / USED_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(note) + "\n")
    if done.returncode not in (0, 1):
        raise UsageError(
            f"{folder.parent.name}/{folder.name} ended with {done.returncode}: {done.stderr.strip()[-600:]}"
        )


def run_cells(
    cells: Sequence[Cell], work: Path, *, limit_s: float | None, jobs: int, gpus: int = 1, mps: bool = False
) -> bool:
    """Run pieces in order until all are done or the time is over; return whether all are.

    Args:
        jobs: pieces of accuracy that run at once; those that measure memory or time always run alone.
        gpus: how many GPUs the pieces of accuracy are dealt out over.
        mps: whether pieces of accuracy share them through the Multi-Process Service, which ends before the others run.

    Raises:
        UsageError: a piece failed, or the service cannot be had.
    """
    started_s = time.monotonic()
    pending = [
        (cell, name, config)
        for cell in cells
        for name, config in cell.pieces()
        if not is_done(work / cell.name / name, config)
    ]

    free_gpus: queue.SimpleQueue[int] = queue.SimpleQueue()

    def run_one(
        cell: Cell,
        name: str,
        config: RunConfig,
        n_jobs: float,
        gpu: int | None = None,
        clients: Mapping[str, str] | None = None,
    ) -> bool:
        folder = work / cell.name / name
        left_s = None if limit_s is None else limit_s - (time.monotonic() - started_s)
        if left_s is not None and left_s < LEAST_PIECE_S:
            print(f"stopped before {cell.name} {name}: the same command continues", flush=True)
            return False
        run_piece(folder, config, limit_s=left_s, jobs=n_jobs, gpu=gpu, clients=clients)
        done = is_done(folder, config)
        used = f"{used_minutes(work, cell)} of {cell.planned_gpu_minutes} min used"
        print(f"{cell.name} {name}: {'done' if done else 'unfinished'}, {used}", flush=True)
        return done

    shared = [piece for piece in pending if is_shared(piece[2])]
    n_jobs = max(1, min(jobs, len(shared)))
    for slot in range(n_jobs):
        free_gpus.put(slot % gpus)

    with multi_process_service() if mps and shared else nullcontext(None) as clients:

        def run_shared(piece: tuple[Cell, str, RunConfig]) -> bool:
            gpu = free_gpus.get()
            try:
                return run_one(*piece, max(1, n_jobs / gpus), gpu if gpus > 1 else None, clients)
            finally:
                free_gpus.put(gpu)

        with ThreadPoolExecutor(n_jobs) as pool:
            states = list(pool.map(run_shared, shared))
    states += [run_one(*piece, 1) for piece in pending if not is_shared(piece[2])]
    return all(states)


def plan_text(cells: Sequence[Cell], work: Path | None) -> str:
    """Return the cells with their pieces and minutes; every configuration is checked."""
    lines = []
    for cell in cells:
        pieces = cell.pieces()
        config = cell.config(cell.parts[0], cell.seeds_of(cell.parts[0])[0])
        counts = sorted(set(cell.prompts()))
        what = "find-max" if config.find_max else "throughput" if config.throughput else ""
        what = what or ("footprint" if config.unscored else f"accuracy, n = {' and '.join(map(str, counts))}")
        carried = sum("carried" in part for part in cell.parts)
        used = f", {carried} of {len(cell.parts)} parts carried over" if carried else ""
        used += "" if work is None else f", {used_minutes(work, cell)} used"
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
    parser.add_argument("--mps", action="store_true", help="let these share a GPU through CUDA's Multi-Process Service")
    parser.add_argument("--limit-s", type=float, default=None, help="stop after this time")
    parser.add_argument(
        "--unfinished",
        default=None,
        metavar="REASON",
        help="pack pieces that are not done, too: prompts with a row of every method, and why the others lack",
    )
    options = parser.parse_args(arguments)
    try:
        cells = read_cells(options.cells, options.cell)
        if options.action == "plan":
            print(plan_text(cells, options.work))
            return 0
        if options.work is None:
            raise UsageError("Say where the pieces are: --work DIR.")
        if options.action == "run":
            limits = {"limit_s": options.limit_s, "jobs": options.jobs, "gpus": options.gpus, "mps": options.mps}
            return 0 if run_cells(cells, options.work, **limits) else 1
        if options.out is None:
            raise UsageError("Say where the packed results go: --out DIR.")
        missing = pack_cells(cells, options.work, options.out, unfinished=options.unfinished)
    except KvscopeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if missing:
        print(f"not packed, still to be measured: {', '.join(missing)}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
