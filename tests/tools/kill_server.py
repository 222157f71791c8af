"""Starts what a test kills: imports everything once, then forks one child per line on stdin.

    python kill_server.py run|collect VALUES

Protocol: ``N`` comes in. Out go ``pid P``, one line for every step of the child's progress (``done CELL STEP`` as soon
as a prompt is finished), and ``ended STATUS`` when the child is gone. After N lines the child waits to be killed:
however late the test looks, it never comes to its end. ``collect`` steps before and after each file appears, too.
"""

import gc
import json
import os
import signal
import sys
import tempfile
from typing import Any

import torch

from kvscope import files
from kvscope.harness.engine import decode, prefill  # noqa: F401
from kvscope.harness.indexers.collection.collect import CollectConfig, collect
from kvscope.harness.passes import accuracy  # noqa: F401 - loaded before the first fork
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.sweep import run
from kvscope.methods.registry import METHODS, method_class


def say(text: str) -> None:
    """Answer the test: one write, whole or not at all."""
    os.write(1, (text + "\n").encode())


class Steps(Progress):
    """Says every step at once; waits to be killed after ``n_steps``."""

    def __init__(self, n_steps: int) -> None:
        self._left = n_steps
        self._cell = self._step = ""

    def _say(self, text: str) -> None:
        say(text)
        self._left -= 1
        while self._left <= 0:
            signal.pause()

    def begin_cell(self, name: str, *, steps: int) -> None:
        self._cell = name

    def begin_step(self, name: str, *, parts: int = 0) -> None:
        self._step = name
        self._say("begin")

    def part(self, name: str) -> None:
        self._say("part")

    def end_step(self, *, work_tokens: int, cell: str | None = None) -> None:
        self._say(f"done {self._cell} {self._step}")


def collect_to(values: dict[str, Any], steps: Steps) -> None:
    """Collect, with a step before and after every file that appears."""
    replace = os.replace

    def told(*paths: Any) -> None:
        steps.part("before")
        replace(*paths)
        steps.part("after")

    files.os.replace = told  # type: ignore[assignment]  # in the child alone
    out = values.pop("out")
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    collect(CollectConfig(**config), out, progress=steps)


def main() -> None:
    what, values = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    for name in METHODS:
        method_class(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 - loaded before the first fork
    from transformers.models.llama import modeling_llama  # noqa: F401

    if what == "run":
        # What only a first run does (imports, compiled code) is done here for all children.
        with tempfile.TemporaryDirectory() as folder:
            run(make_config({**values, "samples": 1, "out": folder}), progress=False)
    gc.freeze()  # a child that collects would look through all modules and write to every page it shares
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            steps = Steps(int(line))
            if what == "run":
                run(make_config(values), progress=steps)
            else:
                collect_to(values, steps)
            os._exit(0)
        say(f"pid {pid}")
        _, status = os.waitpid(pid, 0)
        say(f"ended {status}")


if __name__ == "__main__":
    main()
