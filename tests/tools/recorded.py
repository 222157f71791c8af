"""A CUDA graph without a GPU: the operations of a step, done again on the same tensors without its Python."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """Notes every operation within it, and keeps what each made, so that no address is given twice."""

    def __init__(self) -> None:
        super().__init__()
        self._done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._done.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        """Do it all again: what an operation made is written where it made it, what it changed is changed again.

        A view shows what it is a view of, and needs nothing.
        """
        for func, args, kwargs, out in self._done:
            given = {_storage(each) for each in _tensors((args, kwargs))}
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif any(_storage(each) not in given for each in _tensors(out)):
                for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                    old.copy_(new)
