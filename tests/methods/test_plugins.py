"""Methods and tasks from outside the tree: the page's own code, installed and run; and what is refused."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from kvscope.harness.passes.footprint import worker_environment

PAGE = Path(__file__).parents[2] / "docs" / "add-a-method.md"
BLOCK = re.compile(r"```(?:toml|python)\n# (\S+)\n(.*?)```", re.DOTALL)
KVSCOPE = (sys.executable, "-P", "-m", "kvscope.cli")


def write_package(folder: Path) -> dict[str, str]:
    """Write the page's files, and the .dist-info that an installer would."""
    files = dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "evict" / "__init__.py").touch()
    points = "".join(
        f"[{group}]\n{line}\n"
        for group, line in re.findall(r'entry-points\."([\w.]+)"\]\n(.+)\n', files["pyproject.toml"])
    )
    write_distribution(folder, "evict", points.replace('"', ""))
    return files


def write_distribution(folder: Path, name: str, points: str) -> None:
    info = folder / f"{name}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(points, encoding="utf-8")


def kvscope(*arguments: str, path: Path | None = None, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
    """Run the command with a folder on PYTHONPATH."""
    environment = worker_environment()
    if path is not None:
        environment["PYTHONPATH"] += os.pathsep + str(path)
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run([*KVSCOPE, *arguments], capture_output=True, text=True, env=environment, cwd=cwd)


def run_arguments(model: str, out: Path) -> list[str]:
    return [
        "--model", model, "-l", "512", "-n", "2", "--device", "cpu", "--max-new-tokens", "2",
        "--set", "footprint_decode_tokens=2", "--no-report", "-q", "--out", str(out),
    ]  # fmt: skip


def rows(folder: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def test_the_method_of_the_page_is_under_100_lines() -> None:
    files = dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))
    assert set(files) == {"pyproject.toml", "evict/method.py", "evict/task.py"}
    assert len(files["evict/method.py"].splitlines()) < 100


def test_the_package_of_the_page_is_measured_by_its_names(tmp_path: Path, tiny_model: str) -> None:
    write_package(tmp_path / "site")
    out = tmp_path / "run"
    asked = ("-m", "dense", "-m", "first_and_last:fraction=0.5,first_tokens=0.0625k", "-t", "last_word")
    (tmp_path / "statistics.py").write_text("raise SystemExit('a file of the working directory ran')\n")
    done = kvscope("run", *asked, *run_arguments(tiny_model, out), path=tmp_path / "site", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    samples, footprints = rows(out, "samples.jsonl"), rows(out, "footprint.jsonl")
    label = "first_and_last:fraction=0.5"
    assert {(row["method_label"], row["task"], row["status"]) for row in samples} == {
        ("dense", "last_word", "ok"),
        (label, "last_word", "ok"),
    }
    assert {(row["method_label"], row["status"]) for row in footprints} == {("dense", "ok"), (label, "ok")}
    kept = next(row for row in footprints if row["method_label"] == label)
    assert kept["resident_kv_bytes"] == kept["predicted_kv_bytes"]


def test_the_classes_of_the_page_are_measured_by_their_place(tmp_path: Path, tiny_model: str) -> None:
    """In a script of one's own: its folder is on sys.path and in no environment variable."""
    write_package(tmp_path)
    for path in tmp_path.glob("*.dist-info/*"):
        path.unlink()
    out = tmp_path / "run"
    script = tmp_path / "measure.py"
    values = {
        "model": tiny_model, "methods": ["evict.method:FirstAndLast:first_tokens=128"],
        "tasks": ["evict.task:LastWord:position=start"], "lengths_tokens": [512], "samples": 1, "device": "cpu",
        "max_new_tokens": 2, "footprint_decode_tokens": 2, "out": str(out),
    }  # fmt: skip
    script.write_text(f"import kvscope\nkvscope.run({values!r}, progress=False)\n", encoding="utf-8")
    environment = {**worker_environment(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    label = "first_and_last:first_tokens=128"
    assert [(row["method_label"], row["status"]) for row in rows(out, "samples.jsonl")] == [(label, "ok")]
    assert [(row["method_label"], row["status"]) for row in rows(out, "footprint.jsonl")] == [(label, "ok")]


def test_installed_names_are_listed_and_shown(tmp_path: Path) -> None:
    write_package(tmp_path)
    listed = kvscope("list", "methods", path=tmp_path)
    assert "first_and_last" in listed.stdout, listed.stderr
    assert "last_word" in kvscope("list", "tasks", path=tmp_path).stdout
    for name in ("first_and_last", "evict.method:FirstAndLast"):
        shown = kvscope("show", name, path=tmp_path).stdout
        assert "first_tokens (int, default 64)" in shown
        assert "tokens at the start of the prompt that stay." in shown
    assert "position" in kvscope("show", "evict.task:LastWord", path=tmp_path).stdout
