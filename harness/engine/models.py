"""Loads a causal language model and switches its attention to kvscope's."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from kvscope.errors import EnvironmentProblem, KvscopeError, UsageError, did_you_mean
from kvscope.harness.backends.deepseek_v4.shape import CompressedModelShape, check_dtype
from kvscope.harness.engine.glue import ATTENTION_NAME, decoder_of, register_attention
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.presets import PRESETS, build_preset, find_preset, is_preset, preset_config, preset_revision
from kvscope.harness.engine.rotation import RopeRotation, UnknownRotation, probe_rotations
from kvscope.harness.engine.shapes import max_length_tokens, model_shape
from kvscope.methods.kernels.dispatch import decode_backend
from kvscope.methods.shape import DEFAULT_PAGE_TOKENS, ModelShape

REFERENCE_MODEL_FOLDER = Path(__file__).parents[1] / "reference_model" / "weights"

_FROM_HUB = "from the Hugging Face hub; the engine tests cover its architecture, with random weights"
_KNOWN = {
    "reference": "the embedded reference model: 20M parameters, trained on this project's own tasks; needs no network",
    "HuggingFaceTB/SmolLM3-3B": _FROM_HUB,
    "Qwen/Qwen3-8B": _FROM_HUB,
    "meta-llama/Llama-3.1-8B-Instruct": _FROM_HUB,
    "mistralai/Mistral-7B-Instruct-v0.3": _FROM_HUB,
    "openai/gpt-oss-20b": _FROM_HUB,
}
_REVISION_SAMPLES, _REVISION_SAMPLE_BYTES = 32, 16 * 1024
_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def known_models() -> dict[str, str]:
    """Return names ``--model`` is known to take, each with one line about it. Any hub id or local folder works too."""
    presets = {f"preset:{name}": preset.description for name, preset in PRESETS.items() if preset.description}
    return {**_KNOWN, **presets}


def load_model(
    spec: str, *, device: str = "auto", dtype: str = "auto", page_tokens: int = DEFAULT_PAGE_TOKENS
) -> LoadedModel:
    """Load a model by name, local folder or Hugging Face id.

    Args:
        spec: ``reference``, ``preset:NAME``, a folder that transformers can load, or a hub id.
        device: ``auto`` (a GPU when there is one), ``cpu``, ``cuda`` or ``cuda:<index>``.
        dtype: ``auto`` (fp32 on CPU, bf16 on a GPU), ``float32``, ``bfloat16`` or ``float16``.
        page_tokens: tokens of one KV page.

    Raises:
        UsageError: no such model, or an architecture or setting that cannot be run.
        EnvironmentProblem: the device asked for is not there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, name = resolve_model(spec)
    target = resolve_device(device)
    target_dtype = resolve_dtype(dtype, target)
    config = load_config(spec)
    # Before the weights: a refusal should not cost a download.
    shape = model_shape(config, element_bytes=target_dtype.itemsize, page_tokens=page_tokens)
    check_dtype(shape, str(target_dtype).removeprefix("torch."))
    register_attention()
    if is_preset(spec):
        model = build_preset(spec, device=target, dtype=target_dtype)
        return wrap_model(
            model, None, spec=spec, name=name, page_tokens=page_tokens, revision=model_revision(where, config)
        )
    try:
        with _no_progress_bars():
            # Some models refuse sdpa when built (gpt-oss), none refuses eager; the switch comes after.
            model = AutoModelForCausalLM.from_pretrained(where, dtype=target_dtype, attn_implementation="eager")
            tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise UsageError(_cannot_load(spec, error)) from error
    return wrap_model(
        model.to(target),
        tokenizer,
        spec=spec,
        name=name,
        page_tokens=page_tokens,
        revision=model_revision(where, config),
    )


def wrap_model(
    model: Any,
    tokenizer: Any,
    *,
    spec: str = "",
    name: str = "model",
    page_tokens: int = DEFAULT_PAGE_TOKENS,
    revision: str = "",
) -> LoadedModel:
    """Take a transformers model that is already built: switch its attention and measure its position encoding.

    Raises:
        UsageError: the architecture cannot be run; the message gives every reason.
    """
    register_attention()
    parameter = next(model.parameters())
    shape = model_shape(
        model.config, element_bytes=parameter.dtype.itemsize, page_tokens=page_tokens, revision=revision
    )
    n_decoder_layers = len(getattr(decoder_of(model), "layers", ()))
    if n_decoder_layers != shape.n_layers:
        raise UsageError(
            f"Model '{name}' cannot be run: its decoder has {n_decoder_layers} layers in `.layers`, its config "
            f"{shape.n_layers}."
        )
    model.eval()
    backend, rotations = _prepared(model, shape, name)
    unknown = tuple(layer for layer in shape.layers if isinstance(rotations[layer], UnknownRotation))
    return LoadedModel(
        spec=spec or name,
        name=name,
        model=model,
        tokenizer=tokenizer,
        device=parameter.device,
        dtype=parameter.dtype,
        shape=dataclasses.replace(shape, unknown_rotation_layers=unknown),
        max_length_tokens=max_length_tokens(model.config),
        revision=revision,
        attention_backend=backend,
        rotations=rotations,
        eos_ids=_eos_ids(model, tokenizer),
    )


