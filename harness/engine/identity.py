"""What a model is: every byte of its weights, and whatever else decides its tokens and answers, part by part.

A run folder keeps these parts, so that it is continued by the same model alone, wherever that lies and however its
folder is spelled. READMEs, optimizer states and other files that no answer depends on are not among them.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvscope.errors import UsageError
from kvscope.harness.engine.file_hashes import file_sha256s
from kvscope.harness.engine.presets import is_preset, preset_revision

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "tekken.json",
)
"""Read by every kind of tokenizer, or by many; the class of one names its own besides."""
TOKENIZER_PATTERNS = ("tokenizer.model.*", "*.tiktoken")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers takes the first that is there."""
ADAPTER_PATTERN = "adapter_*"
_TEMPLATE_KEY = "chat_template"
STOCK_APPLIES = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "suppress_tokens": None,
    "forced_eos_token_id": None,
}
"""Settings of a generation config that stock applies to greedy answers, each with the value that changes nothing."""


def model_parts(spec: str, where: str, config: Any, tokenizer: Any) -> dict[str, Any]:
    """Return what a model is, as plain JSON values by part.

    Weights are hashed from their first to their last byte. Those of a hub model are what its commit says.

    Args:
        spec: the model as asked for.
        where: what transformers loads (see ``resolve_model``).
        config: its transformers config.
        tokenizer: its transformers tokenizer; None for a preset.

    Raises:
        UsageError: a file cannot be read, or no weights are there.
    """
    if is_preset(spec):
        return {"preset": spec, "weights": preset_revision()}
    folder, commit = Path(where), None
    try:
        if not folder.is_dir():
            folder, commit = _snapshot(where), getattr(config, "_commit_hash", None)
        return {
            "weights": f"commit {commit}" if commit else _of_hashes(sorted(file_sha256s(weights_files(folder)))),
            "config": _of_json(folder / "config.json"),
            "tokenizer": tokenizer_sha256(folder, tokenizer),
            "eos_ids": sorted(eos_ids(generation_config(folder, config), config, tokenizer)),
            "chat_template": _of_text(json.dumps(getattr(tokenizer, _TEMPLATE_KEY, None), sort_keys=True)),
        }
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"Model '{spec}' cannot be read: {error}.") from error


def weights_files(folder: Path) -> list[Path]:
    """Return the files of weights that transformers loads from a folder, by name: of shards those the index names.

    Raises:
        UsageError: there are none.
        OSError, ValueError: the index cannot be read.
    """
    adapter = sorted(path for path in folder.glob(ADAPTER_PATTERN) if path.is_file())
    explicit = json.loads((folder / "config.json").read_bytes()).get("transformers_weights")
    for name in (str(explicit),) if explicit else WEIGHTS:
        if not (folder / name).is_file():
            continue
        if not name.endswith(".index.json"):
            return [folder / name, *adapter]
        shards = json.loads((folder / name).read_bytes())["weight_map"].values()
        return [*(folder / shard for shard in sorted(set(shards))), *adapter]
    raise UsageError(f"Model folder '{folder}' has no weights: none of {', '.join(WEIGHTS)} is in it.")


def tokenizer_sha256(folder: Path, tokenizer: Any) -> str:
    """Hash the files that a folder's tokenizer is made of, its chat template left out."""
    own = getattr(tokenizer, "vocab_files_names", {}).values()
    names = {*TOKENIZER_FILES, *(str(name) for name in own)}
    found = {path.name for pattern in TOKENIZER_PATTERNS for path in folder.glob(pattern)}
    parts = []
    for name in sorted(names | found):
        path = folder / name
        if path.is_file():
            digest = (
                _of_json(path, without=_TEMPLATE_KEY) if name == "tokenizer_config.json" else file_sha256s([path])[0]
            )
            parts.append(f"{name} {digest}")
    return _of_hashes(parts)


def generation_config(folder: Path, config: Any) -> Any:
    """Return the generation config that a loaded model has.

    Raises:
        OSError, ValueError: there is a file of one that cannot be read.
    """
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def eos_ids(*sources: Any) -> frozenset[int]:
    """Return the token ids that end an answer, of all sources that name some: generation config, config, tokenizer."""
    found: set[int] = set()
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)


def not_applied(generation: Any) -> list[str]:
    """Return the settings of a model's generation config that stock applies to greedy answers, and kvscope does not."""
    found = {key: getattr(generation, key, None) for key in STOCK_APPLIES}
    return [f"{key}={value}" for key, value in found.items() if value is not None and value != STOCK_APPLIES[key]]


def model_folder(where: str) -> Path:
    """Return the folder of a model's files: its own, or that of a hub model's whose config is there already."""
    folder = Path(where)
    return folder if folder.is_dir() else _snapshot(where)


def _snapshot(hub_id: str) -> Path:
    """Return the local folder of a hub model whose config and tokenizer are there already."""
    from transformers.utils import cached_file

    return Path(str(cached_file(hub_id, "config.json", local_files_only=True))).parent


def _of_json(path: Path, *, without: str | None = None) -> str:
    """Hash what a JSON file says, however it is laid out."""
    data = json.loads(path.read_bytes())
    if without is not None:
        data = {key: value for key, value in data.items() if key != without}
    return _of_text(json.dumps(data, sort_keys=True))


def _of_hashes(parts: Iterable[str]) -> str:
    return _of_text("\n".join(parts))


def _of_text(text: str) -> str:
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
