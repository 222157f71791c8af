"""A model's identity changes with whatever decides its tokens and answers, and with nothing else."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model

from kvscope.errors import UsageError
from kvscope.harness.engine.identity import eos_ids, model_parts, weights_files
from kvscope.harness.engine.loading import load_config
from kvscope.harness.engine.names import resolve_model


@pytest.fixture
def model(tiny_model: str, tmp_path: Path) -> Path:
    """Return a copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def parts(folder: Path | str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    where, _ = resolve_model(str(folder))
    return model_parts(str(folder), where, load_config(str(folder)), AutoTokenizer.from_pretrained(where))


def edit(path: Path, **changes: Any) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, **changes}))


def change_one_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def other_vocabulary(folder: Path) -> None:
    """Swap the ids of two tokens: as many as before."""
    values = json.loads((folder / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(values))


def narrower(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


def named_template(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")


CHANGES: list[tuple[Callable[[Path], object], set[str]]] = [
    (change_one_tensor, {"weights"}),
    (narrower, {"weights"}),
    (other_vocabulary, {"tokenizer"}),
    (lambda folder: edit(folder / "tokenizer_config.json", add_bos_token=False), {"tokenizer"}),
    (lambda folder: (folder / "special_tokens_map.json").write_text('{"unk_token": "?"}'), {"tokenizer"}),
    (lambda folder: edit(folder / "generation_config.json", eos_token_id=[2, 77]), {"eos_ids"}),
    (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages[0] }}"), {"chat_template"}),
    (named_template, {"chat_template"}),
    (lambda folder: edit(folder / "config.json", rope_theta=5e5), {"config"}),
]


@pytest.mark.parametrize(("change", "changed"), CHANGES)
def test_what_decides_answers_changes_its_part(model: Path, change: Any, changed: set[str]) -> None:
    before = parts(model)
    change(model)
    after = parts(model)
    assert {key for key in before if before[key] != after[key]} == changed


def test_one_byte_in_the_middle_of_a_large_file_is_seen(model: Path) -> None:
    """The revision of earlier versions reads 33 samples of a file."""
    from kvscope.harness.engine.names import sampled_revision

    path = model / "model.safetensors"
    with path.open("r+b") as file:
        file.truncate(64 * 2**20)
    before, sampled = parts(model), sampled_revision(str(model), None)
    with path.open("r+b") as file:
        file.seek(5 * 2**20 + 12345)
        file.write(b"x")
    assert parts(model)["weights"] != before["weights"]
    assert sampled_revision(str(model), None) == sampled


def test_what_decides_nothing_changes_nothing(model: Path, tmp_path: Path) -> None:
    before = parts(model)
    for name in ("README.md", "optimizer.pt", "training_args.bin", "model-00009-of-00009.safetensors", "flax.msgpack"):
        (model / name).write_bytes(b"anything")
    (model / ".git").mkdir()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(dict(reversed(config.items())), indent=4))
    assert parts(model) == before
    moved = model.rename(tmp_path / "elsewhere")
    assert parts(moved) == before
    assert parts(f"{moved}/") == before
    (tmp_path / "link").symlink_to(moved)
    assert parts(tmp_path / "link") == before


def test_of_shards_those_count_that_the_index_names(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_tiny_model(tmp_path / "whole")
    folder = tmp_path / "whole"
    whole = AutoModelForCausalLM.from_pretrained(folder)
    whole.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = [path.name for path in weights_files(folder)]
    assert len(names) > 1
    before = parts(folder)
    (folder / "model-00077-of-00077.safetensors").write_bytes(b"stray")
    assert parts(folder) == before
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(names[0], "renamed.safetensors"))
    (folder / names[0]).rename(folder / "renamed.safetensors")
    assert parts(folder) == before, "the same tensors under another file name"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), loaded.parameters(), strict=True))


def test_eos_ids_are_those_of_the_loaded_model(model: Path) -> None:
    from kvscope.harness.engine.models import load_model

    for ids in (5, [5, 6], None):
        edit(model / "generation_config.json", eos_token_id=ids)
        assert parts(model)["eos_ids"] == sorted(load_model(str(model), device="cpu").eos_ids)
    assert eos_ids(None, object()) == frozenset()


def test_a_folder_without_weights_is_one_sentence(model: Path) -> None:
    (model / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="has no weights"):
        parts(model)


def test_a_preset_is_its_name_and_how_its_weights_are_drawn() -> None:
    assert model_parts("preset:tiny", "preset:tiny", None, None) == {
        "preset": "preset:tiny",
        "weights": "random weights, seed 0",
    }
