"""What a run was measured on: versions, GPU, CPU, commit. Never host names, user names or absolute paths."""

import os
import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import kvscope
from kvscope.harness.passes.timing import usable_cores

#: Where a copy without its repository is told the commit it was made of.
COMMIT_VARIABLE = "KVSCOPE_COMMIT"
PACKAGES = ("torch", "transformers", "triton", "tokenizers", "numpy", "nvidia-ml-py", "lm_eval")


def capture_environment(*, device: str | None = None, attention_backend: str | None = None) -> dict[str, Any]:
    """Return the environment as plain JSON values; a value that cannot be read is None.

    Args:
        device: the device that computes, e.g. ``cpu`` or ``cuda:0``; None leaves the GPU out.
        attention_backend: name of the attention function in force, as the model loader reports it.
    """
    return {
        "kvscope": kvscope.__version__,
        **git_state(),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_cores": usable_cores(),
        "host_memory_bytes": host_memory_bytes(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "device": device,
        "attention_backend": attention_backend,
        **torch_state(device),
    }


@cache
def package_version(name: str) -> str | None:
    """Return the installed version of a distribution, or None; asked once: every row names some."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def host_memory_bytes() -> int:
    """Return the total host memory."""
    import psutil

    return int(psutil.virtual_memory().total)


def cpu_name() -> str | None:
    """Return the processor's model name where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or None


def torch_state(device: str | None) -> dict[str, Any]:
    """Return threads, CUDA version, GPU name and memory, driver version and compute capability."""
    import torch

    state: dict[str, Any] = {
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpu": None,
        "gpu_memory_bytes": None,
        "gpu_capability": None,
        "driver": None,
    }
    if device is None or not device.startswith("cuda") or not torch.cuda.is_available():
        return state
    properties = torch.cuda.get_device_properties(torch.device(device))
    state["gpu"] = properties.name
    state["gpu_memory_bytes"] = properties.total_memory
    state["gpu_capability"] = f"{properties.major}.{properties.minor}"
    state["driver"] = driver_version()
    return state


def driver_version() -> str | None:
    """Return the NVIDIA driver's version, or None without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        version = pynvml.nvmlSystemGetDriverVersion()
    except (ImportError, OSError):
        return None
    except pynvml.NVMLError:
        return None
    return version if isinstance(version, str) else str(version.decode())


def git_state(folder: Path | None = None) -> dict[str, Any]:
    """Return ``commit`` and ``dirty`` of the checkout that kvscope runs from; both None for an installed package.

    A copy that travels without its history (to a container, to a compute node) can be told its commit in
    ``KVSCOPE_COMMIT``, which then counts; whether it was changed since is not known.

    The top of the checkout must be this project's own: a wheel inside somebody's repository is no checkout of kvscope.
    """
    if told := os.environ.get(COMMIT_VARIABLE):
        return {"commit": told, "dirty": None}
    unknown = {"commit": None, "dirty": None}
    folder = folder or Path(__file__).resolve().parent
    try:
        top = _git(folder, "rev-parse", "--show-toplevel")
        if not (Path(top) / "src" / "kvscope").is_dir():
            return unknown
        # Without the lock of the index, which a commit that the user makes at that moment would miss.
        changed = _git(folder, "--no-optional-locks", "status", "--porcelain")
        return {"commit": _git(folder, "rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return unknown


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
