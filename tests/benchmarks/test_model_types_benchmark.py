"""The sweep over model types: what it calls equal, refused and wrong, on types that stand for each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "model_types.py"


@pytest.fixture
def swept(tmp_path):
    def sweep(*arguments):
        out = tmp_path / "model_types.json"
        command = [sys.executable, str(SCRIPT), "--out", str(out), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done, json.loads(out.read_text())["types"]

    return sweep


def test_a_plain_a_windowed_and_a_refused_type(swept):
    done, types = swept("--only", "llama", "gemma3_text", "deepseek_v3", "llama4_text")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: found["status"] for name, found in types.items()} == {
        "llama": "equal",
        "gemma3_text": "equal",
        "deepseek_v3": "refused",
        "llama4_text": "refused",
    }
    assert types["deepseek_v3"]["reason"] == "latent"
    assert types["llama4_text"]["reason"] == "chunked attention"
    windowed = types["gemma3_text"]
    assert windowed["held_of_predicted_bytes"] == 1.0
    assert windowed["context_effect"] > 100 * windowed["error"], "a far token moves the logits"
    assert all(difference < 1e-5 for difference in windowed["methods"].values()), "full budget equals dense"


def test_a_type_of_every_kind_that_once_was_wrong_or_raised(swept):
    equal = ["bart", "phi", "gpt2", "gemma4_text", "mimo_v2_flash", "got_ocr2"]
    refused = {"diffllama": "attends twice", "hrm_text": "layers in cycles", "rwkv": "no KV"}
    done, types = swept("--only", *equal, *refused)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {name: types[name]["status"] for name in equal} == dict.fromkeys(equal, "equal")
    assert {name: types[name]["reason"] for name in refused} == refused
    assert all(types[name]["held_of_predicted_bytes"] == 1.0 for name in equal)


def test_a_second_call_resumes_what_is_done(swept):
    swept("--only", "llama")
    done, types = swept("--only", "llama", "deepseek_v3", "--resume")
    assert "[1/2]" not in done.stdout
    assert "[2/2]" in done.stdout
    assert set(types) == {"llama", "deepseek_v3"}
