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

import kvscope
from kvscope.errors import EnvironmentProblem, KvscopeError, UsageError
from kvscope.harness.passes.answering import load, measured_noise
from kvscope.harness.passes.batch import Batch
from kvscope.harness.passes.builders import PromptBuilders, builder_processes
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.deadline import Deadline, TimeLimitReached
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.recording import identity
from kvscope.harness.passes.run_plan import Plan
from kvscope.harness.passes.turns import Turns
from kvscope.plugins import extend_search_path
from kvscope.results.run_schema import RunInfo
from kvscope.results.schema import SampleRow
from kvscope.results.store import SampleKey
from kvscope.terminal import complain

Say = Callable[[dict[str, Any]], None]
"""Sends a message."""


class RemoteStore:
    """The rows of a folder that another process writes, which may lie on another machine: those of here are sent to it.

    Attributes:
        folder, info: as of ``RunStore``.
    """

    def __init__(self, folder: Path, info: RunInfo, say: Say, *, n_jobs: int) -> None:
        self.folder, self.info = folder, info
        self._say, self._n_jobs = say, n_jobs
        self._rows: list[SampleRow] = []
        self._lacking: set[SampleKey] = set()

    def take(self, shard: dict[str, Any]) -> None:
        """Let the rows that a shard asks for be those that lack, and no others."""
        task, length_tokens = shard["task"], shard["length_tokens"]
        self._lacking = {(task, length_tokens, index, label) for index, labels in shard["prompts"] for label in labels}
        self._rows = [SampleRow.model_validate(row) for row in shard["rows"]]

    def samples(self) -> list[SampleRow]:
        """Return the rows of the shard's prompts that were there, which these are compared with."""
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
    """Load the model, then answer what comes."""
    lines = _lines()
    if asked.get("version", kvscope.__version__) != kvscope.__version__:
        raise EnvironmentProblem(
            f"kvscope {kvscope.__version__} is installed here, and the run's is {asked['version']}: install the same."
        )
    plan = make_plan(make_config(asked["config"]))
    assert isinstance(plan, Plan)
    if (expected := asked.get("identity")) is not None:
        check_identity(expected, identity(plan))
    info = RunInfo.model_validate(asked["info"])
    plan = plan.in_folder(info)  # before it is handed to those who build: they call tasks what the folder does
    progress = RemoteProgress(say)
    builders = PromptBuilders(plan, processes=builder_processes(asked["n_jobs"], device=plan.facts.device))
    loaded = load(plan)
    noise = measured_noise(plan, loaded, progress)
    say({"ready": True})
    store = RemoteStore(Path(asked["folder"]), info, say, n_jobs=asked["n_jobs"])
    for line in lines:
        shard = json.loads(line)
        store.take(shard)
        task = dict(zip(plan.task_names, plan.tasks, strict=True))[shard["task"]]
        turns = Turns(plan, store, progress, [(task, shard["task"], int(shard["length_tokens"]))], builders)
        with contextlib.suppress(TimeLimitReached):  # the sweep sees what is left
            Batch(plan, loaded, store, turns, noise=noise).run(Deadline(shard["left_s"]))
        say({"done": True})


def check_identity(expected: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Compare the model, the trained parts and the tasks' data of this machine with those of the run.

    Args:
        expected: ``recording.identity`` of the run, out of JSON.

    Raises:
        UsageError: naming the first part that differs.
    """
    mine = json.loads(json.dumps(here))
    for key, what in (("model", "model"), ("trained_parts", "trained part"), ("tasks", "task's data")):
        if mine[key] != expected[key]:
            parts = [part for part in mine[key] if mine[key][part] != expected[key].get(part)] if key == "model" else []
            named = f" ({', '.join(parts)})" if parts else ""
            raise UsageError(f"The {what} here is another than the run's{named}: put the same files on every node.")


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
