"""The wheel a user installs: built from the sdist, one top-level name, the script runs outside the checkout."""

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
#: To pack the model's weights takes longer than all the rest of a build: the sdist, which is unpacked at once, stores
#: them, and the wheel packs quickly, which makes it larger.
QUICKLY_PACKED = """
import gzip
import zlib
gzip.GzipFile.__init__.__defaults__ = (None, None, 0, None, None)  # compresslevel
zlib.Z_DEFAULT_COMPRESSION = 1
"""


def call(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build sdist, then the wheel from the unpacked sdist alone."""
    out = tmp_path_factory.mktemp("dist")
    customized = tmp_path_factory.mktemp("customized")
    (customized / "sitecustomize.py").write_text(QUICKLY_PACKED)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(customized), *sys.path])}
    # A copy of what git would ship: build backends must not see the checkout's other files.
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out, env=env)
    assert len(list(out.glob("kvscope-*.tar.gz"))) == 1
    (made,) = out.glob("kvscope-*.whl")
    return made


def test_wheel_holds_one_top_level_package_with_the_reference_model(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"kvscope"}
    inside = {name.removeprefix("kvscope/") for name in names}
    weights = "harness/reference_model/weights/"
    for needed in ("cli.py", "py.typed", "harness/passes/sweep.py", "reports/html.py", "methods/dense/README.md"):
        assert needed in inside, needed
    for needed in ("config.json", "tokenizer.json", "model.safetensors.index.json", "README.md"):
        assert weights + needed in inside, needed
    assert not any(name.startswith(("tests/", "results/reference/")) or "__pycache__" in name for name in inside)
    assert wheel.stat().st_size < 45 * 1024**2


def test_wheel_and_sdist_hold_the_trained_indexers_as_they_are(wheel: Path) -> None:
    """Without them a plain ``-m lsa`` or ``-m dsa`` on the reference model is refused."""
    folders = [path.parent.relative_to(ROOT) for path in ROOT.glob("methods/*/indexers/*/config.json")]
    assert len(folders) >= 4
    (sdist,) = wheel.parent.glob("kvscope-*.tar.gz")
    with zipfile.ZipFile(wheel) as packed, tarfile.open(sdist) as source:
        top = source.getnames()[0].split("/")[0]
        for folder in folders:
            assert (ROOT / folder / "indexer.safetensors").is_file(), folder
            for path in sorted((ROOT / folder).iterdir()):
                name = path.relative_to(ROOT).as_posix()
                assert packed.read(f"kvscope/{name}") == path.read_bytes(), name
                held = source.extractfile(f"{top}/{name}")
                assert held is not None, name
                assert held.read() == path.read_bytes(), name


@pytest.fixture(scope="module")
def script(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel alone; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    # Dependencies come from the running interpreter, behind the wheel's own files; an editable kvscope must not.
    outer = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(outer) + "\n")
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    call(*pip, "install", "--no-deps", "--no-index", "--no-compile", wheel, cwd=folder)
    return folder / "bin" / "kvscope"


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def test_script_runs_outside_the_checkout(script: Path, tmp_path: Path) -> None:
    env = clean_environment()
    where = "import kvscope, pathlib; print(pathlib.Path(kvscope.__file__).resolve())"
    assert str(script.parent.parent) in call(script.parent / "python", "-c", where, cwd=tmp_path, env=env)
    assert call(script, "--version", cwd=tmp_path, env=env).startswith("kvscope 0.")
    assert "reference" in call(script, "list", "models", cwd=tmp_path, env=env)
    call(
        script, "run", "-m", "dense", "-m", "lsa", "-m", "dsa", "--task", "niah_single_1", "--length", "1k",
        "--samples", "1", "--max-new-tokens", "8", "--no-footprint", "--out", "out", cwd=tmp_path, env=env,
    )  # fmt: skip
    assert (tmp_path / "out" / "report" / "report.html").stat().st_size > 10_000
    rows = (tmp_path / "out" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["status"] for row in rows] == ["ok"] * 3, "lsa and dsa have their trained indexers"


def test_the_script_s_help_imports_nothing_heavy(script: Path, tmp_path: Path) -> None:
    environment = {**clean_environment(), "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([script, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert {"kvscope", "typer"} <= imported, "the interpreter noted no imports"
    assert not imported & {"torch", "transformers", "triton", "pandas", "numpy", "scipy", "matplotlib"}
