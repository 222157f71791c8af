"""The benchmark of uneven sequences on a CPU: Triton interprets, and a flashinfer in plain torch takes its place."""

import sys
from types import ModuleType

import pytest
import torch
from benchmark_scripts import load_script

pytest.importorskip("triton")
CPU = torch.device("cpu")


class Wrapper:
    """Batch decode over pages [page, K or V, head, token, D], as its own layout has them."""

    def __init__(self, workspace, layout, *, use_tensor_cores, backend):
        assert layout == "HND"

    def plan(self, starts, indices, last_tokens, n_heads, n_kv_heads, head_dim, page_tokens, **dtypes):
        self.starts, self.indices, self.last_tokens = starts.tolist(), indices, last_tokens.tolist()
        self.group, self.page_tokens = n_heads // n_kv_heads, page_tokens
        assert starts.dtype == indices.dtype == last_tokens.dtype == torch.int32

    def run(self, q_BQD, pool):
        out = []
        for q_QD, first, end, last in zip(q_BQD, self.starts, self.starts[1:], self.last_tokens, strict=False):
            pages = pool[self.indices[first:end].long()].double()
            n_tokens = (end - first - 1) * self.page_tokens + last
            k, v = (pages[:, i].transpose(0, 1).flatten(1, 2)[:, :n_tokens] for i in range(2))
            k, v = (x.repeat_interleave(self.group, 0) for x in (k, v))
            logits = torch.einsum("qd,qtd->qt", q_QD.double(), k) * q_QD.shape[1] ** -0.5
            out.append(torch.einsum("qt,qtd->qd", logits.softmax(1), v).to(q_QD.dtype))
        return torch.stack(out)


@pytest.fixture
def script(monkeypatch):
    found = load_script(monkeypatch, "uneven_cases")
    fake = ModuleType("flashinfer")
    fake.BatchDecodeWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(found, "DEVICE", CPU)
    monkeypatch.setattr(found, "DTYPE", torch.float32)  # bf16 is wrong in the interpreter
    monkeypatch.setattr(found, "median_s", lambda calls: [call() for call in calls] and 1.0)
    monkeypatch.setattr(found, "UNEVEN_CASES", ((3, 5, 200),))
    return found


def test_ours_and_flashinfers_are_held_against_the_reference(script):
    ours, theirs = script.uneven_rows()
    assert (ours["op"], theirs["op"]) == ("uneven_decode", "flashinfer uneven")
    assert ours["case"] == theirs["case"]
    assert 0 < ours["largest_error"] < 1e-2
    assert 0 < theirs["largest_error"] < 1e-2
    assert ours["bytes"] == theirs["bytes"] == ours["tokens"] * 8 * 2 * 128 * 2
    assert "tensor cores, fa2" in theirs["note"]


def test_what_differs_from_the_reference_is_not_timed(script):
    lengths = script.lengths_of(3, 5, 200)
    stores, q = [script.sequence(n) for n in lengths], script.queries(3)
    with pytest.raises(ValueError, match="relative error"):
        script.largest_error(torch.zeros_like(q), q, stores)
