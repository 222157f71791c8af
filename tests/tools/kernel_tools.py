"""Shared by the tests of kernels: where they run, in which dtypes, and by how much a result may be off.

On a machine without a GPU kernels run in Triton's interpreter, where ``tl.dot`` on bf16 is silently wrong (Triton 3.9):
bf16 is tested on a GPU only.
"""

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
FP32_ERROR = 2e-5


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*size, seed, dtype=torch.float32):
    """The same numbers on every device."""
    return torch.randn(*size, generator=generator(seed)).to(dtype).to(DEVICE)
