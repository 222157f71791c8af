"""A short chaos: kills at seeded steps, which no clock decides. ``make chaos`` does the long one.

And a clock that is set back, which must spoil no row.
"""

import json
import random
import time
from pathlib import Path
from typing import Any

import fresh
import pytest
from tiny import MakeConfig

import kvscope
from kvscope.harness.passes.process import worker_environment

DRIVE = Path(__file__).with_name("drive.py")
TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.mark.slow
def test_kills_at_any_step_lose_and_double_nothing(tmp_path: Path) -> None:
    names = ["accuracy", "report", "training of lsa's indexer"]
    out = tmp_path / "chaos.json"
    environment = {**worker_environment(), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = f"{TOOLS}:{environment['PYTHONPATH']}"
    only = [part for name in names for part in ("--only", name)]
    ended = fresh.run([str(DRIVE), "--kills", "6", "--steps-alone", *only, "--out", str(out)], env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(out.read_text())["scenarios"]
    assert [each["what"] for each in found] == names
    for each in found:
        assert each["by step"] == 2
        assert (each["lost"], each["doubled"], each["problems"]) == (0, 0, [])
        assert each["equal"] == each["resumed"] >= 1


def test_a_chaos_that_finds_something_says_so(tmp_path: Path) -> None:
    """What the driver is to find: a row that was there is gone, a line is there twice, a part is left."""
    import sys

    sys.path.insert(0, str(DRIVE.parent))
    try:
        import drive
        from scenarios import Scenario, doubled_rows
    finally:
        sys.path.remove(str(DRIVE.parent))

    def forgets(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for at in range(9):
            (folder / f"{random.randrange(10**9)}").write_text(str(at))
            for other in sorted(folder.iterdir())[:-1]:
                other.unlink()

    def held(folder: Path) -> dict[str, Any]:
        return {path.name: path.read_text() for path in folder.iterdir()} if folder.exists() else {}

    scenario = Scenario("forgets", forgets, held)
    found = drive.Chaos(scenario, tmp_path, random.Random(0), by_steps_alone=True).run(4)
    assert found["lost"] > 0
    assert found["equal"] < found["resumed"]
    assert doubled_rows(tmp_path) == 0


def test_a_clock_that_is_set_back_spoils_no_row(small: MakeConfig, tmp_path: Path, monkeypatch: Any) -> None:
    values = {"samples": 3, "batch": 1, "self_check": False}
    usual = kvscope.run(small(**values), progress=False).samples
    dice, real = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + dice.choice([-1, 1]) * dice.uniform(0, 10**8))
    monkeypatch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))
    odd = kvscope.run(small(**values, out=str(tmp_path / "odd")), progress=False).samples
    times = [name for name in usual.columns if name.endswith("_s") and usual[name].notna().any()]
    assert {"prefill_s", "decode_s"} <= set(times)
    assert (odd[times].min() >= 0).all()
    assert (odd[times].max() < 10**4).all()
    rest = [name for name in usual.columns if name not in {*times, "load_1min"}]
    assert odd[rest].equals(usual[rest])
