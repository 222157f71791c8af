"""kill -9 at 25 random points of progress: at most the prompt in flight is lost, and nothing is there twice."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import MakeConfig

from kvscope.harness.passes.process import worker_environment
from kvscope.results.frames import load_run

KILLS = 25
METHODS = ["dense", "sliding_window", "recency", "random"]
STEPS_A_PROMPT = 3 + len(METHODS)  # begin, prefill, every method, done
SERVER = Path(__file__).resolve().parents[1] / "tools" / "kill_server.py"


class Sweeps:
    """A process that forks sweeps for us to kill."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.finished: list[int] = []
        """Sample indices of prompts that were finished, as the sweeps themselves said at once."""
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER), json.dumps(values)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=worker_environment(),
            text=True,
        )

    def kill_one(self, *, at_step: int, room: int) -> int:
        """Start a sweep and kill it between step ``at_step`` and ``room`` steps later; return its wait status."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{at_step + room}\n")
        self.process.stdin.flush()
        word, pid = self._line().split()
        assert word == "pid"
        for _ in range(at_step):
            assert not self._line().startswith("ended"), "the sweep had ended by itself: this kill tested nothing"
        os.kill(int(pid), signal.SIGKILL)
        while not (line := self._line()).startswith("ended"):
            pass
        return int(line.split()[1])

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server died"
        if line.startswith("done"):
            self.finished.append(int(line.split()[3]) - 1)
        return line

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@pytest.fixture
def sweeps(small: MakeConfig) -> Iterator[Sweeps]:
    server = Sweeps(small(methods=METHODS, samples=400, max_new_tokens=2, batch=1).model_dump())
    yield server
    server.close()


def whole_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of complete lines; a torn tail is left out, a torn line elsewhere fails."""
    data = (folder / "samples.jsonl").read_bytes() if (folder / "samples.jsonl").exists() else b""
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


@pytest.mark.slow
def test_random_kills_lose_only_the_prompt_in_flight(sweeps: Sweeps, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    dice = random.Random(20)
    seen_rows = 0
    for _ in range(KILLS):
        status = sweeps.kill_one(at_step=dice.randrange(2 * STEPS_A_PROMPT), room=STEPS_A_PROMPT)
        assert os.WIFSIGNALED(status)
        rows = whole_rows(folder)
        keys = [(row["sample"], row["method"]) for row in rows]
        assert len(keys) == len(set(keys))
        assert len(keys) >= seen_rows, "a row that was there is gone"
        seen_rows = len(keys)
        finished = sweeps.finished
        assert len(finished) == len(set(finished)), "a finished prompt was measured again"
        assert {(index, name) for index in finished for name in METHODS} <= set(keys), "a finished prompt lost a row"
        rows_of = Counter(index for index, _ in keys)
        assert sum(n < len(METHODS) for n in rows_of.values()) <= 1, "more than one prompt was in flight"
    assert seen_rows > 2 * KILLS, "the kills came before anything was measured"
    loaded = load_run(folder)
    assert len(loaded.samples) == seen_rows
    assert set(loaded.samples["status"]) == {"ok"}
