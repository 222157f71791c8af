"""lsa on a GPU: the same choices and logits as masked, copies behind the decode, memory that really falls."""

import pytest
import torch
from lsa_tools import prefilled, random_indexer, run_steps
from masked import masking
from sessions import Single
from tiny_models import build_stock, prompt_ids

from kvscope.harness.engine.models import wrap_model
from kvscope.methods.lsa.method import Lsa
from kvscope.methods.lsa.options import LsaConfig
from kvscope.methods.lsa.selection import ScriptedSelector
from kvscope.methods.registry import create_method

pytestmark = pytest.mark.gpu


def gpu_model(family, *, dtype=torch.float32, page_tokens=16):
    return wrap_model(build_stock(family).to(dtype).cuda(), None, name=family, page_tokens=page_tokens)


@pytest.mark.parametrize("refresh", ["sync", "stale1"])
@pytest.mark.parametrize("chunk_tokens", [16, 8, 12, 48])
@pytest.mark.parametrize("family", ["llama", "smollm3", "gpt_oss"])
def test_evicting_equals_masking_on_the_gpu(family, chunk_tokens, refresh):
    loaded = gpu_model(family)
    method = create_method(
        f"lsa:selection=synthetic,budget_fraction=0.6,tau=2,chunk_tokens={chunk_tokens},recency_tokens=20,"
        f"refresh={refresh}"
    )
    prompt = prefilled(loaded, prompt_ids(300), method, chunk_tokens=64)
    assert all(pages.is_pinned() for pages in prompt.pages.values())
    tokens = prompt_ids(20, seed=8)
    evicted, record, _ = run_steps(loaded, method, prompt, tokens)
    masked, masked_record, _ = run_steps(loaded, masking(method), prompt, tokens)
    torch.testing.assert_close(evicted, masked, atol=1e-5, rtol=0)
    assert record == masked_record
    dense, _, _ = run_steps(loaded, create_method("dense"), prompt, tokens)
    assert (evicted - dense).abs().max() > 1e-3


CUT = {"chunk_tokens": 12, "segment_tokens": 4, "neighbours": 2, "key_dim": 16}


@pytest.mark.parametrize("shape", [{}, CUT])
def test_the_gpu_chooses_what_the_cpu_chooses(tmp_path, shape):
    cpu = wrap_model(build_stock("smollm3"), None, name="smollm3", page_tokens=16)
    gpu = gpu_model("smollm3")
    folder = random_indexer(tmp_path / "indexer", cpu.shape, lookback_tokens=4, **shape)
    chosen = []
    for loaded in (cpu, gpu):
        method = create_method({"name": "lsa", "indexer": str(folder), "budget_fraction": 0.5, "recency_tokens": 20})
        prompt = prefilled(loaded, prompt_ids(300), method, chunk_tokens=64)
        sequence = method.open(prompt, loaded.device)
        chosen.append(sorted(next(iter(sequence._pools.values())).ids.tolist()))
        sequence.close()
    assert len(set(chosen[0]) ^ set(chosen[1])) <= 2, "rounding may swap a pair at the edge of the budget"


@pytest.mark.parametrize("rule", [{"budget_fraction": 0.5}, {"threshold": 0.5}])
@pytest.mark.parametrize("refresh", ["sync", "stale1"])
def test_captured_steps_with_segments_and_neighbours(tmp_path, refresh, rule):
    """Evicting and masking as it is launched, and replayed with the resident set changing between replays."""
    loaded = gpu_model("llama")
    folder = random_indexer(tmp_path / "indexer", loaded.shape, lookback_tokens=3, **CUT)
    method = create_method(
        {"name": "lsa", "indexer": str(folder), "tau": 3, "recency_tokens": 20, "refresh": refresh, **rule}
    )
    prompt = prefilled(loaded, prompt_ids(303), method, chunk_tokens=64)
    tokens = prompt_ids(20, seed=8)
    eager, record, footprint = run_steps(loaded, method, prompt, tokens)
    masked, masked_record, _ = run_steps(loaded, masking(method), prompt, tokens)
    torch.testing.assert_close(eager, masked, atol=1e-5, rtol=0)
    assert record == masked_record
    with Single(loaded, method, prompt, reserve_tokens=len(tokens), decode_graph="on") as session:
        replayed = torch.stack([session.step(token).clone() for token in tokens])  # one tensor, written anew
        assert session.step_backend == "cuda graph"
        assert "indexer_score" in " ".join(session.sequence._selector.backends())
        assert session.sequence.residency() == record
        assert session.sequence.footprint().bytes_read_per_step == footprint.bytes_read_per_step
    torch.testing.assert_close(replayed, eager, atol=1e-3, rtol=0)


