"""Runs started from Python in odd ways: ``python -c``, a process of multiprocessing, another folder full of traps."""

import subprocess
import sys
from pathlib import Path

import pytest

import kvscope
from kvscope.harness.passes.process import worker_environment

TRAPS = ("statistics", "torch", "json", "sitecustomize", "kvscope")
CALL = """
import multiprocessing
import kvscope
config, method = {config!r}, {method!r}
if method == "none":
    kvscope.run(config, progress=False)
elif __name__ == "__main__":
    with multiprocessing.get_context(method).Pool(1) as pool:
        pool.apply(kvscope.run, (config,), {{"progress": False}})
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "spawn"])
def test_a_run_from_another_folder_gives_the_rows(tiny_model: str, tmp_path: Path, method: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "model").symlink_to(tiny_model)
    for name in TRAPS:
        (place / f"{name}.py").write_text(f"open({str(tmp_path / 'trapped')!r}, 'w')\nraise SystemExit('trapped')\n")
    config = {
        "model": "./model", "methods": ["dense"], "tasks": ["niah_single_1"], "lengths_tokens": [512], "samples": 1,
        "max_new_tokens": 2, "footprint_decode_tokens": 2, "device": "cpu", "self_check": False, "out": "run",
        # Workers get the path of the process that runs, and a spawned one has its parent's.
        "footprint": method == "spawn",
    }  # fmt: skip
    # -P, as the script `kvscope` has it: without, Python itself looks into the folder one stands in.
    done = subprocess.run(
        [sys.executable, "-P", "-c", CALL.format(config=config, method=method)],
        cwd=place,
        env=worker_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (tmp_path / "trapped").exists()
    found = kvscope.load_run(place / "run")
    assert list(found.samples["status"]) == ["ok"]
    assert list(found.footprint.get("status", [])) == (["ok"] if method == "spawn" else [])
