"""The sweep over model types: what it calls equal, refused and wrong, on types that stand for each."""

import json
from pathlib import Path

import fresh
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "model_types.py"


EQUAL = ["bart", "phi", "gpt2", "gemma4_text", "mimo_v2_flash", "got_ocr2"]
REFUSED = {"diffllama": "attends twice", "hrm_text": "layers in cycles", "rwkv": "no KV"}


def sweep(out, *arguments):
    """Run the sweep; return how it went and what its file holds."""
    done = fresh.run([str(SCRIPT), "--out", str(out), *arguments])
    return done, json.loads(out.read_text())["types"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The file of one sweep, and what it holds."""
    out = tmp_path_factory.mktemp("swept") / "model_types.json"
    done, types = sweep(out, "--only", "llama", "gemma3_text", "deepseek_v3", *EQUAL, *REFUSED)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, types


@pytest.mark.slow
def test_a_plain_a_windowed_and_a_refused_type(swept):
    _, types = swept
    assert {name: types[name]["status"] for name in ("llama", "gemma3_text", "deepseek_v3")} == {
        "llama": "equal",
        "gemma3_text": "equal",
        "deepseek_v3": "refused",
    }
    assert types["deepseek_v3"]["reason"] == "latent"
    windowed = types["gemma3_text"]
    assert windowed["held_of_predicted_bytes"] == 1.0
    assert windowed["context_effect"] > 100 * windowed["error"], "a far token moves the logits"
    assert all(difference < 1e-5 for difference in windowed["methods"].values()), "full budget equals dense"


def test_a_type_of_every_kind_that_once_was_wrong_or_raised(swept):
    _, types = swept
    assert {name: types[name]["status"] for name in EQUAL} == dict.fromkeys(EQUAL, "equal")
    assert {name: types[name]["reason"] for name in REFUSED} == REFUSED
    assert all(types[name]["held_of_predicted_bytes"] == 1.0 for name in EQUAL)


def test_a_second_call_resumes_what_is_done(swept):
    out, before = swept
    done, types = sweep(out, "--only", "llama", "llama4_text", "--resume")
    assert "[1/2]" not in done.stdout
    assert "[2/2]" in done.stdout
    assert types.pop("llama4_text")["reason"] == "chunked attention"
    assert types == before
