"""kvscope against `transformers serve`, with the tiny model; `benchmarks/served_servers.py` has llama.cpp's, too."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

import kvscope
from kvscope.harness.studies.same_answers import same_answers

NEEDED = ("fastapi", "uvicorn", "openai")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason="`transformers serve` needs the extra transformers[serving], which kvscope does not",
    ),
]


@pytest.fixture
def served(tiny_model: str) -> Iterator[str]:
    """Serve the tiny model on a free port; return the URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", tiny_model, "--port", str(port),
               "--device", "cpu"]  # fmt: skip
    process = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        while process.poll() is None:
            try:
                if requests.get(f"{url}/models", timeout=5).ok:
                    break
            except requests.RequestException:
                time.sleep(0.2)
        assert process.poll() is None, "the server ended by itself"
        yield url
    finally:
        process.kill()
        process.wait()


def test_a_tiny_model_behind_transformers_serve(served: str, tiny_model: str, tmp_path: Path) -> None:
    values = {"tasks": ["niah_single_1"], "lengths_tokens": [512], "samples": 3, "max_new_tokens": 8}
    run = kvscope.run(
        {**values, "model": served, "tokenizer": tiny_model, "concurrency": 2, "out": str(tmp_path / "run")},
        progress=False,
    )
    assert set(run.samples["status"]) == {"ok"}
    found = run.info.environment["server"]
    assert isinstance(found, dict)
    assert (found["form"], found["fields"], found["extra_prompt_tokens"]) == ("text", ["seed"], 0)
    assert [row["prompt_tokens"] for row in run.samples["served"]] == [504] * 3
    beside = same_answers(
        tiny_model, served, values={**values, "tokenizer": tiny_model, "device": "cpu"}, progress=False
    )
    assert beside.verdict == "same", beside.text()
