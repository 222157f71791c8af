"""Damaged indexers of lsa and dsa are refused before anything is prefilled: by configuration and header alone."""

import json
import os
import shutil
from pathlib import Path

import dsa_tools
import lsa_tools
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import loaded_model

from kvscope.errors import UsageError
from kvscope.methods.registry import create_method

MAKERS = {"lsa": lsa_tools.random_indexer, "dsa": dsa_tools.random_indexer}


def weights(folder: Path) -> Path:
    return folder / "indexer.safetensors"


def rewrite(change):
    """Change the tensors of a folder."""

    def damage(folder: Path) -> None:
        tensors = load_file(weights(folder))
        change(tensors, sorted(tensors)[0])
        save_file(tensors, weights(folder))

    return damage


def cut(n_bytes: int):
    def damage(folder: Path) -> None:
        data = weights(folder).read_bytes()
        weights(folder).write_bytes(data[:n_bytes] if n_bytes >= 0 else data[: len(data) + n_bytes])

    return damage


def replace(data: bytes):
    return lambda folder: weights(folder).write_bytes(data)


def edit(**changes):
    """Change the configuration of a folder."""

    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def pipe(folder: Path) -> None:
    weights(folder).unlink()
    os.mkfifo(weights(folder))


def directory(folder: Path) -> None:
    weights(folder).unlink()
    weights(folder).mkdir()


def header(**tensor) -> bytes:
    """A file of one tensor whose header says what it likes."""
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **tensor}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


DAMAGES = {
    "a shape": rewrite(lambda tensors, name: tensors.update({name: torch.zeros(3, 5)})),
    "a dimension more": rewrite(lambda tensors, name: tensors.update({name: tensors[name][None].clone()})),
    "int8": rewrite(lambda tensors, name: tensors.update({name: tensors[name].to(torch.int8)})),
    "bool": rewrite(lambda tensors, name: tensors.update({name: tensors[name] > 0})),
    "fp8": rewrite(lambda tensors, name: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)})),
    "NaN": rewrite(lambda tensors, name: tensors[name].view(-1)[-1:].fill_(float("nan"))),
    "infinity": rewrite(lambda tensors, name: tensors[name].view(-1)[:1].fill_(float("inf"))),
    "missing": rewrite(lambda tensors, name: tensors.pop(name)),
    "one more": rewrite(lambda tensors, name: tensors.update({"zz.more": torch.zeros(1)})),
    "no tensor": rewrite(lambda tensors, name: tensors.clear()),
    "cut by a byte": cut(-1),
    "cut in the header": cut(20),
    "empty": cut(0),
    "an LFS pointer": replace(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "a pickle": replace(b"\x80\x02}q\x00." * 9),
    "a header of 2^60 bytes": replace((2**60).to_bytes(8, "little") + b"{}"),
    "sizes of 10^12": replace(header(shape=[10**12, 10**12])),
    "offsets behind the end": replace(header(data_offsets=[0, 10**12], shape=[25 * 10**10])),
    "no file": lambda folder: weights(folder).unlink(),
    "a folder": directory,
    "a pipe": pipe,
    "heads of 10^12": edit(heads=10**12, key_dim=10**12),
    "heads of 10^30": edit(heads=10**30),
    "heads as text": edit(heads="4"),
    "heads with a fraction": edit(heads=4.0),
    "heads as truth": edit(heads=True),
    "layers as text": edit(layers="01"),
    "layers of lists": edit(layers=[[0]]),
    "layers as number": edit(layers=5),
    "no layers": edit(layers=[]),
    "negative sizes": edit(hidden_size=-1),
    "revision as number": edit(model_revision=5),
    "trained as text": edit(trained="yes"),
    "format as text": edit(format="1"),
    "config as list": lambda folder: (folder / "config.json").write_text("[]"),
    "config cut": lambda folder: (folder / "config.json").write_text('{"format": 1'),
    "config not UTF-8": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"),
    "config nested": lambda folder: (folder / "config.json").write_text("[" * 100_000),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return a folder of one good indexer a kind."""
    folder = tmp_path_factory.mktemp("indexers")
    for kind, make in MAKERS.items():
        make(folder / kind, loaded_model("llama").shape)
    return folder


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_indexer_is_refused_before_the_prefill(kind: str, damage: str, whole: Path, tmp_path: Path) -> None:
    shape = loaded_model("llama").shape
    folder = tmp_path / kind
    shutil.copytree(whole / kind, folder)
    create_method({"name": kind, "indexer": str(folder)}).require(shape)
    DAMAGES[damage](folder)
    with pytest.raises(UsageError) as caught:
        create_method({"name": kind, "indexer": str(folder)}).require(shape)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    method = create_method({"name": kind, "indexer": str(folder)})
    assert method.unsupported(shape, "cpu") == [str(caught.value).rstrip(".")], "plan says the same"
