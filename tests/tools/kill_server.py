"""Starts sweeps that a test kills: imports everything once, then forks one child per line on stdin.

Protocol: a line comes in, the child's process id goes out, then ``ended <status>`` when it is gone. The child writes
one line to the marker file as soon as a prompt is finished.
"""

import json
import os
import sys
from pathlib import Path

import torch

from kvscope.harness.engine import decode, prefill  # noqa: F401
from kvscope.harness.passes import accuracy  # noqa: F401 - loaded before the first fork
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.sweep import run
from kvscope.methods.registry import METHODS, method_class


class Marker(Progress):
    """Writes the names of finished prompts, unbuffered."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._cell = self._step = ""

    def begin(self, *, cells: int, work_tokens: int) -> None:
        os.write(self._fd, b"begin\n")

    def begin_cell(self, name: str, *, steps: int) -> None:
        self._cell = name

    def begin_step(self, name: str, *, parts: int = 0) -> None:
        self._step = name

    def end_step(self, *, work_tokens: int) -> None:
        os.write(self._fd, f"done {self._cell} {self._step}\n".encode())


def say(text: str) -> None:
    """Answer the test."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> None:
    values, marker = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    for name in METHODS:
        method_class(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 - loaded before the first fork
    from transformers.models.llama import modeling_llama  # noqa: F401

    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(make_config(values), progress=Marker(marker))
            os._exit(0)
        say(f"{pid}")
        _, status = os.waitpid(pid, 0)
        say(f"ended {status}")


if __name__ == "__main__":
    main()
