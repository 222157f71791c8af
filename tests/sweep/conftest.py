"""The tiny model, for every test of the sweep."""

import pytest
from tiny import one_thread, small, tiny_model

__all__ = ["one_thread", "small", "tiny_model"]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test here runs on one thread."""
