"""Shared test setup: one torch thread a test process, a cache of the tests' own, GPU tests skipped with a reason."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pynvml

# Imports and collection make modules and tests, no garbage, and a collector that looks through them each time takes
# a fifth of their time. It is off until ``pytest_collection_finish``, so that every test runs with it.
gc.disable()

# Before torch and tokenizers read them, and for the processes that tests start: two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Without a GPU, kernels run in Triton's interpreter. Triton reads this as it is imported, which a conftest below may do
# (transformers 5.17 with torch 2.11 does). Where torch cannot use the GPU that there is, ``pytest_configure`` sets it.
try:
    pynvml.nvmlInit()
except pynvml.NVMLError:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before anything reads it: what is cached (hashes of models' files) is shared by the processes of one run of the tests,
# and neither taken from the user's cache nor left there. Models of the hub and matplotlib's list of fonts are where the
# user has them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _users_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("HF_HOME", str(Path(_users_cache, "huggingface")))
    os.environ.setdefault("MPLCONFIGDIR", str(Path(_users_cache, "matplotlib")))  # its list of fonts takes seconds
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="kvscope-tests-cache-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import pytest
from hypothesis import HealthCheck, settings
from interpreter import quick_interpreter
from looked_at_once import models_looked_at_once
from one_stack import in_one_piece
from own_server import server_set_aside
from tiny import one_thread, small, tiny_model

from kvscope.harness.passes import environment, process, quiet

# The same examples on every machine, and as much time for them as a loaded one needs.
settings.register_profile("kvscope", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvscope")

__all__ = ["one_thread", "server_set_aside", "small", "tiny_model"]

_begun: set[Path] = set()


def pytest_collection_finish() -> None:
    """Turn the garbage collector on for what comes from now on; modules and tests that are there stay to the end."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> object:
    """Run each test, its fixtures included, as pytest does, where its calls need no memory of the kernel."""
    return in_one_piece(item.config.pluginmanager.get_plugin("runner").pytest_runtest_protocol, item, nextitem)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Keep what the first test of a file imported from the collector, too: every run ends by a whole collection."""
    yield
    if item.path not in _begun:
        _begun.add(item.path)
        gc.collect()
        gc.freeze()


def pytest_unconfigure() -> None:
    """Look for garbage once more, everywhere; pytest, which does so five times behind this, finds what is left.

    At exit the collector sees the modules again: bindings complain of leaks where it cannot free them.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)


@pytest.fixture(autouse=True, scope="session")
def one_worker_server() -> None:
    """One server forks the workers of all tests: the name of the test at hand is no environment of its own."""
    real = process.worker_environment
    process.worker_environment = lambda: {k: v for k, v in real().items() if k != "PYTEST_CURRENT_TEST"}


@pytest.fixture(autouse=True, scope="session")
def quiet_machine() -> Iterator[None]:
    """What a run says of the machine's load is not the same on every machine."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(quiet, "load_1min", lambda: 0.0)
        yield


@pytest.fixture(autouse=True, scope="session")
def checkout_asked_once() -> Iterator[None]:
    """Every run asks git three times for the checkout's state; the tests' own does not change."""
    real = environment.git_state
    known: dict[str | None, dict[str, Any]] = {}

    def git_state() -> dict[str, Any]:
        told = os.environ.get(environment.COMMIT_VARIABLE)
        if told not in known:
            known[told] = real()
        return known[told]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(environment, "git_state", git_state)
        yield


@pytest.fixture(autouse=True, scope="session")
def no_wait_for_the_disk() -> Iterator[None]:
    """Let ``os.fsync`` return at once in the test process: no test cuts the power, and each row of a run asks for it.

    What a test kills is a process of its own, which waits as users' do.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "fsync", lambda fd: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def looked_at_once() -> Iterator[None]:
    """Runs of the same model read its tokenizer, and try its attention, once a process.

    Where no test file has imported transformers, few tests run a model: they do not wait for the import.
    """
    if "transformers" not in sys.modules:
        yield
        return
    with models_looked_at_once():
        yield


@pytest.fixture(autouse=True, scope="session")
def quickly_interpreted() -> Iterator[None]:
    """Where kernels are interpreted, and there is Triton, its interpreter repeats no work."""
    if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
        yield
        return
    with quick_interpreter():
        yield


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Draws without a generator are the same whichever tests ran before in this process."""
    import torch

    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    """Keep the order of files below, and let kernels run where tests do.

    pytest-xdist would deal the files of many tests first, wherever the slow ones are. What is set is its
    ``--no-loadscope-reorder``, said here so that every call of pytest has it.
    """
    config.option.loadscopereorder = False
    # The process that deals tests out runs none: the others wait for it, so it imports no torch (5 seconds).
    deals = bool(getattr(config.option, "numprocesses", None)) and not hasattr(config, "workerinput")
    if not deals:
        import torch

        if not torch.cuda.is_available():
            os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    # Slow files first, then those of many tests: no process is left with a long file while the others have ended.
    n_tests = Counter(item.path for item in items)
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: (item.path not in slow, -n_tests[item.path]))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA GPU on this machine")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
