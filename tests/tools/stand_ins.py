"""Methods that misbehave on purpose, registered for one test through ``kvscope.methods.registry.METHODS``."""

from typing import Any

import torch

from kvscope.methods.call import AttentionCall
from kvscope.methods.dense.method import Dense
from kvscope.methods.resident import ResidentSequence
from kvscope.methods.store import PromptKV


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


class _Bad(ResidentSequence):
    """Misbehaves in its third step, in its last layer."""

    _prompt_tokens: int

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        attended = super().attend(layer, call)
        if self.n_tokens - self._prompt_tokens == 3 and layer == self.shape.layers[-1]:
            return self.spoil(attended)
        return attended

    def spoil(self, attended: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class _Raising(_Bad):
    def spoil(self, attended: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the third step is one too many")


class _Spoiling(_Bad):
    def spoil(self, attended: torch.Tensor) -> torch.Tensor:
        return attended * torch.nan


class Raising(_Odd):
    """Raises while it attends."""

    name = "raising"
    sequence: type[_Bad] = _Raising

    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> Any:
        ranges = self.resident_ranges(prompt)
        found = self.sequence(prompt, torch.device(device), ranges=ranges, reserve_tokens=reserve_tokens)
        found._prompt_tokens = prompt.n_tokens
        return found


class Spoiling(Raising):
    """Attends to NaN."""

    name = "spoiling"
    sequence = _Spoiling


METHODS = {cls.name: f"{__name__}:{cls.__name__}" for cls in (Failing, Hungry, Picky, Interrupting, Raising, Spoiling)}
