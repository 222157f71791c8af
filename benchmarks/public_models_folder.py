"""The folder of work of ``public_models.py``: commands of kvscope run in it until a time is over, and steps' notes."""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import is_over

from kvscope.errors import UsageError
from kvscope.files import make_folder, whole_file
from kvscope.results.frames import load_run
from kvscope.results.store import RUN_FILE

#: Whose folder of work it is; not packed, as it may be a path.
MODEL_FILE = "model.txt"
#: Least seconds that a run is begun with.
LEAST_CALL_S = 20.0


class WorkFolder:
    """What one model's steps leave, and how they run.

    Args:
        options: of the command line.

    Raises:
        UsageError: the folder cannot be made, or is another model's.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.path: Path = options.work
        make_folder(self.path)
        note = self.path / MODEL_FILE
        if note.exists() and (of := note.read_text(encoding="utf-8").strip()) != options.model:
            raise UsageError(f"--work '{self.path}' is of the model {of}, not of {options.model}: give another folder.")
        with whole_file(note) as path:
            path.write_text(f"{options.model}\n", encoding="utf-8")
        self.deadline_s = time.monotonic() + options.time_limit

    def kvscope(self, *arguments: str) -> None:
        """Run a command of kvscope in the folder, where indexers have short names.

        Raises:
            CalledProcessError: it failed.
        """
        code = f"import sys; sys.argv[1:] = {list(arguments)!r}; from kvscope.cli import main; main()"
        print("kvscope", *arguments, flush=True)
        subprocess.run([sys.executable, "-c", code], cwd=self.path, check=True)

    def write_note(self, name: str, note: dict[str, Any]) -> None:
        """Write down what later steps go by."""
        with whole_file(self.path / name) as path:
            path.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")

    def note(self, name: str, *, step: str) -> Any:
        """Return what an earlier step wrote down.

        Raises:
            UsageError: that step was not done.
        """
        path = self.path / name
        if not path.exists():
            raise UsageError(f"{path} is missing, which --step {step} writes: do that before.")
        return json.loads(path.read_text(encoding="utf-8"))

    @property
    def device(self) -> list[str]:
        """The device asked for, as arguments."""
        return ["--device", self.options.device] if self.options.device else []

    def run(
        self, out: str, *, methods: list[str], tasks: list[str], lengths: list[int], samples: int, seed: int,
        footprint: Sequence[str] = (),
    ) -> bool:  # fmt: skip
        """Run until it is done or the time is over; return whether every row is there.

        Args:
            footprint: what is asked of the footprint pass; empty: none.

        Raises:
            CalledProcessError: it failed, and not as its time was over.
        """
        asked = len(methods) * len(tasks) * len(lengths) * samples + bool(footprint) * len(methods) * len(lengths)
        if self.rows(out) >= asked:
            return True
        left_s = self.deadline_s - time.monotonic()
        if left_s < LEAST_CALL_S:
            return False
        found = ["run", "--model", self.options.model, "--out", out, "--seed", str(seed), "--samples", str(samples)]
        found += [item for each in methods for item in ("--method", each)]
        found += [item for each in tasks for item in ("--task", each)]
        found += [item for each in lengths for item in ("--length", str(each))]
        if not footprint:
            gpus = ["--gpus", self.options.gpus] if self.options.gpus else []
            found += ["--no-footprint", *gpus, "--jobs", str(self.options.jobs)]
        else:
            found += footprint
        if math.isfinite(left_s):
            found += ["--time-limit", str(math.floor(left_s))]
        since_s = time.monotonic()
        try:
            self.kvscope(*found, *self.device, "--quiet", "--no-report")
        except subprocess.CalledProcessError as error:
            # Without a limit no time is over, and infinity has no whole seconds.
            limit_s = math.floor(left_s) if math.isfinite(left_s) else left_s
            if not is_over(error.returncode, took_s=time.monotonic() - since_s, limit_s=limit_s):
                raise
        return self.rows(out) >= asked

    def rows(self, out: str) -> int:
        """Return the rows that a run has."""
        if not (self.path / out / RUN_FILE).exists():
            return 0
        run = load_run(self.path / out)
        return len(run.samples) + len(run.footprint)
