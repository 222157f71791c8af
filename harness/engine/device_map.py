"""Which device each part of a model is on (``--device-map``), settled before any weights load.

The map is written out, module by module, so that every process of a run has the same one whatever memory is free then;
transformers loads by it, and accelerate's hooks move the hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from kvscope.errors import UsageError, did_you_mean, shown, shown_path
from kvscope.harness.engine.glue import decoder_of, layers_of
from kvscope.paths import user_path
from kvscope.results.reading import parse_json, read_regular

AUTOMATIC = ("auto", "balanced")
_MOST_FILE_BYTES = 1 << 20
_MEND = "Give --device-map auto, balanced or a JSON file of module: device, as in transformers."


@dataclass(frozen=True, kw_only=True)
class DeviceMap:
    """Where the modules of a model are.

    Attributes:
        modules: name of a module -> its device; every decoder layer is one.
        layers: device of every decoder layer.
        devices: all of them, that of the embeddings first: there tokens go in and logits come out.
        weights_bytes: device -> bytes of its weights.
    """

    modules: Mapping[str, str]
    layers: tuple[str, ...]
    devices: tuple[str, ...]
    weights_bytes: Mapping[str, int]

    def text(self) -> str:
        """Return which layers each device has, as ``cuda:0 (layers 0-15), cuda:1 (layers 16-31)``."""
        return ", ".join(f"{device} ({self._layers_text(device)})" for device in self.devices)

    def _layers_text(self, device: str) -> str:
        runs, layer = [], 0
        for each, found in groupby(self.layers):
            n = len(list(found))
            if each == device:
                runs.append(str(layer) if n == 1 else f"{layer}-{layer + n - 1}")
            layer += n
        if not runs:
            return "no layers"
        return f"{'layer' if self.layers.count(device) == 1 else 'layers'} {' '.join(runs)}"


@dataclass(frozen=True)
class AskedMap:
    """What ``--device-map`` says, before the model is known.

    Attributes:
        given: module -> device, of a file; None: the layers are shared out among all GPUs.
        devices: that may be used, each once: of the file, or all that torch sees.
    """

    given: Mapping[str, str] | None
    devices: tuple[str, ...]


def read_device_map(asked: str) -> AskedMap:
    """Read what is asked for: ``auto``, ``balanced`` (the same), or a file.

    Without a GPU all of an automatic map is the CPU.

    Raises:
        UsageError: no such file, or it holds no map of devices that are there.
    """
    n_gpus = _n_gpus()
    if asked in AUTOMATIC:
        return AskedMap(None, tuple(f"cuda:{index}" for index in range(n_gpus)) or ("cpu",))
    path = user_path(asked, what="--device-map")
    given = _read_file(path)
    devices = tuple(dict.fromkeys(given.values()))
    for device in devices:
        if device != "cpu" and int(device.removeprefix("cuda:")) >= n_gpus:
            seen = "no GPU" if n_gpus == 0 else "1 GPU" if n_gpus == 1 else f"{n_gpus} GPUs"
            raise UsageError(
                f"{shown_path(path)} puts modules on {device}, and torch sees {seen} here: name devices that are there."
            )
    if len(devices) > 1 and "cpu" in devices:
        raise UsageError(
            f"{shown_path(path)} puts modules on the CPU and on GPUs: weights that are moved for every step are not "
            "measured here, so name GPUs alone, or the CPU alone."
        )
    return AskedMap(given, devices)


def _n_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _read_file(path: Path) -> dict[str, str]:
    text = read_regular(path, most_bytes=_MOST_FILE_BYTES, mend=_MEND)
    if text is None:
        raise UsageError(f"There is no file {shown_path(path)}. {_MEND}")
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UsageError(f"{shown_path(path)} is not valid JSON ({error}). {_MEND}") from error
    if not isinstance(found, dict) or not found:
        raise UsageError(f"{shown_path(path)} holds {shown(found)}, expected an object of module: device. {_MEND}")
    return {name: _device_text(value, name, path) for name, value in found.items()}


def _device_text(value: object, name: str, path: Path) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return f"cuda:{value}"
    if isinstance(value, str) and value.startswith("cuda:") and value[5:].isdecimal() and len(value) < 10:
        return f"cuda:{int(value[5:])}"
    if value == "cpu":
        return value
    raise UsageError(
        f"{shown_path(path)} puts {shown(name)} on {shown(value)}, expected cuda:N, N or cpu: no part may be on disk."
    )


def place(asked: AskedMap, model: Any, *, spec: str, element_bytes: int) -> DeviceMap:
    """Return where every module of a model goes.

    Args:
        model: built without storage.
        spec: the model as asked for.
        element_bytes: of a weight.

    Raises:
        UsageError: the file names what the model has not, leaves weights out, cuts through a layer, or puts one and
            the same weights in two places.
    """
    layers = layers_of(decoder_of(model))
    names = {id(module): name for name, module in model.named_modules()}
    layer_names = [names[id(layer)] for layer in layers]
    if asked.given is None:
        wanted: Mapping[str, str] = _shared_out(asked.devices, layers, layer_names)
        first = asked.devices[0]
    else:
        _check_names(asked.given, model, spec=spec)
        wanted = asked.given
        first = _device_of(next(name for name, _ in model.named_parameters()), wanted) or ""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {name: _device_of(name, wanted) or ("" if asked.given else first) for name in parameters}
    _check_weights(found, parameters, spec=spec)
    layer_devices = []
    for name in layer_names:
        own = {device for parameter, device in found.items() if parameter.startswith(f"{name}.")}
        if len(own) > 1:
            raise UsageError(
                f"The device map puts {name!r} of model '{spec}' on {', '.join(sorted(own))}: a layer's cache has one "
                "device, so give the layer one."
            )
        layer_devices.append(next(iter(own), first))
    modules = dict(_other_modules(model, found, layer_names, first))
    modules |= dict(zip(layer_names, layer_devices, strict=True))
    devices = tuple(dict.fromkeys([first, *modules.values()]))
    weights_bytes = dict.fromkeys(devices, 0)
    for name, parameter in model.named_parameters():
        weights_bytes[found[name]] += parameter.numel() * element_bytes
    return DeviceMap(modules=modules, layers=tuple(layer_devices), devices=devices, weights_bytes=weights_bytes)


def found_devices(model: Any) -> tuple[str, ...]:
    """Return the device of every decoder layer of a loaded model that is on several; empty where it is on one."""
    if len({parameter.device for parameter in model.parameters()}) < 2:
        return ()
    return tuple(str(next(layer.parameters()).device) for layer in layers_of(decoder_of(model)))


def move(model: Any, modules: Mapping[str, str], *, first: str) -> Any:
    """Move a model that was built in one place to where a map says, as transformers does after loading by one.

    Args:
        first: the device of its embeddings.
    """
    from accelerate import dispatch_model

    skip_keys = model._skip_keys_device_placement
    return dispatch_model(model, device_map=dict(modules), main_device=first, skip_keys=skip_keys)


def begin_on(model: Any, first: str) -> None:
    """Have a model that transformers loaded by a map take its inputs to the embeddings' device.

    accelerate takes any of the map's, a different one in each process.
    """
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    hook = AlignDevicesHook(first, io_same_device=True, skip_keys=model._skip_keys_device_placement)
    add_hook_to_module(model, hook)


def _shared_out(devices: Sequence[str], layers: Sequence[Any], names: Sequence[str]) -> dict[str, str]:
    """Deal the layers out in order, by their weights, each device its equal part. All else stays on the first.

    A cache is as large as its layers are many: so it is dealt out with them. What is free at the moment does not count,
    or the same call would not give the same map.
    """
    sizes = [sum(int(parameter.numel()) for parameter in layer.parameters()) for layer in layers]
    total, before, found = sum(sizes), 0, {}
    for name, size in zip(names, sizes, strict=True):
        middle = (before + size / 2) / total
        found[name] = devices[min(len(devices) - 1, int(middle * len(devices)))]
        before += size
    return found


def _device_of(name: str, wanted: Mapping[str, str]) -> str | None:
    """Return the device of the longest name in a map that a tensor's begins with."""
    while True:
        if name in wanted:
            return wanted[name]
        if not name:
            return None
        name = name.rpartition(".")[0]