def test_copies_behind_the_decode_arrive_whole():
    """Every interval brings other chunks; what is read is compared with the mirror bit by bit."""
    loaded = gpu_model("llama", dtype=torch.bfloat16)
    sets = [torch.tensor([k % 8, 8 + k % 5]).sort().values for k in range(12)]

    class Scripted(Lsa):
        def open(self, prompt, device, *, reserve_tokens=0):
            layout = self.layout(prompt.n_tokens)
            return self.open_with(prompt, device, ScriptedSelector(sets), layout=layout, reserve_tokens=reserve_tokens)

    config = LsaConfig(indexer="attention", chunk_tokens=16, recency_tokens=16, sink_tokens=16, tau=1, refresh="stale1")
    method = Scripted(config)
    prompt = prefilled(loaded, prompt_ids(300), method)
    with Single(loaded, method, prompt, reserve_tokens=12) as session:
        for token in prompt_ids(12, seed=8):
            session.step(token)
            torch.cuda.synchronize()
            for layer, pool in session.sequence._pools.items():
                for place, chunk in enumerate(pool.ids.tolist()):
                    assert torch.equal(pool.slots[place].cpu(), prompt.pages[layer][chunk])


def test_memory_falls_when_the_set_shrinks():
    loaded = gpu_model("llama", dtype=torch.bfloat16, page_tokens=64)
    n_tokens = 8192
    everything = torch.arange((n_tokens - 128) // 64)

    class Scripted(Lsa):
        def open(self, prompt, device, *, reserve_tokens=0):
            layout = self.layout(prompt.n_tokens)
            selector = ScriptedSelector([everything, everything[:4]])
            return self.open_with(prompt, device, selector, layout=layout, reserve_tokens=reserve_tokens)

    method = Scripted(LsaConfig(indexer="attention", chunk_tokens=64, recency_tokens=64, sink_tokens=64, tau=1))
    prompt = prefilled(loaded, prompt_ids(n_tokens), method)
    with Single(loaded, method, prompt, reserve_tokens=2) as session:
        held = []
        for token in (5, 6):
            session.step(token)
            held.append((torch.cuda.memory_allocated(), session.sequence.footprint().kv_bytes))
        freed_bytes, claimed_bytes = (before - after for before, after in zip(*held, strict=True))
        assert claimed_bytes == (len(everything) - 4) * 64 * loaded.shape.kv_bytes_per_token
        assert freed_bytes == pytest.approx(claimed_bytes, rel=0.02)


@pytest.mark.parametrize("encoder", ["mean", "stats", "pooled"])
def test_training_runs_on_the_gpu(tmp_path, encoder):
    from planted import planted_collection

    from kvscope.harness.indexers.lsa.train import train
    from kvscope.harness.indexers.lsa.train_config import TrainConfig

    data = planted_collection(tmp_path / "data", features="tokens" if encoder == "pooled" else "stats")
    config = TrainConfig(tau=1, epochs=6, lr=1e-2, lookback=1, recency_tokens=128, encoder=encoder, device="cuda")
    best = train([data], tmp_path / "out", config, note=lambda text: None)
    assert best["recall_at_tenth"] > 0.6
