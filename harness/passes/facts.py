"""What is known of a model before its weights load: shape, tokenizer, longest context, bytes of weights.

``plan`` needs no more, and ``run`` refuses a bad length in a second instead of after minutes of loading.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from kvscope.errors import UsageError
from kvscope.harness.engine.backend import Backend, backend_of
from kvscope.harness.passes.libraries import import_libraries
from kvscope.methods.shape import DEFAULT_PAGE_TOKENS, ModelShape

if TYPE_CHECKING:
    import torch

    from kvscope.harness.engine.device_map import DeviceMap


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

    @property
    def where(self) -> str:
        """What rows call the place where it computes: its device, or all of them."""
        return self.device

    @property
    def plain_tokenizer(self) -> Any:
        """The transformers tokenizer, without a template around it; None for a preset."""
        return self.tokenizer if self.chat_template is None else self.tokenizer.plain


class DevicePart(NamedTuple):
    """What a device has of a model.

    Attributes:
        device: its name.
        weights_bytes: of the weights.
        cache_share: share of the managed layers, and so of a cache.
    """

    device: str
    weights_bytes: int
    cache_share: float


@dataclass(frozen=True, kw_only=True)
class ModelFacts(PromptFacts):
    """A model described by its configuration files alone.

    Attributes:
        backend: its kind of cache.
        weights_bytes: bytes of the weights in ``dtype``; None when the configuration does not tell.
        intermediate_size: width of the MLP.
        vocab_size: token ids are below it.
        not_applied: settings of its generation config that stock applies to greedy answers and kvscope does not.
        device_map: where its modules are, where they are on several devices; ``device`` is that of its embeddings.
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
    device_map: "DeviceMap | None" = None

    @property
    def devices(self) -> tuple[str, ...]:
        """Every device that it is on, that of its embeddings first."""
        return (self.device,) if self.device_map is None else self.device_map.devices

    @property
    def where(self) -> str:
        return ", ".join(self.devices)

    @property
    def placement(self) -> str:
        """Its devices and, where there are several, the layers on each."""
        return self.device if self.device_map is None else self.device_map.text()

    def device_parts(self) -> list[DevicePart]:
        """Return what each of its devices has of the weights and of the cache; none where the weights are not known."""
        if self.weights_bytes is None:
            return []
        if self.device_map is None:
            return [DevicePart(self.device, self.weights_bytes, 1.0)]
        managed = [self.device_map.layers[layer] for layer in self.shape.layers]
        return [
            DevicePart(device, self.device_map.weights_bytes[device], managed.count(device) / len(managed))
            for device in self.devices
        ]

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
    device_map: str | None = None,
) -> ModelFacts:
    """Describe a model from its configuration and tokenizer files, without loading weights.

    Args: as :func:`kvscope.harness.engine.models.load_model`, and
        chat_template: ``auto``, ``none`` or a file (see :func:`kvscope.harness.engine.chat.chat_tokenizer`), and
        elsewhere: describe it as on a GPU of another machine; ``device`` means nothing then, and
        device_map: ``auto``, ``balanced`` or a file (see :func:`kvscope.harness.engine.device_map.read_device_map`);
            ``device`` means nothing then.

    Raises:
        UsageError: no such model, an architecture that cannot be run, a bad device, map or dtype, or a bad template.
        EnvironmentProblem: the device asked for is not there.
    """
    import_libraries()
    import torch

    from kvscope.harness.engine.chat import chat_tokenizer
    from kvscope.harness.engine.configs import max_length_tokens, text_config
    from kvscope.harness.engine.device_map import place, read_device_map
    from kvscope.harness.engine.devices import resolve_device, resolve_dtype
    from kvscope.harness.engine.identity import generation_config, model_folder, not_applied
    from kvscope.harness.engine.loading import explained, load_config, load_tokenizer
    from kvscope.harness.engine.names import resolve_model, sampled_revision
    from kvscope.harness.engine.presets import is_preset
    from kvscope.harness.engine.without_weights import model_without_weights

    where, name = resolve_model(spec)
    config = load_config(spec)
    asked = None if device_map is None else read_device_map(device_map)
    if asked is not None:
        device = asked.devices[0]
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
    placed: DeviceMap | None = None
    if asked is not None and len(asked.devices) > 1:
        check_spread(spec, model, config, backend)
    if asked is not None and model is not None:
        found = place(asked, model, spec=spec, element_bytes=element_type.itemsize)
        target = torch.device(found.devices[0])
        if len(found.devices) > 1:
            placed, shape = found, dataclasses.replace(shape, devices=found.layers)
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
        device_map=placed,
    )


def check_spread(spec: str, model: Any, config: Any, backend: Backend[Any]) -> None:
    """Refuse to put a model on several devices that runs on one.

    Args:
        model: built without storage; None where it is built with storage alone.

    Raises:
        UsageError: saying why.
    """
    if not backend.spans_devices:
        why = f"{backend.name} keeps its cache on one"
    elif getattr(config, "quantization_config", None) is not None:
        why = "its weights are quantised, and their kernels were written for one"
    elif model is None:
        why = "its modules are known only when it has loaded"
    else:
        return
    raise UsageError(f"Model '{spec}' cannot be on several devices: {why}; leave out --device-map.")


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
