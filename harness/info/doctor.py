"""``kvscope doctor``: what this machine has, what it lacks, and how to mend it."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from kvscope.harness.passes.memory import NvmlProcessMemory

GIB = 1024**3
MIN_PYTHON = (3, 11)
MIN_DISK_BYTES = 2 * GIB
MIN_MEMORY_BYTES = 4 * GIB


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding. ``fail`` means that kvscope cannot run here; ``warn`` that something it can do will be missing."""

    name: str
    status: Literal["ok", "warn", "fail"]
    finding: str
    mend: str = ""


def run_checks(folder: Path) -> list[Check]:
    """Run every check; ``folder`` is where results would be written. No check raises."""
    checks: list[Callable[[], Check]] = [
        check_python,
        lambda: check_package("torch", "torch", needed=True),
        lambda: check_package("transformers", "transformers", needed=True),
        lambda: check_package("lm_eval", "lm_eval", needed=False),
        check_gpu,
        check_nvml,
        check_triton,
        check_reference_model,
        check_memory,
        lambda: check_disk(folder),
        lambda: check_writable(folder),
    ]
    return [check() for check in checks]


def check_python() -> Check:
    """Python is at least the version the package asks for."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info >= MIN_PYTHON:
        return Check(name="python", status="ok", finding=version)
    return Check(name="python", status="fail", finding=version, mend="install Python 3.11 or newer")


def check_package(name: str, distribution: str, *, needed: bool) -> Check:
    """A Python package is installed."""
    try:
        return Check(name=name, status="ok", finding=metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return Check(
            name=name,
            status="fail" if needed else "warn",
            finding="not installed",
            mend=f"pip install {distribution}",
        )


def check_gpu() -> Check:
    """torch sees a CUDA GPU."""
    try:
        import torch
    except ImportError:
        return Check(name="gpu", status="warn", finding="unknown: torch does not import", mend="pip install torch")
    if torch.cuda.is_available():
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        return Check(
            name="gpu", status="ok", finding=f"{name}, {free_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB free"
        )
    built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
    return Check(
        name="gpu",
        status="warn",
        finding=f"none ({built}): runs compute on the CPU",
        mend="use a machine with an NVIDIA GPU for physical memory and GPU timings",
    )


def check_nvml() -> Check:
    """NVML answers, so that physical GPU memory can be measured."""
    reason = NvmlProcessMemory().reason
    if reason is None:
        return Check(name="nvml", status="ok", finding="the driver reports memory per process")
    return Check(
        name="nvml",
        status="warn",
        finding=f"{reason}: GPU memory columns will be null with this reason",
        mend="install the NVIDIA driver (libnvidia-ml.so) to measure physical GPU memory",
    )


def check_triton() -> Check:
    """triton is there for the GPU kernels; the CPU does not need it."""
    import torch

    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        if not torch.cuda.is_available():
            return Check(name="triton", status="ok", finding="not installed, and not needed without a GPU")
        return Check(name="triton", status="warn", finding="not installed", mend="pip install triton")
    return Check(name="triton", status="ok", finding=version)


def check_reference_model() -> Check:
    """The embedded model's weights and tokenizer are in the package."""
    try:
        from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
    except ImportError as error:
        return Check(name="reference model", status="fail", finding=f"the model loader does not import: {error}")
    folder = REFERENCE_MODEL_FOLDER
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    weights_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if missing or not weights_bytes:
        return Check(
            name="reference model",
            status="fail",
            finding=f"missing from the package: {', '.join(missing) or 'weights'}",
            mend="reinstall kvscope; until then pass --model with a folder or a Hugging Face id",
        )
    return Check(name="reference model", status="ok", finding=f"{weights_bytes / 1e6:.0f} MB of weights")


def check_memory() -> Check:
    """Host memory: KV caches are mirrored there."""
    import psutil

    memory = psutil.virtual_memory()
    finding = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    if memory.available < MIN_MEMORY_BYTES:
        return Check(
            name="host memory", status="warn", finding=finding, mend="close other programs, or use short lengths"
        )
    return Check(name="host memory", status="ok", finding=finding)


def existing_parent(folder: Path) -> Path:
    """Return ``folder``, or the nearest parent of it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def check_disk(folder: Path) -> Check:
    """There is room for results."""
    free_bytes = shutil.disk_usage(existing_parent(folder)).free
    finding = f"{free_bytes / GIB:.1f} GiB free"
    if free_bytes < MIN_DISK_BYTES:
        return Check(name="disk", status="warn", finding=finding, mend="free some space, or choose another --out")
    return Check(name="disk", status="ok", finding=finding)


def check_writable(folder: Path) -> Check:
    """Results can be written where they would go."""
    place = existing_parent(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Check(
            name="output folder",
            status="fail",
            finding=f"cannot write here: {error.strerror or os.strerror(error.errno or 0)}",
            mend="choose a folder you may write to with --out",
        )
    return Check(name="output folder", status="ok", finding="writable")


def failed(checks: list[Check]) -> bool:
    """Whether something that kvscope needs is missing."""
    return any(check.status == "fail" for check in checks)
