from collections.abc import Iterator

import pytest

from kvscope.harness.indexers.lsa import recall_tables


@pytest.fixture(scope="module")
def no_figure() -> Iterator[None]:
    """For tests that look at tables alone: a figure takes longer than all the rest of an evaluation."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(recall_tables, "draw", lambda folder, rows: None)
        yield
