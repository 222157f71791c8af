"""Loads a causal language model and has its backend make it ready."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kvscope.errors import KvscopeError, UsageError
from kvscope.harness.engine.backend import backend_of
from kvscope.harness.engine.configs import max_length_tokens
from kvscope.harness.engine.device_map import begin_on, move
from kvscope.harness.engine.devices import resolve_device, resolve_dtype
from kvscope.harness.engine.identity import eos_ids
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.loading import explained, load_config, load_tokenizer
from kvscope.harness.engine.names import resolve_model, sampled_revision
from kvscope.harness.engine.presets import build_preset, is_preset
from kvscope.harness.engine.weights import check_weights
from kvscope.harness.engine.without_weights import check_layers, model_without_weights
from kvscope.methods.shape import DEFAULT_PAGE_TOKENS


def load_model(
    spec: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    page_tokens: int = DEFAULT_PAGE_TOKENS,
    described: bool = False,
    tokenizer: Any = None,
    modules: Mapping[str, str] | None = None,
) -> LoadedModel:
    """Load a model by name, local folder or Hugging Face id.

    Args:
        spec: ``reference``, ``preset:NAME``, a folder that transformers can load, or a hub id.
        device: ``auto`` (a GPU when there is one), ``cpu``, ``cuda`` or ``cuda:<index>``.
        dtype: ``auto`` (fp32 on CPU, bf16 on a GPU), ``float32``, ``bfloat16`` or ``float16``.
        page_tokens: tokens of one KV page.
        modules: where each of its modules goes, as ``device_map.DeviceMap`` has it, the embeddings on ``device``; None:
            all of it is on one device.
        described: this process, or the one it works for, has just described the model, so that it need not be built
            without weights again.
        tokenizer: its own, where it has been read already; None: it is read.

    Raises:
        UsageError: no such model, or an architecture or setting that cannot be run.
        EnvironmentProblem: the device asked for is not there.
    """
    from transformers import AutoModelForCausalLM

    where, name = resolve_model(spec)
    target = resolve_device(device)
    target_dtype = resolve_dtype(dtype, target)
    config = load_config(spec)
    # Before the weights: a refusal should not cost a download.
    backend = backend_of(config)
    with explained(spec):
        shape = backend.shape(config, element_bytes=target_dtype.itemsize, page_tokens=page_tokens)
    backend.check_dtype(str(target_dtype).removeprefix("torch."))
    if is_preset(spec):
        model, tokenizer = build_preset(spec, device=target, dtype=target_dtype), None
        if modules is not None:
            model = move(model, modules, first=str(target))
    else:
        tokenizer = load_tokenizer(spec, where, config) if tokenizer is None else tokenizer
        if not described:
            model_without_weights(spec, where, config, shape, device_type=target.type)
        with explained(spec), _no_progress_bars():
            # Some models refuse sdpa when built (gpt-oss), none refuses eager; the switch comes after.
            model, loading = AutoModelForCausalLM.from_pretrained(
                where,
                dtype=target_dtype,
                attn_implementation="eager",
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                device_map=None if modules is None else dict(modules),
                **_eager(config),
            )
            check_weights(name, model, loading)
            if modules is not None:
                begin_on(model, str(target))
    return wrap_model(
        model if modules is not None else model.to(target),
        tokenizer,
        spec=spec,
        name=name,
        page_tokens=page_tokens,
        revision=sampled_revision(where, config),
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
    """Take a transformers model that is already built: its backend makes it ready.

    Raises:
        UsageError: the architecture cannot be run; the message gives every reason.
    """
    backend = backend_of(model.config)
    element_bytes = next(model.parameters()).dtype.itemsize
    shape = backend.shape(model.config, element_bytes=element_bytes, page_tokens=page_tokens, revision=revision)
    check_layers(model, shape, name=name)
    model.eval()
    try:
        ready = backend.prepare(model, shape)
    except KvscopeError as error:
        raise UsageError(f"Model '{name}' cannot be run: {error}") from error
    return LoadedModel(
        **vars(ready),
        spec=spec or name,
        name=name,
        tokenizer=tokenizer,
        backend=backend,
        max_length_tokens=max_length_tokens(model.config),
        revision=revision,
        eos_ids=eos_ids(getattr(model, "generation_config", None), model.config, tokenizer),
    )


def _eager(config: Any) -> dict[str, Any]:
    """Return the config to load by, where its file names an attention: transformers heeds that before what is asked."""
    if getattr(config, "_attn_implementation", None) in (None, "eager"):
        return {}
    config._attn_implementation = "eager"
    return {"config": config}


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
