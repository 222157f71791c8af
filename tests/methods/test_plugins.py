"""Methods and tasks from outside the tree: the page's own code, installed and run; and what is refused."""

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fresh
import pytest

from kvscope import plugins
from kvscope.errors import UsageError
from kvscope.harness.info.catalog import list_text
from kvscope.harness.passes.process import worker_environment
from kvscope.methods.registry import check_one_class_a_name, create_method, method_class
from kvscope.tasks.registry import create_task, task_class

PAGE = Path(__file__).parents[2] / "docs" / "add-a-method.md"
BLOCK = re.compile(r"```(?:toml|python)\n# (\S+)\n(.*?)```", re.DOTALL)


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
    return fresh.run(["-m", "kvscope.cli", *arguments], env=environment, cwd=cwd)


def kvscope_answers(commands: list[list[str]], *, path: Path) -> list[str]:
    """Return what each command prints, all of them in one process with a folder on PYTHONPATH."""
    code = (
        "import sys, json\nfrom kvscope.cli import run_cli\n"
        "for command in json.loads(sys.argv[1]):\n    assert run_cli(command) == 0\n    print('\\0', end='')"
    )
    environment = worker_environment()
    environment["PYTHONPATH"] += os.pathsep + str(path)
    done = fresh.run(["-c", code, json.dumps(commands)], env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\0")[:-1]


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


@pytest.mark.slow
def test_the_package_of_the_page_is_measured_by_its_names(tmp_path: Path, tiny_model: str) -> None:
    write_package(tmp_path / "site")
    out = tmp_path / "run"
    asked = ("-m", "first_and_last:fraction=0.5,first_tokens=0.0625k", "-t", "last_word")
    (tmp_path / "statistics.py").write_text("raise SystemExit('a file of the working directory ran')\n")
    done = kvscope("run", *asked, *run_arguments(tiny_model, out), path=tmp_path / "site", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    samples, footprints = rows(out, "samples.jsonl"), rows(out, "footprint.jsonl")
    label = "first_and_last:fraction=0.5"
    assert {(row["method_label"], row["task"], row["status"]) for row in samples} == {(label, "last_word", "ok")}
    (kept,) = footprints
    assert (kept["method_label"], kept["status"]) == (label, "ok")
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
    done = fresh.run([str(script)], env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    label = "first_and_last:first_tokens=128"
    assert [(row["method_label"], row["status"]) for row in rows(out, "samples.jsonl")] == [(label, "ok")]
    assert [(row["method_label"], row["status"]) for row in rows(out, "footprint.jsonl")] == [(label, "ok")]


def test_installed_names_are_listed_and_shown(tmp_path: Path) -> None:
    write_package(tmp_path)
    asked = [
        ["list", "methods"],
        ["list", "tasks"],
        ["show", "first_and_last"],
        ["show", "evict.method:FirstAndLast"],
        ["show", "evict.task:LastWord"],
    ]
    listed_methods, listed_tasks, by_name, by_place, task = kvscope_answers(asked, path=tmp_path)
    assert "first_and_last" in listed_methods
    assert "last_word" in listed_tasks
    for shown in (by_name, by_place):
        assert "first_tokens (int, default 64)" in shown
        assert "tokens at the start of the prompt that stay." in shown
    assert "position" in task


METHOD = """
from dataclasses import dataclass
from kvscope.methods.dense.method import Dense, DenseConfig
from kvscope.tasks.needle import NeedleTask

class Good(Dense):
    name = "good"

class OfOurName(Dense):
    pass

class Unnamed(Dense):
    name = "two words\\x1b[2J"

class Wordless(Dense):
    name = "wordless"
    stays = ""

class OddKind(Dense):
    name = "odd_kind"
    saving_kind = "gone"

class NoConfig(Dense):
    name = "no_config"
    Config = None

@dataclass(frozen=True)
class NeedsOne:
    a: int

class NoDefaults(Dense):
    name = "no_defaults"
    Config = NeedsOne

class Typeless(NeedleTask):
    name = "typeless"
    question_types = ()

NOT_A_CLASS = 5
"""

TWIN = """
from kvscope.methods.dense.method import Dense

class Good(Dense):
    name = "good"
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder on sys.path with a module of methods, good and bad."""
    for name in ("plugged", "twin", "torn", "leaving"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "plugged.py").write_text(METHOD, encoding="utf-8")
    (tmp_path / "twin.py").write_text(TWIN, encoding="utf-8")
    (tmp_path / "torn.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit('bye\\nbye')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.installed.cache_clear()
    return tmp_path


@pytest.fixture(autouse=True)
def forget_installed() -> "Iterator[None]":
    yield
    plugins.installed.cache_clear()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("plugged:Missing", "module plugged has no 'Missing'. "),
        ("plugged:Goood", "Did you mean 'Good'?"),
        ("plugged.NOT_A_CLASS:x", "importing plugged.NOT_A_CLASS raised ModuleNotFoundError"),
        ("not_there.at_all:Class", "no module 'not_there' is installed or on PYTHONPATH"),
        ("torn.x:Class", "importing torn.x raised ModuleNotFoundError: No module named 'a_module_that_is_not_there'"),
        ("leaving:Class", "importing leaving raised SystemExit: bye bye"),
        ("plugged:OfOurName", "its class has the name 'dense', which is kvscope's own"),
        ("plugged:Unnamed", "its class has the name 'two words\\x1b[2J', expected letters"),
        ("plugged:Wordless", "its class attribute 'stays' must be text, one clause"),
        ("plugged:OddKind", "'saving_kind' must be one of resident, freed, offloaded"),
        ("plugged:NoConfig", "'Config' must be a dataclass"),
        ("plugged:NoDefaults", "its Config cannot be made without options"),
        ("plugged:Typeless", "it is not a subclass of kvscope.methods.base.CacheMethod"),
        ("plugged:NOT_A_CLASS", "it is not a subclass of kvscope.methods.base.CacheMethod"),
        ("kvscope.methods.base:CacheMethod", "it does not define effective_config, is_noop, open, predict"),
        ("random:Fraction", "'random' is a method, so write random:key=value."),
    ],
)
def test_what_cannot_be_used_is_one_sentence(site: Path, name: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        method_class(name)
    text = str(caught.value)
    assert why in text
    assert text.isprintable()
    assert len(text) < 400


def test_a_task_is_checked_as_a_method_is(site: Path) -> None:
    for name, why in (
        ("plugged:Typeless", "'question_types' must be a tuple"),
        ("plugged:Good", "it is not a subclass of kvscope.tasks.base.Task"),
        ("kvscope.tasks.base:Task", "it does not define build, min_length_tokens, score"),
    ):
        with pytest.raises(UsageError, match=re.escape(why)):
            task_class(name)
    write_package(site)
    with pytest.raises(UsageError, match="position must be start or end, got 'middle'"):
        create_task("evict.task:LastWord:position=middle")


def test_names_that_two_bring_are_refused_with_both(site: Path) -> None:
    write_distribution(
        site, "one", "[kvscope.methods]\ngood = plugged:Good\ndense = plugged:Good\nother = plugged:Good\n"
    )
    write_distribution(site, "two", "[kvscope.methods]\ngood = twin:Good\nbroken = torn:Class\n")
    plugins.installed.cache_clear()
    for name, places in (
        ("good", "plugged:Good of one and twin:Good of two"),
        ("dense", "kvscope.methods.dense.method:Dense of kvscope and plugged:Good of one"),
    ):
        with pytest.raises(UsageError, match=f"Two packages bring a method '{name}': {places}"):
            create_method(name)
    with pytest.raises(UsageError, match=r"'other' .* its class has the name 'good': entry point and class must agree"):
        create_method("other")
    lines = {line.split()[0]: line for line in list_text("methods").splitlines()}
    assert "cannot be used: importing torn raised ModuleNotFoundError" in lines["broken"]
    assert "Two packages bring" in lines["good"]
    assert "every token" in lines["quest"]


def test_two_classes_of_one_name_are_not_in_one_run(site: Path) -> None:
    methods = [create_method(name) for name in ("plugged:Good", "twin:Good")]
    assert [method.label for method in methods] == ["good", "good"]
    with pytest.raises(UsageError, match="plugged:Good and twin:Good both have the name 'good'"):
        check_one_class_a_name(methods)
    check_one_class_a_name(methods[:1] * 2)


COLLECTED_LATE = """
import gc, sys, weakref
from kvscope.plugins import MANY_MODULES, importing

class Made:
    pass

with importing():
    assert not gc.isenabled()
    made = Made()
    made.itself = made
    sys.modules.update({f"of_many_{n}": sys for n in range(MANY_MODULES)})
assert gc.isenabled() and gc.get_freeze_count() == 0
assert any(each is made for each in gc.get_objects(generation=2))
gone = weakref.ref(made)
del made
gc.collect()
assert gone() is None
gc.freeze()
frozen = gc.get_freeze_count()
with importing():
    pass
assert gc.get_freeze_count() >= frozen > 0
gc.disable()
with importing():
    pass
assert not gc.isenabled()
"""


def test_what_imports_make_is_old_and_still_garbage_when_it_is_done_with() -> None:
    """In a process of its own: the tests' own has frozen what was there."""
    ran = subprocess.run([sys.executable, "-c", COLLECTED_LATE], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_failed_import_lets_the_collector_go_on() -> None:
    assert gc.isenabled()
    with pytest.raises(ImportError), plugins.importing():
        raise ImportError
    assert gc.isenabled()
