"""A disk that is full, or a limit on file sizes, while a collection or an indexer is written."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lsa_tools import random_indexer
from planted import planted_collection
from tiny_models import loaded_model

from kvscope.errors import EnvironmentProblem
from kvscope.harness.indexers.collection.reading import Collection


@contextmanager
def no_file_over(n_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("most_bytes", [100, 3000])
def test_a_shard_that_does_not_fit_is_a_sentence_and_leaves_nothing(most_bytes: int, tmp_path: Path) -> None:
    folder = tmp_path / "collection"
    with no_file_over(most_bytes), pytest.raises(EnvironmentProblem, match="could not be written"):
        planted_collection(folder, documents=4, per_shard=2)
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    assert not (folder / "manifest.json").exists(), "nothing looks like a collection"
    planted_collection(folder, documents=4, per_shard=2)
    assert len(Collection(folder)) == 4


def test_an_indexer_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    shape = loaded_model("llama").shape
    folder = random_indexer(tmp_path / "indexer", shape)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with no_file_over(200), pytest.raises(EnvironmentProblem, match="could not be written"):
        random_indexer(folder, shape, seed=1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
