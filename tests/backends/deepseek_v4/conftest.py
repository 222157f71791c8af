"""One tiny DeepSeek-V4 and one prompt for all tests of the folder."""

import pytest
import torch
from compressed_tiny import N_TOKENS, random_model

from kvscope.harness.engine.prefill import prefill


@pytest.fixture(scope="session")
def stock_model():
    """What kvscope must agree with: never touched by it."""
    return random_model()


@pytest.fixture(scope="session")
def loaded():
    # It brings Triton, which reads whether to interpret when it is imported: this file comes before that is said.
    from kvscope.harness.engine.models import wrap_model

    return wrap_model(random_model(), None, name="tiny")


@pytest.fixture(scope="session")
def ids() -> list[int]:
    return torch.randint(2, 500, (N_TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="session")
def prompt(loaded, ids):
    return prefill(loaded, ids[:-1], chunk_tokens=100)


@pytest.fixture(scope="session")
def whole_prompt(loaded, ids):
    """The same in one chunk, as stock generate prefills."""
    return prefill(loaded, ids[:-1], chunk_tokens=4 * N_TOKENS)