def _check_names(given: Mapping[str, str], model: Any, *, spec: str) -> None:
    known = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    for name in given:
        if name not in known:
            raise UsageError(
                f"The device map names {shown(name)}, which model '{spec}' has not.{did_you_mean(name, known)}"
            )


def _check_weights(found: Mapping[str, str], parameters: Mapping[str, Any], *, spec: str) -> None:
    missing = [name for name, device in found.items() if not device]
    if missing:
        raise UsageError(
            f"The device map says nothing of {missing[0]!r} of model '{spec}'"
            f"{f' and of {len(missing) - 1} others' if len(missing) > 1 else ''}: name its module, too."
        )
    places: dict[int, tuple[str, str]] = {}
    for name, parameter in parameters.items():
        other, device = places.setdefault(id(parameter), (name, found[name]))
        if device != found[name]:
            raise UsageError(
                f"The device map puts {other!r} of model '{spec}' on {device} and {name!r} on {found[name]}, and they "
                "are the same weights: give both one device."
            )


def _other_modules(
    model: Any, found: Mapping[str, str], layer_names: Sequence[str], first: str
) -> Iterator[tuple[str, str]]:
    """Yield the modules with tensors of their own outside the layers, and their devices."""
    inside = tuple(f"{name}." for name in layer_names)
    tensors = [*found, *(name for name, _ in model.named_buffers())]
    for name in tensors:
        if not name.startswith(inside):
            yield name.rpartition(".")[0] or name, found.get(name, first)
