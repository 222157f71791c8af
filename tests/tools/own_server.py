"""Servers of workers of a test's own."""

from collections.abc import Iterator

import pytest

from kvscope.harness.passes import forked


@pytest.fixture
def server_set_aside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let a test have servers of its own; the tests after it find the shared one, which takes seconds to start."""
    monkeypatch.setattr(forked, "_server", None)
    yield
    forked.close_server()
