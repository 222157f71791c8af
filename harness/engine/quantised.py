"""Quantised weights: what a config says of them, and whether they run as they are on a device."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from kvscope.errors import shown
from kvscope.harness.engine.configs import text_config
from kvscope.harness.engine.loading import explained

_GPU_ALONE = {"fp8", "fbgemm_fp8", "mxfp4", "nvfp4", "higgs", "fp_quant", "eetq"}
"""Kinds whose products are kernels of GPUs."""
_INSTEAD = ", where transformers would make plain weights of them: take a checkpoint that was saved with plain weights"
_SAYS_NOTHING_OF = {"sinq": "sinq"}
"""Kind -> its package, where transformers asks for it only while it loads."""


def quantization(config: Any) -> Any:
    """Return what a config says of quantised weights; None where they are plain."""
    return getattr(config, "quantization_config", None) or getattr(text_config(config), "quantization_config", None)


def check_quantization(spec: str, config: Any, *, device_type: str) -> None:
    """Refuse quantised weights that do not run here: an unknown kind, its package or its GPU is missing.

    On a GPU that lacks the kernels of fp8 or mxfp4, transformers turns the weights into plain ones, and says so. On a
    CPU, nothing else is left, and that would be another model: it is refused, unless the config itself asks for it.

    Args:
        spec: the model as asked for.
        config: its config.
        device_type: ``cpu`` or ``cuda``.

    Raises:
        UsageError: with the reason, transformers' where it gives one.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    asked = quantization(config)
    if asked is None:
        return
    with explained(spec, "quantisation"):
        values = dict(asked if isinstance(asked, dict) else asked.to_dict())
        kind = values.get("quant_method")
        if not AutoHfQuantizer.supports_quant_method(values):
            raise ValueError(f"transformers knows no quant_method {shown(kind)}")
        package = _SAYS_NOTHING_OF.get(str(kind))
        if package and find_spec(package) is None:
            raise ValueError(f"its quant_method {shown(kind)} needs the package {package}")
        quantizer = AutoHfQuantizer.from_config(values, pre_quantized=True)
        plain = getattr(quantizer.quantization_config, "dequantize", False)
        if device_type == "cpu" and str(kind) in _GPU_ALONE and not plain:
            raise ValueError(f"{kind} weights need a GPU, and this run is on a CPU{_INSTEAD}")
        quantizer.validate_environment(device_map=None, weights_only=True)
        turned_plain = getattr(quantizer.quantization_config, "dequantize", False) and not plain
        if turned_plain and str(kind) not in _GPU_ALONE:
            raise ValueError(f"{kind} weights do not run on this machine{_INSTEAD}")