def attention_backend(shape: ModelShape, device: torch.device, dtype: torch.dtype) -> str:
    """Name what computes attention: the prefill is torch's, decode over pages a kernel's or torch's, and why."""
    found = decode_backend(
        device, dtype=dtype, head_dim=shape.head_dim, n_q_heads=shape.n_q_heads, n_kv_heads=shape.n_kv_heads
    )
    prefill = f"torch {torch.__version__}: fused prefill"
    if found.name == "torch":
        return f"{prefill}, paged decode in torch operations ({'; '.join(found.reasons)})"
    return f"{prefill}; {found.name} {found.version}: paged_decode"


def _prepared(model: Any, shape: ModelShape, name: str) -> tuple[str, dict[int, RopeRotation | UnknownRotation | None]]:
    """Switch a model's attention; return what computes it, and the layers' rotations."""
    if isinstance(shape, CompressedModelShape):
        from kvscope.harness.backends.deepseek_v4.loading import prepare

        return prepare(model), dict.fromkeys(range(shape.n_layers))
    model.set_attn_implementation(ATTENTION_NAME)
    try:
        rotations = probe_rotations(model)
    except KvscopeError as error:
        raise UsageError(f"Model '{name}' cannot be run: {error}") from error
    parameter = next(model.parameters())
    return attention_backend(shape, parameter.device, parameter.dtype), rotations


def resolve_model(spec: str) -> tuple[str, str]:
    """Return what transformers should load, and the name rows use.

    Raises:
        UsageError: neither a known name, nor a folder with a config.json, nor shaped like a hub id.
    """
    if is_preset(spec):
        find_preset(spec)
        return spec, spec
    if spec == "reference":
        if not (REFERENCE_MODEL_FOLDER / "config.json").is_file():
            raise UsageError(
                "The reference model is missing from this installation (no config.json in "
                "harness/reference_model/weights); reinstall kvscope, or pass --model with a folder or a Hugging "
                "Face id."
            )
        return str(REFERENCE_MODEL_FOLDER), spec
    folder = Path(spec).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"Model folder '{spec}' has no config.json, so transformers cannot load it.")
        return str(folder), folder.resolve().name
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise UsageError(f"There is no model folder '{spec}'. Check the path, or pass a Hugging Face id (owner/name).")
    if "/" not in spec:
        raise UsageError(
            f"There is no model '{spec}'.{did_you_mean(spec, known_models())} A local folder or a Hugging Face id "
            "(owner/name) works too."
        )
    return spec, spec


def load_config(spec: str) -> Any:
    """Return the transformers config of a model without loading its weights.

    Raises:
        UsageError: as ``load_model``.
    """
    from transformers import AutoConfig

    where, _ = resolve_model(spec)
    if is_preset(spec):
        return preset_config(spec)
    try:
        return AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise UsageError(_cannot_load(spec, error)) from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers' bars out of the sweep's own, and put its setting back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _cannot_load(spec: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(spec).expanduser().is_dir() or spec == "reference":
        return f"Model '{spec}' cannot be loaded: {reason}"
    hint = did_you_mean(spec, _KNOWN)
    near = hint if hint.startswith(" Did") else ""
    return (
        f"Model '{spec}' cannot be loaded from the Hugging Face hub.{near} Check the id and the network (offline, only "
        f"models already in the local cache load; gated ones need `hf auth login`), or use --model reference, which "
        f"needs neither. transformers says: {reason}"
    )


def resolve_device(device: str) -> torch.device:
    """Return the device that ``auto``, ``cpu``, ``cuda`` or ``cuda:<index>`` means here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not (kind == "cuda" and index.isdigit())):
        raise UsageError(f"Device '{device}' is not one of auto, cpu, cuda, cuda:<index>.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(f"Device '{device}' was asked for, but torch sees no CUDA GPU; use --device cpu.")
    if index and int(index) >= torch.cuda.device_count():
        raise EnvironmentProblem(f"Device '{device}' was asked for, but torch sees {torch.cuda.device_count()} GPUs.")
    return torch.device(device)


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the element type that a name, or ``auto`` on a device, means."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in _DTYPES:
        raise UsageError(f"There is no dtype '{dtype}'.{did_you_mean(dtype, ['auto', *_DTYPES])}")
    return _DTYPES[dtype]


def _eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    sources = (getattr(model, "generation_config", None), model.config, tokenizer)
    for source in sources:
        ids = getattr(source, "eos_token_id", None)
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)


def model_revision(where: str, config: Any) -> str:
    """Return the hub commit of a model, or for a folder a hash of its config and its weights.

    Of every weights file its name, size, ends and evenly spread samples are read: training changes all of them, and a
    model of any size is told apart in milliseconds. Of a preset: how its weights are drawn.
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
