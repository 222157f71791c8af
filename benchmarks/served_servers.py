"""kvscope against real servers on a free port of this machine: `transformers serve` and llama.cpp's.

    pip install "transformers[serving]" xllamacpp
    kvscope models fetch smollm2-135m
    python benchmarks/served_servers.py --out benchmarks/results/served_servers.json

Of each server it keeps what the probe found, a small run whose server is killed after two answers and started again,
and kvscope's own dense answers beside the server's. Last, `same-answers` compares llama.cpp's server with itself, its
keys kept in 4 bits. It ends with 0 when every check holds, else with 1.
"""

import argparse
import json
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import requests

import kvscope
from kvscope.errors import EnvironmentProblem
from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.engine.public_models import public_model_file
from kvscope.harness.passes.progress import Progress
from kvscope.harness.studies.same_answers import same_answers

START_S = 120.0
FOUR_BITS = "llama.cpp, keys in 4 bits"
LLAMA_CPP = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 4096, 2, 2
if len(sys.argv) > 3:
    params.cache_type_k = getattr(xllamacpp.ggml_type, sys.argv[3])
server = xllamacpp.Server(params)
threading.Event().wait()
"""


@dataclass(frozen=True)
class Kind:
    """A kind of server, and a model that it serves and kvscope knows, too."""

    package: str
    model: str
    command: Callable[[int], list[str]]
    ours: dict[str, Any]


def llama_cpp(port: int, *cache_type: str) -> list[str]:
    """Return the command of llama.cpp's server."""
    return [sys.executable, "-c", LLAMA_CPP, str(public_model_file("smollm2-135m")), str(port), *cache_type]


KINDS = {
    "transformers serve": Kind(
        "transformers",
        "reference",
        lambda port: [sys.executable, "-m", "transformers.cli.transformers", "serve", str(REFERENCE_MODEL_FOLDER),
                      "--port", str(port), "--device", "cpu"],
        {"task": "niah_multikey_2", "length_tokens": 1024, "samples": 6},
    ),
    "llama.cpp": Kind(
        "xllamacpp",
        "smollm2-135m",
        llama_cpp,
        {"task": "niah_single_1", "length_tokens": 512, "samples": 6},
    ),
}  # fmt: skip


class Killing(Progress):
    """Kills a process once two prompts are done."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process, self._done = process, 0

    def end_step(self, *, work_tokens: int, cell: str | None = None) -> None:
        """Count one more."""
        del work_tokens, cell
        self._done += 1
        if self._done == 2:
            self._process.kill()
            self._process.wait()


def main() -> int:
    """Try every kind of server; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file of the result (JSON)")
    parser.add_argument("--only", choices=[*KINDS, FOUR_BITS], action="append", help="this kind alone; repeatable")
    given = parser.parse_args()
    names = given.only or [*KINDS, FOUR_BITS]
    results = {name: four_bits() if name == FOUR_BITS else tried(name) for name in names}
    told = {
        "kvscope": kvscope.__version__,
        "python": platform.python_version(),
        "transformers": metadata.version("transformers"),
        "torch": metadata.version("torch"),
        "servers": results,
    }
    if given.out is not None:
        given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    bad = [
        f"{name}: {check}" for name, found in results.items() for check, holds in found["checks"].items() if not holds
    ]
    print("\n".join(bad) if bad else "all checks hold")
    return 1 if bad else 0


def tried(name: str) -> dict[str, Any]:
    """Return what came of one kind of server."""
    kind, port = KINDS[name], free_port()
    url = f"http://127.0.0.1:{port}/v1"
    asked: dict[str, Any] = {
        "tasks": [kind.ours["task"]],
        "lengths_tokens": [kind.ours["length_tokens"]],
        "samples": kind.ours["samples"],
        "tokenizer": kind.model,
        "max_new_tokens": 48,
        "concurrency": 2,
    }
    print(f"{name}: {kind.package} {metadata.version(kind.package)}, {kind.model}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        config = {**asked, "model": url, "out": f"{folder}/run"}
        kept = None
        with served(kind, port) as process:
            try:
                kvscope.run({**config, "request_tries": 1, "concurrency": 1}, progress=Killing(process))
            except EnvironmentProblem as error:
                kept = str(error)
        with served(kind, port):
            run = kvscope.run(config, progress=False)
            beside = same_answers(kind.model, url, values=asked, progress=False)
        found = run.info.resumptions[-1].environment if run.info.resumptions else run.info.environment
    accuracy = float(run.samples["score"].mean())
    print(
        f"  accuracy {accuracy:.2f} over {len(run.samples)} prompts; beside kvscope's dense: {beside.sentence}",
        flush=True,
    )
    return {
        "package": f"{kind.package} {metadata.version(kind.package)}",
        "model": kind.model,
        "found": found["server"],
        "accuracy": accuracy,
        "rows": len(run.samples),
        "beside_dense": {key: beside.plain()[key] for key in ("verdict", "sentence", "same", "noise")},
        "checks": {
            "a kill after two answers ends the run and keeps them": kept is not None and "2 rows are kept" in kept,
            "the same command has all rows": set(run.samples["status"]) == {"ok"}
            and len(run.samples) == kind.ours["samples"],
            "the server's count is ours": bool(
                (run.samples["prompt_tokens"] == [row["prompt_tokens"] for row in run.samples["served"]]).all()
            ),
            "A repeats itself": beside.noise.mean == 1.0,
        },
    }


def four_bits() -> dict[str, Any]:
    """Compare llama.cpp's server with one that keeps keys in 4 bits."""
    plain = KINDS["llama.cpp"]
    small = replace(plain, command=lambda port: llama_cpp(port, "GGML_TYPE_Q4_0"))
    asked = {"tasks": ["niah_single_1"], "lengths_tokens": [256], "samples": 16, "max_new_tokens": 40,
             "tokenizer": plain.model, "chat_template": "none"}  # fmt: skip
    ports = free_port(), free_port()
    with served(plain, ports[0]), served(small, ports[1]):
        found = same_answers(*(f"http://127.0.0.1:{port}/v1" for port in ports), values=asked, progress=False)
    print(f"{FOUR_BITS}: {found.sentence}", flush=True)
    return {
        "package": f"{plain.package} {metadata.version(plain.package)}",
        "model": plain.model,
        "same_answers": {key: value for key, value in found.plain().items() if key not in ("a", "b")},
        "checks": {"A repeats itself": found.noise.mean == 1.0, "it differs": found.verdict == "different"},
    }


@contextmanager
def served(kind: Kind, port: int) -> "Iterator[subprocess.Popen[bytes]]":
    """Run a server until its models are listed, and end it."""
    process = subprocess.Popen(kind.command(port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + START_S
        while True:
            try:
                if requests.get(f"http://127.0.0.1:{port}/v1/models", timeout=5).ok:
                    break
            except requests.RequestException:
                pass
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{kind.package} does not serve (exit code {process.poll()}): is it installed?")
            time.sleep(0.5)
        yield process
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    """Return a port that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
