"""A process of the accuracy pass: ``python -m kvscope.harness.passes.shard_worker``.

Its first line on stdin is the run, every further one a shard. JSON lines go out on stdout: ``{"ready": true}`` when the
model is loaded, ``{"row": ...}`` for each row, ``{"note": ...}`` for what the user should hear, ``{"done": true}`` when
a shard is, or its time is over. It ends when stdin closes: the sweep is done with it, or gone. An error that the user
can act on ends it with that error's exit code, and is the last line on stderr.
"""

import contextlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from kvscope.errors import KvscopeError
from kvscope.harness.passes.answering import load, measured_noise
from kvscope.harness.passes.base import Plan
from kvscope.harness.passes.batch import Batch
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.deadline import Deadline, TimeLimitReached
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.turns import Turns
from kvscope.plugins import extend_search_path
from kvscope.results.schema import SampleRow
from kvscope.results.store import RunStore, SampleKey
from kvscope.terminal import complain

Say = Callable[[dict[str, Any]], None]
"""Sends a message."""


class RemoteStore:
    """The rows of a folder that another process writes: those of here are sent to it.

    Attributes:
        folder, info: as of ``RunStore``.
    """

    def __init__(self, folder: Path, say: Say, *, n_jobs: int) -> None:
        with RunStore.open(folder) as store:
            self.folder, self.info = store.folder, store.info
            self._rows = store.samples()
        self._say, self._n_jobs = say, n_jobs
        self._lacking: set[SampleKey] = set()

    def take(self, shard: dict[str, Any]) -> None:
        """Let the rows that a shard asks for be those that lack, and no others."""
        task, length_tokens = shard["task"], shard["length_tokens"]
        self._lacking = {(task, length_tokens, index, label) for index, labels in shard["prompts"] for label in labels}

    def samples(self) -> list[SampleRow]:
        """Return the rows that were there at the start, which prompts are compared with."""
        return self._rows

    def has_sample(self, key: SampleKey) -> bool:
        """Return whether the shard at hand asks for no such row, or it was sent."""
        return key not in self._lacking

    def append_sample(self, row: SampleRow) -> None:
        """Send a row."""
        row = row.model_copy(update={"jobs": self._n_jobs})
        self._lacking.discard((row.task, row.length_tokens, row.sample, row.method_label))
        self._say({"row": row.model_dump(mode="json")})


class Speaker:
    """Writes JSON lines, each whole."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def __call__(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


class RemoteProgress(Progress):
    """Passes notes on: prompts and cells are counted by who writes the rows."""

    def __init__(self, say: Say) -> None:
        self._say = say

    def note(self, text: str) -> None:
        """Tell the sweep."""
        self._say({"note": text})


def main() -> int:
    """Answer shard by shard."""
    say = Speaker(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # whatever libraries print
    asked = json.loads(sys.stdin.readline())
    extend_search_path(asked["import_folders"])
    try:
        answer(asked, say)
    except KvscopeError as error:
        complain(str(error))
        return error.exit_code
    return 0


def answer(asked: Mapping[str, Any], say: Say) -> None:
    """Load the model, then answer what comes. The folder is there with the first shard, and no sooner."""
    lines = _lines()
    plan = make_plan(make_config(asked["config"]))
    assert isinstance(plan, Plan)
    progress = RemoteProgress(say)
    loaded = load(plan)
    noise = measured_noise(plan, loaded, progress)
    say({"ready": True})
    store: RemoteStore | None = None
    for line in lines:
        shard = json.loads(line)
        if store is None:
            store = RemoteStore(Path(asked["folder"]), say, n_jobs=asked["n_jobs"])
            plan = plan.in_folder(store.info)
        store.take(shard)
        task = dict(zip(plan.task_names, plan.tasks, strict=True))[shard["task"]]
        turns = Turns(plan, store, progress, [(task, shard["task"], int(shard["length_tokens"]))])
        with contextlib.suppress(TimeLimitReached), turns:  # the sweep sees what is left
            Batch(plan, loaded, store, turns, noise=noise).run(Deadline(shard["left_s"]))
        say({"done": True})


def _lines() -> Iterator[str]:
    """Yield the lines of stdin. Where it closes in the midst of a shard, the sweep is gone, and so is this process."""
    read: queue.Queue[str | None] = queue.Queue()
    busy = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            read.put(line)
        if busy.is_set():
            os._exit(1)
        read.put(None)

    threading.Thread(target=listen, name="kvscope-parent-watch", daemon=True).start()
    while (line := read.get()) is not None:
        busy.set()
        yield line
        busy.clear()


if __name__ == "__main__":
    sys.exit(main())
