"""Several devices pretended on a CPU: every tensor is noted to be on one, and operations that mix them are refused.

The devices are ``cpu:1``, ``cpu:2``, ...; ``cpu`` is the host, as beside a GPU. What may cross is what may cross there:
copies, host indices, and host numbers of no dimension.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import dispatch_model
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

HOST = torch.device("cpu")
_NOTED = "_pretended_device"
_GET_DEVICE, _SET_DATA = torch.Tensor.device.__get__, torch.Tensor.data.__set__
_INDEXED = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)
_READS = {torch.Tensor.untyped_storage, torch.Tensor.data_ptr, torch.Tensor.size, torch.Tensor.__len__}


def where(tensor: torch.Tensor) -> torch.device:
    """Return the device that a tensor is pretended to be on."""
    return getattr(tensor, _NOTED, HOST)


def put(tensor: torch.Tensor, device: Any) -> torch.Tensor:
    """Pretend a tensor to be there."""
    setattr(tensor, _NOTED, torch.device(device))
    return tensor


class Pretended(TorchFunctionMode):
    """Use as a context manager.

    Attributes:
        used: every device that an operation ran on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.used: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == _GET_DEVICE:  # another object each time
            return where(args[0])
        if func == torch._has_compatible_shallow_copy_type:
            return True  # ``Module.to`` writes the moved data into the parameter that is there
        if func == _SET_DATA:
            func(*args)
            put(args[0], where(args[1]))
            return None
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return self._moved(func, args, kwargs)
        if func is torch.Tensor.copy_:
            return func(*args, **kwargs)
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = HOST
        device = self._device(func, args, kwargs) if asked is None else torch.device(asked)
        found = func(*args, **kwargs)
        if func not in _READS and device != HOST:
            self.used.add(str(device))
            for tensor in _tensors(found):
                put(tensor, device)
        return found

    def _moved(self, func, args, kwargs):
        tensor = args[0]
        device, dtype, _, _ = torch._C._nn._parse_to(*args[1:], **_known(kwargs)) if func is torch.Tensor.to else (
            HOST, None, None, None
        )  # fmt: skip
        other = next((each for each in args[1:] if isinstance(each, torch.Tensor)), None)
        if other is not None:
            device, dtype = where(other), other.dtype
        target = where(tensor) if device is None else device
        dtype = tensor.dtype if dtype is None else dtype
        if target == where(tensor) and dtype == tensor.dtype and not kwargs.get("copy"):
            return tensor
        return put(tensor.detach().to(dtype=dtype, copy=True), target)

    def _device(self, func, args, kwargs) -> torch.device:
        """Return the one device of an operation's tensors."""
        if func in _INDEXED:
            return self._indexed(func, args)
        found = {where(each) for each in _tensors((args, kwargs)) if each.dim() or where(each) != HOST}
        if len(found) > 1:
            raise RuntimeError(f"{func} mixes {sorted(map(str, found))}")
        return next(iter(found), HOST)

    def _indexed(self, func, args) -> torch.device:
        own = where(args[0])
        indices = [each for each in _tensors(args[1]) if each.dim()]
        if any(where(each) not in (own, HOST) for each in indices):
            raise RuntimeError(f"{func}: a tensor on {own} is indexed from elsewhere")
        values = _tensors(args[2:])
        if indices and any(each.dim() and where(each) != own for each in values):
            raise RuntimeError(f"{func}: values from elsewhere go to single places of a tensor on {own}")
        return own


def _known(kwargs):
    return {key: value for key, value in kwargs.items() if key not in ("memory_format", "copy")}


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def spread(stock: Any, modules: dict[str, str]) -> Any:
    """Return a copy of a transformers model whose modules are on pretended devices, with accelerate's hooks.

    Call it, and use the model, within ``Pretended``.
    """
    model = copy.deepcopy(stock)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        module = max((each for each in modules if f"{name}.".startswith(f"{each}.")), key=len)
        put(tensor, modules[module])
    first = str(where(next(model.parameters())))
    return dispatch_model(
        model, device_map=modules, main_device=first, skip_keys=model._skip_keys_device_placement, force_hooks=True
    )
