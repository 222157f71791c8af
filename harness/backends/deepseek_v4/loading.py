"""Makes a stock ``deepseek_v4`` model ready for this backend."""

from typing import Any

import torch
import transformers
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RMSNorm

from kvscope.harness.backends.deepseek_v4.prefill import use_own_attention


def prepare(model: Any) -> str:
    """Switch the attention; return what computes, for the row.

    transformers keeps norm weights in fp32. Where its norms then return fp32 in a bf16 model (5.17 does, 5.23 casts),
    the projections behind them fail, so there the weights are brought to the model's type, and the row says so.
    """
    use_own_attention(model)
    backend = f"torch {torch.__version__}: stock deepseek_v4 classes, eager attention with mask"
    dtype = next(model.parameters()).dtype
    norms = [module for module in model.modules() if isinstance(module, DeepseekV4RMSNorm)]
    promoting = [norm for norm in norms if norm(norm.weight.new_ones(1, len(norm.weight), dtype=dtype)).dtype != dtype]
    if promoting:
        for norm in promoting:
            norm.to(dtype)
        name = str(dtype).removeprefix("torch.")
        backend += f"; norm weights in {name}, which transformers {transformers.__version__} needs to run it"
    return backend
