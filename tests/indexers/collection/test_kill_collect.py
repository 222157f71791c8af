"""kill -9 of ``lsa collect``: nothing recorded is lost, and the same command goes on to the same bytes."""

import os
import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from killing import Victims

from kvscope.harness.indexers.collection.collect import CollectConfig, collect
from kvscope.harness.indexers.collection.reading import Collection
from kvscope.harness.passes.progress import Progress

KILLS = 9
STEPS_A_SHARD = 2 * 2 + 4  # begin and end of two documents; before and after its shard and the manifest appear


@pytest.fixture
def config(tiny_model: str) -> CollectConfig:
    return CollectConfig(
        model=tiny_model, tasks=("long_qa",), lengths_tokens=(640, 704), samples=6, seed=77, chunk_tokens=16,
        shard_documents=2, device="cpu",
    )  # fmt: skip


@pytest.fixture
def collections(config: CollectConfig, tmp_path: Path) -> Iterator[Victims]:
    server = Victims("collect", {**asdict(config), "out": str(tmp_path / "killed")})
    yield server
    server.close()


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.slow
def test_a_killed_collection_goes_on_and_loses_nothing_recorded(
    config: CollectConfig, collections: Victims, tmp_path: Path
) -> None:
    whole = shards(collect(config, tmp_path / "whole", progress=Progress()))
    folder, dice, n_recorded = tmp_path / "killed", random.Random(3), 0
    for _ in range(KILLS):
        left = (len(whole) - n_recorded) * STEPS_A_SHARD
        if left <= 2 * STEPS_A_SHARD:
            break
        status = collections.kill_one(at_step=dice.randrange(2 * STEPS_A_SHARD - 2), room=2)
        assert os.WIFSIGNALED(status)
        if not (folder / "manifest.json").exists():
            continue
        recorded = Collection(folder)
        assert len(recorded) >= 2 * n_recorded, "a document that was recorded is gone"
        n_recorded = len(recorded) // 2
        there = shards(folder)
        for number in range(n_recorded):
            name = f"shard-{number:05d}.safetensors"
            assert there[name] == whole[name], "what is recorded is what an uninterrupted collection has"
    assert n_recorded > 0, "the kills came before anything was recorded"
    n_before = len(collections.finished)
    assert collections.let_one_end() == 0
    assert len(collections.finished) - n_before == 2 * (len(whole) - n_recorded), "none is made twice"
    assert Collection(folder).complete
    assert shards(folder) == whole
    assert sorted(path.name for path in folder.iterdir()) == sorted([*whole, "manifest.json"]), "nothing half is left"
