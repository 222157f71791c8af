"""A CUDA graph without a GPU: the operations of a step, done again on the same tensors without its Python.

Kernels that Triton interprets are operations, too: they are launched again with the arguments that they had.
"""

from typing import Any, Self

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors of what an operation takes or gives: pytree's flattening takes as long as the operation."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in _tensors(each)]
    return []


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """Notes every operation within it, and keeps what each made, so that no address is given twice."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Any] = []
        self._again: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        from triton.runtime.interpreter import InterpretedFunction

        launch = InterpretedFunction.run

        def noted(kernel: Any, *args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                launch(kernel, *args, **kwargs)
            self._again.append((launch, (kernel, *args), kwargs, []))

        self._patch.setattr(InterpretedFunction, "run", noted)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._kept.append((args, kwargs, out))
        if func._schema.is_mutable:
            self._again.append((func, args, kwargs, []))
            return out
        made, given = _tensors(out), {_storage(each) for each in _tensors((*args, *kwargs.values()))}
        # A view shows what it is a view of, and needs nothing.
        if any(_storage(each) not in given for each in made):
            self._again.append((func, args, kwargs, made))
        return out

    def replay(self) -> None:
        """Do it all again: what an operation made is written where it made it, what it changed is changed again."""
        for func, args, kwargs, made in self._again:
            found = func(*args, **kwargs)
            if len(made) == 1 and isinstance(found, torch.Tensor):  # nearly always
                made[0].copy_(found)
            elif made:
                for old, new in zip(made, _tensors(found), strict=True):
                    old.copy_(new)
