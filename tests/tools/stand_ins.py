"""Methods that misbehave on purpose, registered for one test through ``kvscope.methods.registry.METHODS``."""

from typing import Any

import torch

from kvscope.methods.dense.method import Dense


class _Odd(Dense):
    stays = "every token, for a test"


class Failing(_Odd):
    """Raises when it is opened."""

    name = "failing"

    def open(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the page table\n is torn")


class Hungry(_Odd):
    """Runs out of memory when it is opened."""

    name = "hungry"

    def open(self, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")


class Picky(_Odd):
    """Cannot run anywhere, for two reasons."""

    name = "picky"

    def unsupported(self, shape: Any, device: Any) -> list[str]:
        del shape, device
        return ["it needs a moon", "and a sun"]


class Interrupting(_Odd):
    """Behaves like Ctrl-C at its second opening."""

    name = "interrupting"
    opened = 0

    def open(self, *args: Any, **kwargs: Any) -> Any:
        type(self).opened += 1
        if type(self).opened == 2:
            raise KeyboardInterrupt
        return super().open(*args, **kwargs)


METHODS = {cls.name: f"{__name__}:{cls.__name__}" for cls in (Failing, Hungry, Picky, Interrupting)}
