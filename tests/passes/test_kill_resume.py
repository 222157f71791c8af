"""kill -9 at 25 random moments: at most the prompt in flight is lost, and nothing is there twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
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
SERVER = Path(__file__).resolve().parents[1] / "tools" / "kill_server.py"


class Sweeps:
    """A process that forks sweeps for us to kill."""

    def __init__(self, values: dict[str, Any], marker: Path) -> None:
        self.marker = marker
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER), json.dumps(values), str(marker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=worker_environment(),
            text=True,
        )

    def start(self) -> int:
        """Start one sweep; return its process id once it begins to measure."""
        begun = self.marker_lines().count("begin")
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        pid = int(self._line())
        deadline = time.monotonic() + 120
        while self.marker_lines().count("begin") == begun:
            assert time.monotonic() < deadline, "the sweep never began"
            time.sleep(0.002)
        return pid

    def ended(self) -> int:
        """Wait for the sweep's end; return its wait status."""
        word, status = self._line().split()
        assert word == "ended"
        return int(status)

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server died"
        return line

    def marker_lines(self) -> list[str]:
        return self.marker.read_text().splitlines() if self.marker.exists() else []

    def finished_prompts(self) -> list[int]:
        """Return sample indices of prompts that were finished, as the sweep itself said at once."""
        return [int(line.split()[3]) - 1 for line in self.marker_lines() if line.startswith("done")]

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=60)


@pytest.fixture
def sweeps(small: MakeConfig, tmp_path: Path) -> Iterator[Sweeps]:
    config = small(methods=METHODS, samples=400, max_new_tokens=2)
    server = Sweeps(config.model_dump(), tmp_path / "marker")
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
        pid = sweeps.start()
        time.sleep(dice.uniform(0.0, 0.35))
        os.kill(pid, signal.SIGKILL)
        status = sweeps.ended()
        assert os.WIFSIGNALED(status), "the sweep had ended by itself: this kill tested nothing"
        rows = whole_rows(folder)
        keys = [(row["sample"], row["method"]) for row in rows]
        assert len(keys) == len(set(keys))
        assert len(keys) >= seen_rows, "a row that was there is gone"
        seen_rows = len(keys)
        finished = sweeps.finished_prompts()
        assert len(finished) == len(set(finished)), "a finished prompt was measured again"
        assert {(index, name) for index in finished for name in METHODS} <= set(keys), "a finished prompt lost a row"
        rows_of = Counter(index for index, _ in keys)
        assert sum(n < len(METHODS) for n in rows_of.values()) <= 1, "more than one prompt was in flight"
    assert seen_rows > 4 * KILLS / 5, "the kills came before anything was measured"
    loaded = load_run(folder)
    assert len(loaded.samples) == seen_rows
    assert set(loaded.samples["status"]) == {"ok"}
