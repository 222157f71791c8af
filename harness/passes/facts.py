"""What is known of a model before its weights load: shape, tokenizer, longest context, bytes of weights.

``plan`` needs no more, and ``run`` refuses a bad length in a second instead of after minutes of loading.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvscope.harness.engine.backend import Backend, backend_of
from kvscope.harness.passes.libraries import import_libraries
from kvscope.methods.shape import DEFAULT_PAGE_TOKENS, ModelShape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class PromptFacts:
    """What prompts and rows need of a model, whoever computes it.

    Attributes:
        spec: the model as asked for.
        name: what rows call it: ``reference``, a hub id, a folder's name, or a server's name for it.
        device: where it will compute, ``auto`` resolved: ``cpu`` or ``cuda:N``; ``server``.
        dtype: element type of weights and KV cache, ``auto`` resolved, e.g. ``float32``.
        tokenizer: what encodes prompts: the transformers tokenizer, or a ``ChatTokenizer`` around it; None for a
            preset.
        chat_template: hash of the template that prompts are put into; None for none.
        max_length_tokens: longest prompt plus answer.
        revision: hub commit, or a hash of a folder's files; None where nobody tells.
    """

    spec: str
    name: str
    device: str
    dtype: str
    tokenizer: Any
    chat_template: str | None
    max_length_tokens: int
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class ModelFacts(PromptFacts):
    """A model described by its configuration files alone.

    Attributes:
        backend: its kind of cache.
        weights_bytes: bytes of the weights in ``dtype``; None when the configuration does not tell.
        intermediate_size: width of the MLP.
        vocab_size: token ids are below it.
        not_applied: settings of its generation config that stock applies to greedy answers and kvscope does not.
        step_weights_bytes: of these, what a decode step reads; None with experts, too, where tokens decide it.
    """

    backend: Backend[Any]
    shape: ModelShape
    intermediate_size: int
    vocab_size: int
    weights_bytes: int | None
    revision: str
    not_applied: tuple[str, ...] = ()
    step_weights_bytes: int | None = None

    def prefill_peak_bytes(self, n_tokens: int, *, chunk_tokens: int) -> int:
        """Estimate device bytes of a prefill besides weights."""
        return self.backend.prefill_peak_bytes(
            self.shape, n_tokens, chunk_tokens=chunk_tokens, intermediate_size=self.intermediate_size
        )


def describe_model(
    spec: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    page_tokens: int = DEFAULT_PAGE_TOKENS,
    chat_template: str = "none",
    elsewhere: bool = False,
) -> ModelFacts:
    """Describe a model from its configuration and tokenizer files, without loading weights.

    Args: as :func:`kvscope.harness.engine.models.load_model`, and
        chat_template: ``auto``, ``none`` or a file (see :func:`kvscope.harness.engine.chat.chat_tokenizer`), and
        elsewhere: describe it as on a GPU of another machine; ``device`` means nothing then.

    Raises:
        UsageError: no such model, an architecture that cannot be run, a bad device or dtype, or a bad template.
        EnvironmentProblem: the device asked for is not there.
    """
    import_libraries()
    import torch

    from kvscope.harness.engine.chat import chat_tokenizer
    from kvscope.harness.engine.configs import max_length_tokens, text_config
    from kvscope.harness.engine.devices import resolve_device, resolve_dtype
    from kvscope.harness.engine.identity import generation_config, model_folder, not_applied
    from kvscope.harness.engine.loading import explained, load_config, load_tokenizer
    from kvscope.harness.engine.names import resolve_model, sampled_revision
    from kvscope.harness.engine.presets import is_preset
    from kvscope.harness.engine.without_weights import model_without_weights

    where, name = resolve_model(spec)
    config = load_config(spec)
    target = torch.device("cuda", 0) if elsewhere else indexed(resolve_device(device))
    element_type = resolve_dtype(dtype, target)
    backend = backend_of(config)
    with explained(spec):
        shape = backend.shape(config, element_bytes=element_type.itemsize, page_tokens=page_tokens)
        longest_tokens = max_length_tokens(config)
    dtype_name = str(element_type).removeprefix("torch.")
    backend.check_dtype(dtype_name)
    text = text_config(config)
    tokenizer = load_tokenizer(spec, where, config)
    chat = chat_tokenizer(tokenizer, chat_template)
    model = model_without_weights(spec, where, config, shape, device_type=target.type)
    revision = sampled_revision(where, config)
    return ModelFacts(
        spec=spec,
        name=name,
        device=str(target),
        dtype=dtype_name,
        backend=backend,
        shape=dataclasses.replace(shape, revision=revision),
        tokenizer=chat or tokenizer,
        chat_template=None if chat is None else chat.sha256,
        max_length_tokens=longest_tokens,
        intermediate_size=int(getattr(text, "intermediate_size", None) or 4 * shape.hidden_size),
        vocab_size=int(text.vocab_size),
        weights_bytes=None if model is None else _weights_bytes(model, element_type.itemsize),
        revision=revision,
        not_applied=() if is_preset(spec) else tuple(not_applied(generation_config(model_folder(where), config))),
        step_weights_bytes=None if model is None else _step_weights_bytes(model, element_type.itemsize),
    )


def indexed(device: "torch.device") -> "torch.device":
    """Return ``cuda`` as ``cuda:N``: rows and the worker name one GPU."""
    import torch

    if device.type != "cuda" or ":" in str(device):
        return device
    return torch.device("cuda", torch.cuda.current_device())


def _weights_bytes(model: Any, element_bytes: int) -> int:
    return element_bytes * sum(int(parameter.numel()) for parameter in model.parameters())


def _step_weights_bytes(model: Any, element_bytes: int) -> int | None:
    from kvscope.harness.engine.decode_graph import has_experts
    from kvscope.harness.passes.floor import weights_read

    return None if has_experts(model) else element_bytes * sum(int(each.numel()) for each in weights_read(model))
