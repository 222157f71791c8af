"""Products of the few rows of a shared step with the model's weights, on all cores of a CPU.

MKL splits a product among threads by rows of the result as it sees them. Of ``x @ W.T`` with few rows in ``x`` that
leaves one thread with all the work, of ``W @ x.T`` it does not: 16 rows take three fifths of the time on two cores, 8
rows less than half. Results differ by rounding, as those of steps of other sizes do.

Shapes: n rows, I features in, O features out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

MOST_ROWS = 64


@contextmanager
def turned_products() -> Iterator[None]:
    """Within it, linear layers of a decode step compute the product turned round; the step is of this thread alone."""
    own = F.linear

    def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        # A step's input is [n, 1, I].
        is_step = input.ndim == 3 and input.shape[1] == 1 and 2 <= input.shape[0] <= MOST_ROWS
        if not is_step or not (input.device.type == "cpu" and input.dtype == weight.dtype == torch.float32):
            return own(input, weight, bias)
        out_nO = torch.mm(weight, input[:, 0].t()).t().contiguous()
        return (out_nO if bias is None else out_nO.add_(bias))[:, None]

    F.linear = linear
    try:
        yield
    finally:
        F.linear = own
