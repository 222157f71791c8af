"""The one writer of a sweep in many processes, with invented rows: how many it takes a second, what memory it holds."""

import json
import os
import queue
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from large_results import make_folder

ROWS = (4_000, 20_000)
METHODS = 4
LENGTH_TOKENS = 4096


def writer_figures() -> list[dict[str, Any]]:
    """Return the figures by number of rows, each measured in a process of its own."""
    found = []
    for n_rows in ROWS:
        reader, writer = os.pipe()
        if os.fork() == 0:
            try:
                os.write(writer, json.dumps(_figures(n_rows)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as said:
            found.append(json.loads(said.read()))
        os.wait()
    return found


def _figures(n_rows: int) -> dict[str, Any]:
    """Let the real writer gather rows that stand-ins for workers say at once."""
    from kvscope.harness.passes.accuracy import AccuracyPass
    from kvscope.harness.passes.config import make_config
    from kvscope.harness.passes.deadline import Deadline
    from kvscope.harness.passes.plan import make_plan
    from kvscope.harness.passes.progress import Progress
    from kvscope.harness.passes.recording import run_info
    from kvscope.harness.passes.shards import ShardedAccuracy
    from kvscope.results.store import RunStore

    with tempfile.TemporaryDirectory() as folder:
        config = make_config(
            {
                "model": "reference",
                "methods": ["dense", "recency", "sliding_window", "random"],
                "tasks": ["niah_single_1"],
                "lengths_tokens": [LENGTH_TOKENS],
                "batch": 1,
                "samples": n_rows // METHODS,
                "footprint": False,
                "device": "cpu",
                "out": f"{folder}/run",
            }
        )
        plan = make_plan(config)
        with RunStore.create(f"{folder}/run", run_info(plan)) as store:
            said: Any = queue.Queue()
            sync, synced_s = os.fsync, [0.0]

            def timed(fd: int) -> None:
                begin_s = time.perf_counter()
                sync(fd)
                synced_s[0] += time.perf_counter() - begin_s

            os.fsync = timed  # type: ignore[assignment]
            sweep = ShardedAccuracy(plan, store, Progress(), AccuracyPass().cells(plan), _Pool(said), said)
            before_kib = _resident_kib()
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            sweep.run(Deadline())
            cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
            grown_kib = _resident_kib() - before_kib
            assert len(store.samples()) == n_rows
        size = Path(folder, "run", "samples.jsonl").stat().st_size
    return {
        "rows": n_rows, "cpu_ms_per_row": round(1e3 * cpu_s / n_rows, 4),
        "wall_ms_per_row": round(1e3 * wall_s / n_rows, 4), "fsync_ms_per_row": round(1e3 * synced_s[0] / n_rows, 4),
        "resident_kib_per_row": round(grown_kib / n_rows, 3), "file_bytes_per_row": round(size / n_rows),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }  # fmt: skip


def _resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


class _Pool:
    """One stand-in for a worker, which answers a shard at once with rows like the first that a real one gave."""

    n_workers, tick_s = 1, None

    def __init__(self, said: Any) -> None:
        self._said, self._row = said, _invented_row()
        self.started = False

    def fill(self, most: int) -> Sequence[Any]:
        """Start the one, once."""
        if self.started or most < 1:
            return []
        self.started = True
        self._worker = _Stub(self._give)
        self._said.put((self._worker, '{"ready": true}\n'))
        return [self._worker]

    def _give(self, text: str | None) -> None:
        if text is None:
            self._said.put((self._worker, None))
            return
        shard = json.loads(text)
        for index, labels in shard["prompts"]:
            for label in labels:
                row = {**self._row, "sample": index, "method": label, "method_label": label}
                self._said.put((self._worker, json.dumps({"row": row}) + "\n"))
        self._said.put((self._worker, '{"done": true}\n'))

    def left(self, worker: Any, *, usable: bool) -> None:
        """Nothing is to do."""

    def close(self) -> None:
        """Nothing is held."""


class _Stub:
    """The worker itself."""

    where = "cpu"

    def __init__(self, give: Callable[[str | None], None]) -> None:
        self.give = give

    def ended(self) -> Any:
        """It ends when nothing is left."""
        from kvscope.harness.passes.pools import Ended

        return Ended(0, "it said nothing")

    def kill(self) -> None:
        """Nothing is to do."""


def _invented_row() -> dict[str, Any]:
    """Return the values of a row at the length asked for, as ``large_results`` invents them."""
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), rows=200)
        rows = [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]
    return next(row for row in rows if row["length_tokens"] == LENGTH_TOKENS and row["task"] == "niah_single_1")
