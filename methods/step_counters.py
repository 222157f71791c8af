"""Small numbers that change from step to step: written on the host, sent to the device in one copy for all."""

from __future__ import annotations

import torch

_BLOCK = 1024


#: Room beyond a choice whose size changes, as a share of it.
SPARE_SHARE = 0.25


class StepCounters:
    """The numbers of the sequences of a session, int32, at addresses on the device that stay.

    Attributes:
        spare_share: room that sequences keep beyond a choice whose size changes: one that outgrows it costs another
            capture of the step.
    """

    def __init__(self, device: torch.device, *, spare_share: float = SPARE_SHARE) -> None:
        self.spare_share = spare_share
        self._device = device
        self._blocks: list[_Block] = []

    def take(self) -> Counter:
        """Return a number of one's own, 0 at first. Give it back by its ``release``."""
        block = next((block for block in self._blocks if block.free), None)
        if block is None:
            block = _Block(self._device)
            self._blocks.append(block)
        return Counter(block, block.free.pop())

    def send(self) -> None:
        """Send what was set to the device, behind the steps before and ahead of those to come."""
        for block in self._blocks:
            block.send()


class Counter:
    """One number.

    Attributes:
        device_1: where the device reads it, [1].
    """

    def __init__(self, block: _Block, index: int) -> None:
        self._block, self._index = block, index
        self.device_1 = block.device_n[index : index + 1]
        self.set(0)

    def set(self, value: int) -> None:
        """Write it, for the next ``send``."""
        self._block.values[self._index] = value
        self._block.is_sent = False

    def release(self) -> None:
        """Give its place to another."""
        self._block.free.append(self._index)


class _Block:
    """Numbers that travel together."""

    def __init__(self, device: torch.device) -> None:
        self.device_n = torch.zeros(_BLOCK, dtype=torch.int32, device=device)
        self.free = list(range(_BLOCK - 1, -1, -1))
        self.is_sent = True
        self._cuda = device.type == "cuda"
        self._held_n = torch.zeros(_BLOCK, dtype=torch.int32)
        self.values = self._held_n.numpy()
        # Two in turn: a copy may still be on its way when the next numbers are written.
        self._staged = [torch.zeros(_BLOCK, dtype=torch.int32, pin_memory=self._cuda) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def send(self) -> None:
        if self.is_sent:
            return
        self.is_sent = True
        if not self._cuda:
            self.device_n.copy_(self._held_n)
            return
        self._turn = 1 - self._turn
        before = self._copied[self._turn]
        if before is not None:
            before.synchronize()
        staged = self._staged[self._turn]
        staged.copy_(self._held_n)
        self.device_n.copy_(staged, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._copied[self._turn] = event
