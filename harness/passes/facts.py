"""What is known of a model before its weights load: shape, tokenizer, longest context, bytes of weights.

``plan`` needs no more, and ``run`` refuses a bad length in a second instead of after minutes of loading.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvscope.errors import UsageError
from kvscope.harness.engine.backend import Backend, backend_of
from kvscope.harness.engine.presets import is_preset
from kvscope.methods.shape import DEFAULT_PAGE_TOKENS, ModelShape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A model described by its configuration files alone.

    Attributes:
        spec: the model as asked for.
        tokenizer: the transformers tokenizer; None for a preset.
        name: what rows call it: ``reference``, a hub id, or a folder's name.
        backend: its kind of cache.
        device: where it will compute, ``auto`` resolved: ``cpu`` or ``cuda:N``.
        dtype: element type of weights and KV cache, ``auto`` resolved, e.g. ``float32``.
        weights_bytes: bytes of the weights in ``dtype``; None when the configuration does not tell.
        max_length_tokens: longest prompt plus answer.
        intermediate_size: width of the MLP.
        vocab_size: token ids are below it.
        revision: hub commit, or a hash of a folder's files.
    """

    spec: str
    name: str
    device: str
    dtype: str
    backend: Backend[Any]
    shape: ModelShape
    tokenizer: Any
    max_length_tokens: int
    intermediate_size: int
    vocab_size: int
    weights_bytes: int | None
    revision: str

    def prefill_peak_bytes(self, n_tokens: int, *, chunk_tokens: int) -> int:
        """Estimate device bytes of a prefill besides weights."""
        return self.backend.prefill_peak_bytes(
            self.shape, n_tokens, chunk_tokens=chunk_tokens, intermediate_size=self.intermediate_size
        )


def describe_model(
    spec: str, *, device: str = "auto", dtype: str = "auto", page_tokens: int = DEFAULT_PAGE_TOKENS
) -> ModelFacts:
    """Describe a model from its configuration and tokenizer files, without loading weights.

    Args: as :func:`kvscope.harness.engine.models.load_model`.

    Raises:
        UsageError: no such model, an architecture that cannot be run, or a bad device or dtype.
        EnvironmentProblem: the device asked for is not there.
    """
    from transformers import AutoTokenizer

    from kvscope.harness.engine.configs import max_length_tokens, text_config
    from kvscope.harness.engine.devices import resolve_device, resolve_dtype
    from kvscope.harness.engine.names import load_config, resolve_model, sampled_revision

    where, name = resolve_model(spec)
    config = load_config(spec)
    revision = sampled_revision(where, config)
    target = indexed(resolve_device(device))
    element_type = resolve_dtype(dtype, target)
    backend = backend_of(config)
    shape = backend.shape(config, element_bytes=element_type.itemsize, page_tokens=page_tokens, revision=revision)
    dtype_name = str(element_type).removeprefix("torch.")
    backend.check_dtype(dtype_name)
    text = text_config(config)
    try:
        tokenizer = None if is_preset(spec) else AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise UsageError(f"The tokenizer of model {spec!r} cannot be loaded: {_first_line(error)}") from error
    return ModelFacts(
        spec=spec,
        name=name,
        device=str(target),
        dtype=dtype_name,
        backend=backend,
        shape=shape,
        tokenizer=tokenizer,
        max_length_tokens=max_length_tokens(config),
        intermediate_size=int(getattr(text, "intermediate_size", None) or 4 * shape.hidden_size),
        vocab_size=int(text.vocab_size),
        weights_bytes=weights_bytes(config, element_bytes=element_type.itemsize),
        revision=revision,
    )


def indexed(device: "torch.device") -> "torch.device":
    """Return ``cuda`` as ``cuda:N``: rows and the worker name one GPU."""
    import torch

    if device.type != "cuda" or ":" in str(device):
        return device
    return torch.device("cuda", torch.cuda.current_device())


def weights_bytes(config: Any, *, element_bytes: int) -> int | None:
    """Return the bytes of a model's weights, counted on a copy without storage; None when it cannot be built so."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    except (ValueError, RuntimeError, NotImplementedError, ImportError):
        return None
    return element_bytes * sum(int(parameter.numel()) for parameter in model.parameters())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
