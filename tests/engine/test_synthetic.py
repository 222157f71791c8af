"""Prompts of random values: the bytes of a prefill, without one."""

import dataclasses
from typing import Any

import pytest
import torch
from tiny_models import loaded_model

from kvscope.errors import HostMemoryShort, UsageError
from kvscope.harness.engine import prefill as prefill_module
from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.engine.synthetic import BLOCK_PAGES, synthetic_host_bytes, synthetic_prompt
from kvscope.methods.base import union_collectors
from kvscope.methods.registry import create_method, method_names
from kvscope.methods.shape import tensor_bytes

N_TOKENS = 1000
SPECS = {
    "lsa": "lsa:budget_tokens=300,recency_tokens=128,selection=synthetic",
    "dsa": "dsa:selection=synthetic",
    "random": "random:recency_tokens=128",
}


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("preset:tiny", device="cpu")


def test_a_mirror_has_pages_of_its_own_for_every_layer(tiny: LoadedModel) -> None:
    prompt = synthetic_prompt(tiny, N_TOKENS, mirror=True)
    assert prompt.host_bytes == tiny.shape.paged_kv_bytes(N_TOKENS)
    assert prompt.host_bytes == synthetic_host_bytes(tiny.shape, N_TOKENS, mirror=True)
    assert len({pages.data_ptr() for pages in prompt.pages.values()}) == 2


def test_without_a_mirror_layers_share_one_layers_pages(tiny: LoadedModel) -> None:
    """Dense at 512K of an 8B shape takes 2 GiB of host memory instead of 64."""
    prompt = synthetic_prompt(tiny, N_TOKENS, mirror=False)
    page_bytes = 64 * tiny.shape.layer_bytes_per_token
    assert prompt.host_bytes == 17 * page_bytes == synthetic_host_bytes(tiny.shape, N_TOKENS, mirror=False)
    assert tensor_bytes(prompt.pages.values()) == 17 * page_bytes


@pytest.mark.parametrize("mirror", [True, False])
def test_pages_look_like_a_prefills(tiny: LoadedModel, mirror: bool) -> None:
    real = prefill(tiny, list(range(250)) * 4)
    prompt = synthetic_prompt(tiny, N_TOKENS, mirror=mirror, seed=3)
    used = N_TOKENS % 64
    for layer, pages in prompt.pages.items():
        assert pages.shape == real.pages[layer].shape
        assert pages.dtype == real.pages[layer].dtype
        assert (pages[-1, :, :, used:] == 0).all()
        assert (pages[-1, :, :, :used] != 0).all()
        assert pages[:-1].std() > 0.5
    assert not torch.equal(prompt.pages[0][:-1], prompt.pages[1][:-1])
    assert prompt.last_hidden.keys() == real.last_hidden.keys()
    assert prompt.last_hidden[1].shape == real.last_hidden[1].shape
    again = synthetic_prompt(tiny, N_TOKENS, mirror=mirror, seed=3)
    assert torch.equal(prompt.pages[1], again.pages[1])


def test_no_page_repeats_at_once(tiny: LoadedModel) -> None:
    """Equal pages would tie in every selection."""
    n_pages = BLOCK_PAGES + 3
    pages = synthetic_prompt(tiny, n_pages * 64, mirror=True).pages[0]
    assert not torch.equal(pages[0], pages[BLOCK_PAGES])
    assert torch.unique(pages[:, 0, 0, 0, 0]).numel() == n_pages


@pytest.mark.parametrize("name", method_names())
def test_every_method_decodes_from_one_as_from_a_prefill(tiny: LoadedModel, name: str) -> None:
    method = create_method(SPECS.get(name, name))
    assert method.unsupported(tiny.shape, tiny.device) == []
    results = []
    for kind in ("synthetic", "prefill"):
        collectors = union_collectors([method], tiny.shape.layers)
        if kind == "synthetic":
            mirror = method.saving_kind == "offloaded"
            prompt = synthetic_prompt(tiny, N_TOKENS, mirror=mirror, collectors=collectors)
        else:
            prompt = prefill(tiny, list(range(250)) * 4, collectors=collectors)
        results.append(decode(tiny, method, prompt, [5], max_new_tokens=4))
    made, real = results
    predicted = method.predict(tiny.shape, N_TOKENS, 4)
    assert made.footprint_last.kv_bytes == real.footprint_last.kv_bytes == predicted.kv_bytes
    assert made.footprint_last.metadata_bytes == real.footprint_last.metadata_bytes == predicted.metadata_bytes
    assert made.footprint_last.host_bytes == real.footprint_last.host_bytes == predicted.host_bytes


def test_what_cannot_be_made_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(UsageError, match="does not fit model"):
        synthetic_prompt(dataclasses.replace(tiny, max_length_tokens=100), 100, mirror=True)
    with pytest.raises(UsageError, match="sliding-window layers"):
        synthetic_prompt(loaded_model("gemma3"), 100, mirror=True)


def test_host_memory_is_asked_for_before_pages_are_made(tiny: LoadedModel, monkeypatch: Any) -> None:
    monkeypatch.setattr(prefill_module, "free_host_bytes", lambda: 200_000)
    synthetic_prompt(tiny, N_TOKENS, mirror=False)
    with pytest.raises(HostMemoryShort, match="1,000 tokens"):
        synthetic_prompt(tiny, N_TOKENS, mirror=True)
