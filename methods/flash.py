"""Fused attention with its log-sum-exp, which torch's public function does not return.

Shapes: B batch, H heads (equal for queries and keys here), S queries, T keys, D head size.
"""

import torch

#: Query-key pairs from which cuDNN's attention is asked on Hopper: there it is faster than flash attention 2, but it
#: plans anew for every shape, which small work does not earn back.
_CUDNN_PAIRS = 2**31


def flash_runs_on(q_BHSD: torch.Tensor) -> bool:
    """Return whether a fused kernel takes this device, dtype and head size."""
    D = q_BHSD.shape[-1]
    if q_BHSD.device.type == "cpu":
        return q_BHSD.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if q_BHSD.device.type == "cuda":
        return D % 8 == 0 and D <= 256
    return False


def attention_with_lse(
    q_BHSD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, *, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention output [B, H, S, D] and log-sum-exp [B, H, S] in fp32, through torch's fused kernels.

    Args:
        causal: query i sees keys up to i; needs S == T, where the two conventions for the mask's corner agree.

    Raises:
        ValueError: causal with S != T.
        RuntimeError: no fused kernel for this input (``flash_runs_on`` says so beforehand).
    """
    if causal and q_BHSD.shape[2] != k_BHTD.shape[2]:
        raise ValueError(f"causal attention needs as many keys as queries, got {k_BHTD.shape[2]} and {q_BHSD.shape[2]}")
    aten = torch.ops.aten
    if q_BHSD.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q_BHSD, k_BHTD, v_BHTD, 0.0, causal, scale=scale)
    elif _suits_cudnn(q_BHSD, k_BHTD):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            q_BHSD, k_BHTD, v_BHTD, None, True, 0.0, causal, False, scale=scale
        )
        lse = lse.reshape(q_BHSD.shape[:3])
    elif q_BHSD.device.type == "cuda" and q_BHSD.dtype != torch.float32:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q_BHSD, k_BHTD, v_BHTD, 0.0, causal, False, scale=scale)
    elif q_BHSD.device.type == "cuda":
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            q_BHSD, k_BHTD, v_BHTD, None, True, 0.0, causal, scale=scale
        )
    else:
        raise RuntimeError(f"no fused attention on {q_BHSD.device.type} in {q_BHSD.dtype}")
    return out, lse[..., : q_BHSD.shape[2]].float()


def masked_attention(
    q_BHSD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, mask_BHST: torch.Tensor, *, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention output [B, H, S, D] and log-sum-exp [B, H, S] under a mask, on a CPU.

    Args:
        mask_BHST: what is added to the logits, in the dtype of the queries; B and H may be 1. Each query sees a key.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHSD, k_BHTD, v_BHTD, 0.0, False, attn_mask=mask_BHST, scale=scale
    )
    return out, lse


def flash_window_runs_on(q_BHSD: torch.Tensor) -> bool:
    """Return whether ``windowed_attention`` takes this device, dtype and head size."""
    half = q_BHSD.dtype in (torch.bfloat16, torch.float16)
    return q_BHSD.device.type == "cuda" and half and flash_runs_on(q_BHSD)


def windowed_attention(
    q_BQSD: torch.Tensor, k_BHTD: torch.Tensor, v_BHTD: torch.Tensor, *, scale: float, window: int
) -> torch.Tensor:
    """Return causal sliding-window attention of the last S of T positions, [B, Q, S, D]; K and V are not repeated.

    Args:
        window: tokens a query sees, itself included.

    Raises:
        RuntimeError: no such kernel for this input (``flash_window_runs_on`` says so beforehand).
    """
    out, *_ = torch.ops.aten._flash_attention_forward(
        q_BQSD.transpose(1, 2), k_BHTD.transpose(1, 2), v_BHTD.transpose(1, 2), None, None, q_BQSD.shape[2],
        k_BHTD.shape[2], 0.0, True, False, scale=scale, window_size_left=window - 1, window_size_right=0,
    )  # fmt: skip
    return out.transpose(1, 2)  # type: ignore[no-any-return]


def _suits_cudnn(q_BHSD: torch.Tensor, k_BHTD: torch.Tensor) -> bool:
    if q_BHSD.device.type != "cuda" or q_BHSD.dtype == torch.float32:
        return False
    B, H, S, D = q_BHSD.shape
    T = k_BHTD.shape[2]
    return (
        B * H * S * T >= _CUDNN_PAIRS
        and D in (64, 128)
        and S % 128 == 0
        and T % 128 == 0
        and torch.cuda.get_device_capability(q_BHSD.device)[0] == 9
    )
