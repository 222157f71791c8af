"""Models by name, and what their files say before any weights load: config, identity."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from kvscope.errors import UsageError, did_you_mean
from kvscope.harness.engine.gguf_files import gguf_in, unpacked
from kvscope.harness.engine.presets import PRESETS, find_preset, is_preset, preset_revision
from kvscope.harness.engine.public_models import PUBLIC_MODELS, public_model_file
from kvscope.paths import user_path

REFERENCE_MODEL_FOLDER = Path(__file__).parents[1] / "reference_model" / "weights"
REFERENCE_V4_FOLDER = Path(__file__).parents[1] / "reference_model" / "v4" / "weights"
REFERENCE, REFERENCE_V4 = "reference", "reference-v4"

_FROM_HUB = "from the Hugging Face hub; the engine tests cover its architecture, with random weights"
_KNOWN = {
    REFERENCE: "the embedded reference model: 20M parameters, trained on this project's own tasks; needs no network",
    "HuggingFaceTB/SmolLM3-3B": _FROM_HUB,
    "Qwen/Qwen3-8B": _FROM_HUB,
    "meta-llama/Llama-3.1-8B-Instruct": _FROM_HUB,
    "mistralai/Mistral-7B-Instruct-v0.3": _FROM_HUB,
    "openai/gpt-oss-20b": _FROM_HUB,
}
_REFERENCE_V4 = "a small DeepSeek-V4 with a trained native indexer: 16M parameters, the same tasks; needs no network"
_MISSING = {
    REFERENCE: "The reference model is missing from this installation (no config.json in "
    "harness/reference_model/weights); reinstall kvscope, or pass --model with a folder or a Hugging Face id.",
    REFERENCE_V4: "The weights of reference-v4 are not part of this installation (no config.json in "
    "harness/reference_model/v4/weights); train them with kvscope backbone train --architecture deepseek_v4, and pass "
    "--model with that folder.",
}
_REVISION_SAMPLES, _REVISION_SAMPLE_BYTES = 32, 16 * 1024


def known_models() -> dict[str, str]:
    """Return names ``--model`` is known to take, each with one line about it. Any hub id or local folder works too."""
    presets = {f"preset:{name}": preset.description for name, preset in PRESETS.items() if preset.description}
    embedded = {REFERENCE: _KNOWN[REFERENCE], REFERENCE_V4: _REFERENCE_V4}
    if not has_weights(REFERENCE_V4):
        embedded[REFERENCE_V4] += "; its weights are not part of this installation"
    public = {name: model.description for name, model in PUBLIC_MODELS.items()}
    return {**embedded, **_KNOWN, **public, **presets}


def embedded_folder(spec: str) -> Path | None:
    """Return where an embedded model's files are, whether or not they are there; None for another name."""
    return {REFERENCE: REFERENCE_MODEL_FOLDER, REFERENCE_V4: REFERENCE_V4_FOLDER}.get(spec)


def has_weights(spec: str) -> bool:
    """Whether an embedded model's files are part of this installation."""
    folder = embedded_folder(spec)
    return folder is not None and (folder / "config.json").is_file()


def resolve_model(spec: str) -> tuple[str, str]:
    """Return what transformers should load, and the name rows use.

    Raises:
        UsageError: neither a known name, nor a folder with a config.json or a GGUF file, nor shaped like a hub id; a
            GGUF file that cannot be unpacked, a public model that was not fetched.
    """
    if is_preset(spec):
        find_preset(spec)
        return spec, spec
    if (embedded := embedded_folder(spec)) is not None:
        if not has_weights(spec):
            raise UsageError(_MISSING[spec])
        return str(embedded), spec
    folder = public_model_file(spec) or user_path(spec, what="--model")
    if (packed := gguf_in(folder)) is not None:
        return unpacked(packed)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"Model folder '{spec}' has no config.json, so transformers cannot load it{_instead(folder)}."
            )
        return str(folder), folder.resolve().name
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise UsageError(f"There is no model folder '{spec}'. Check the path, or pass a Hugging Face id (owner/name).")
    if "/" not in spec:
        raise UsageError(
            f"There is no model '{spec}'.{did_you_mean(spec, known_models())} A local folder or a Hugging Face id "
            "(owner/name) works too."
        )
    return spec, spec


def _instead(folder: Path) -> str:
    """Say what a folder without a config.json holds, where that is known."""
    if (folder / "adapter_config.json").is_file():
        return ": it holds an adapter, which has to be merged into its model first"
    if (folder / "model_index.json").is_file():
        return ": it holds a diffusers pipeline, not a language model"
    return ""


def cannot_load(spec: str, reason: str) -> str:
    """Return the sentence for a model that transformers does not load."""
    if Path(spec).expanduser().is_dir() or embedded_folder(spec) is not None:
        return f"Model '{spec}' cannot be loaded: {reason.rstrip('.')}."
    hint = did_you_mean(spec, _KNOWN)
    near = hint if hint.startswith(" Did") else ""
    return (
        f"Model '{spec}' cannot be loaded from the Hugging Face hub.{near} Check the id and the network (offline, only "
        f"models already in the local cache load; gated ones need `hf auth login`), or use --model reference, which "
        f"needs neither. transformers says: {reason}"
    )


def sampled_revision(where: str, config: Any) -> str:
    """Return the hub commit of a model, or for a folder a hash of its config and of samples of its weights.

    Of every weights file its name, size, ends and evenly spread samples are read: training changes all of them, and a
    model of any size is told apart in milliseconds. Of a preset: how its weights are drawn.

    Trained indexers name their model by it. A run's rows are held to more: see ``identity.model_parts``.
    """
    if is_preset(where):
        return preset_revision()
    folder = Path(where)
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None) or "unknown")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin")):
        size_bytes = path.stat().st_size
        digest.update(f"{path.name} {size_bytes}\n".encode())
        with path.open("rb") as file:
            for sample in range(_REVISION_SAMPLES + 1):
                file.seek(max(0, size_bytes - _REVISION_SAMPLE_BYTES) * sample // _REVISION_SAMPLES)
                digest.update(file.read(_REVISION_SAMPLE_BYTES))
    return f"sha256:{digest.hexdigest()[:16]}"
