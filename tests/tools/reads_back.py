"""What a step does that no CUDA graph can hold."""

from torch.utils._python_dispatch import TorchDispatchMode


class ReadsBack(TorchDispatchMode):
    """Notes every operation that a capture would refuse: what waits for the device, and shapes made from data."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique", "is_nonzero", "item",
               "repeat_interleave.Tensor", "bincount")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if name.startswith(self.REFUSED):
            self.found.append(name)
        return func(*args, **(kwargs or {}))
