"""What a model shows before its weights load: it is built without storage, and one token is sent through its code."""

from __future__ import annotations

from typing import Any

from kvscope.errors import KvscopeError, UsageError
from kvscope.harness.engine.backend import backend_of
from kvscope.harness.engine.glue import decoder_of, layers_of
from kvscope.harness.engine.loading import explained
from kvscope.harness.engine.quantised import check_quantization
from kvscope.harness.engine.weight_files import check_weight_files
from kvscope.methods.shape import ModelShape


def model_without_weights(spec: str, where: str, config: Any, shape: ModelShape, *, device_type: str) -> Any:
    """Return a model without storage, checked against its folder; None where it is only built with storage.

    Args:
        spec: the model as asked for.
        where: what transformers loads.
        config: its config.
        shape: what the config says of its cache.
        device_type: of the device that it will run on, ``cpu`` or ``cuda``.

    Raises:
        UsageError: it cannot be built; its quantised weights do not run here; its code attends as no cache of
            kvscope serves; weights that are damaged or another model's.
    """
    check_quantization(spec, config, device_type=device_type)
    model = _built(spec, config)
    if model is not None:
        check_layers(model, shape, name=spec)
        try:
            backend_of(config).try_code(model, shape)
        except KvscopeError as error:
            raise UsageError(f"Model '{spec}' cannot be run: {error}") from error
    check_weight_files(spec, where, config, model)
    return model


def check_layers(model: Any, shape: ModelShape, *, name: str) -> None:
    """Refuse a decoder whose layers are not where kvscope finds them; the model may be one without storage.

    Raises:
        UsageError: with both counts.
    """
    n_decoder_layers = len(layers_of(decoder_of(model)))
    if n_decoder_layers != shape.n_layers:
        raise UsageError(
            f"Model '{name}' cannot be run: its decoder has {n_decoder_layers} layers in `.layers`, `.h` or "
            f"`.blocks`, its config {shape.n_layers}."
        )


def _built(spec: str, config: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with explained(spec), torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
        except NotImplementedError:
            return None
