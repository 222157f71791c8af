"""A tiny random Llama saved to disk, with the reference model's tokenizer: the real engine at a price tests can pay."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.passes.config import RunConfig, make_config

MakeConfig = Callable[..., RunConfig]
#: A small configuration, but for its model and its folder.
SMALL = {
    "methods": ["dense", "recency:recency_tokens=128"],
    "tasks": ["niah_single_1"],
    "lengths_tokens": [512],
    "samples": 2,
    "max_new_tokens": 4,
    "footprint": False,
    "device": "cpu",
}


def save_tiny_model(folder: Path) -> None:
    """Write a 2-layer Llama with 256 bytes of KV a token and 4,096 tokens of context."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(str(REFERENCE_MODEL_FOLDER))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of the tiny model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny_model(folder)
    return str(folder)


@pytest.fixture
def small(tiny_model: str, tmp_path: Path) -> MakeConfig:
    """Return a maker of small configurations over the tiny model; keys given win."""

    def make(**values: Any) -> RunConfig:
        return make_config({**SMALL, "model": tiny_model, "out": str(tmp_path / "run"), **values})

    return make


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small work is fastest on one thread, in this process and in workers; tests share the machine."""
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
