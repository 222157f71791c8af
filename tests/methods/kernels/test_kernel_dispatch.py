"""Which backend is in use, every reason why, and that nothing needs Triton where it is not used."""

import os
import subprocess
import sys

import pytest
import torch
from tiny import save_tiny_model

from kvscope.harness.engine.models import load_model
from kvscope.methods.kernels import dispatch

SHAPE = {"head_dim": 128, "n_q_heads": 32, "n_kv_heads": 8}


def test_a_cpu_computes_in_torch_and_says_why():
    found = dispatch.decode_backend("cpu", dtype=torch.float32, **SHAPE)
    assert (found.name, found.version) == ("torch", torch.__version__)
    assert found.reasons == ("the device is cpu, kernels need a CUDA GPU",)


def test_every_reason_is_given():
    reasons = dispatch.unsupported_decode("cpu", dtype=torch.float64, head_dim=40, n_q_heads=200, n_kv_heads=2)
    assert len(reasons) == 4
    for part in ("the device is cpu", "torch.float64", "head size is 40", "100 query heads"):
        assert any(part in reason for reason in reasons)


@pytest.fixture
def fake_gpu(monkeypatch):
    def use(capability):
        dispatch._unsupported_decode.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    yield use
    dispatch._unsupported_decode.cache_clear()


def test_an_old_gpu_and_a_missing_compiler_are_reasons(fake_gpu, monkeypatch):
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: None)
    fake_gpu((7, 5))
    reasons = dispatch.unsupported_decode("cuda:0", dtype=torch.bfloat16, **SHAPE)
    assert any("compute capability 7.5" in reason for reason in reasons)
    assert any("no C compiler" in reason for reason in reasons)


def test_a_gpu_computes_in_triton(fake_gpu, monkeypatch):
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: "/usr/bin/cc")
    fake_gpu((9, 0))
    found = dispatch.decode_backend("cuda:0", dtype=torch.bfloat16, **SHAPE)
    assert found.name == "triton"
    assert not found.reasons


def test_without_triton_everything_runs_in_torch():
    program = """
import sys
sys.modules["triton"] = None
import torch
from kvscope.methods.attention import paged_attention
from kvscope.methods.base import AttentionCall
from kvscope.methods.kernels.dispatch import decode_backend
q, kv = torch.ones(1, 2, 1, 16), torch.ones(1, 1, 1, 16)
out = paged_attention(AttentionCall(query=q, key=kv, value=kv, scale=1.0), torch.ones(1, 1, 2, 16, 16), n_tokens=3)
assert torch.allclose(out, torch.ones(1, 2, 1, 16))
found = decode_backend("cpu", dtype=torch.float32, head_dim=16, n_q_heads=2, n_kv_heads=1)
assert found.name == "torch", found
assert any("Triton cannot be imported" in reason for reason in found.reasons), found
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr


def test_a_loaded_model_names_its_backend(tmp_path):
    save_tiny_model(tmp_path)
    loaded = load_model(str(tmp_path))
    if torch.cuda.is_available():
        assert loaded.attention_backend.endswith("paged_decode")
        assert "triton" in loaded.attention_backend
    else:
        assert "paged decode in torch operations (the device is cpu" in loaded.attention_backend


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled where there is a GPU")
def test_without_a_gpu_what_kernels_call_of_triton_is_interpreted_too():
    """Whoever imported Triton first, the tests' own setting was there before."""
    standard = pytest.importorskip("triton.language.standard")
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    assert isinstance(standard.cumsum, interpreter.InterpretedFunction)
