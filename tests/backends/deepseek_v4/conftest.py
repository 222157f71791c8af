"""One tiny DeepSeek-V4 and one prompt for all tests of the folder.

What brings Triton is imported in the fixtures: pytest may read this file before ours says that kernels are interpreted.
"""

import pytest
import torch
from compressed_tiny import N_TOKENS, random_model
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def stock_model():
    """What kvscope must agree with: never touched by it."""
    return random_model()


@pytest.fixture(scope="session")
def loaded():
    from kvscope.harness.engine.models import wrap_model

    return wrap_model(random_model(), None, name="tiny")


@pytest.fixture(scope="session")
def ids() -> list[int]:
    return torch.randint(2, 500, (N_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="session")
def prompt(loaded, ids):
    from kvscope.harness.engine.prefill import prefill

    return prefill(loaded, ids[:-1], chunk_tokens=100)


@pytest.fixture(scope="session")
def whole_prompt(loaded, ids):
    """The same in one chunk, as stock generate prefills."""
    from kvscope.harness.engine.prefill import prefill

    return prefill(loaded, ids[:-1], chunk_tokens=4 * N_TOKENS)


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> str:
    """A file of random weights of lsa's query side: scores of either sign, so that a threshold keeps about a half."""
    from kvscope.methods.lsa.compressed import CompressedIndexer

    path = tmp_path_factory.mktemp("indexers") / "query.safetensors"
    indexer = CompressedIndexer.random((1, 4), hidden_size=64, rank=8, heads=2, key_dim=16, seed=0)
    fields = {"W_DQ": "w_dq_RM", "norm": "norm_R", "W_IUQ": "w_iuq_OR", "W_w": "w_w_IM"}
    tensors = {
        f"layers.{layer}.{name}.weight": getattr(matrices, field).contiguous()
        for layer, matrices in indexer.layers.items()
        for name, field in fields.items()
    }
    save_file(tensors, path)
    return str(path)
