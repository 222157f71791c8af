"""kill -9 at 25 random points of progress: at most the prompt in flight is lost, and nothing is there twice."""

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from killing import Victims
from tiny import MakeConfig

from kvscope.results.frames import load_run

KILLS = 25
METHODS = ["dense", "sliding_window", "recency", "random"]
STEPS_A_PROMPT = 3 + len(METHODS)  # begin, prefill, every method, done


@pytest.fixture
def sweeps(small: MakeConfig) -> Iterator[Victims]:
    values = small(methods=METHODS, lengths_tokens=[256], samples=400, max_new_tokens=2, batch=1, self_check=False)
    server = Victims("run", values.model_dump())
    yield server
    server.close()


def whole_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of complete lines; a torn tail is left out, a torn line elsewhere fails."""
    data = (folder / "samples.jsonl").read_bytes() if (folder / "samples.jsonl").exists() else b""
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


@pytest.mark.slow
def test_random_kills_lose_only_the_prompt_in_flight(sweeps: Victims, tmp_path: Path) -> None:
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
        finished = [int(line.split()[3]) - 1 for line in sweeps.finished]
        assert len(finished) == len(set(finished)), "a finished prompt was measured again"
        assert {(index, name) for index in finished for name in METHODS} <= set(keys), "a finished prompt lost a row"
        rows_of = Counter(index for index, _ in keys)
        assert sum(n < len(METHODS) for n in rows_of.values()) <= 1, "more than one prompt was in flight"
    assert seen_rows > 2 * KILLS, "the kills came before anything was measured"
    loaded = load_run(folder)
    assert len(loaded.samples) == seen_rows
    assert set(loaded.samples["status"]) == {"ok"}
