# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""The indexer's score of every chunk in Triton: fp8 keys against the heads' queries, one layer a grid column.

Shapes: L indexed layers, X queries, I indexer heads, E key size, n chunks, M chunks a tile.
README.md has the mathematics, the layout and the limits.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvscope.methods.kernels.grid import launches_beside, launches_dependents, n_sms

FP8_MAX = tl.constexpr(448.0)
QueryPrecision = Literal["fp8", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Constants of the kernel.

    Attributes:
        tile_chunks: keys of one iteration.
        programs_per_sm: size of the grid, over all layers and queries.
        num_warps, num_stages: as Triton means them.
        prefetch_tiles: first tiles of a program whose keys are asked for before its queries are rounded, on a GPU; 0
            or a power of two.
        dependent: whether the kernel is launched before the one it follows has ended, where the device can.
    """

    tile_chunks: int = 128
    programs_per_sm: int = 2
    num_warps: int = 8
    num_stages: int = 4
    prefetch_tiles: int = 0
    dependent: bool = False


DEFAULT = Tuning()


@triton.jit
def _prefetch(pointers):
    """Ask for the lines of memory behind these pointers, and wait for none."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _score_kernel(
    q_ptr,
    weight_ptr,
    bias_ptr,
    keys_ptr,
    scale_ptr,
    out_ptr,
    n_chunks,
    n_queries,
    HEADS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    E: tl.constexpr,
    E_PAD: tl.constexpr,
    M: tl.constexpr,
    FP8_QUERY: tl.constexpr,
    PREFETCH: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Score a run of tiles for one (layer, query)."""
    query = tl.program_id(1).to(tl.int64)
    layer = query // n_queries
    keys = keys_ptr + layer * n_chunks * E
    n_tiles = (n_chunks + M - 1) // M
    program = tl.program_id(0).to(tl.int64)
    begin = (program * n_tiles // tl.num_programs(0)).to(tl.int32)
    end = ((program + 1) * n_tiles // tl.num_programs(0)).to(tl.int32)
    last = tl.minimum(end * M, n_chunks)
    if PREFETCH > 0:
        # Otherwise the memory is idle while queries are rounded.
        early = tl.minimum(begin * M + tl.arange(0, PREFETCH * M), last - 1)
        _prefetch(keys + early.to(tl.int64) * E)
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.arange(0, HEADS_PAD)
    e = tl.arange(0, E_PAD)
    m = tl.arange(0, M)
    q = tl.load(
        q_ptr + query * (HEADS * E) + head[:, None] * E + e[None, :],
        mask=(head < HEADS)[:, None] & (e < E)[None, :],
        other=0.0,
    ).to(tl.float32)
    weight = tl.load(weight_ptr + query * HEADS + head, mask=head < HEADS, other=0.0).to(tl.float32)
    # A head's query is scaled to the range of its type; relu lets the factor through to the head's weight.
    largest = tl.max(tl.abs(q), 1)
    factor = tl.where(largest > 0, largest / FP8_MAX, 1.0)
    weight = weight * factor
    q = q / factor[:, None]
    if FP8_QUERY:
        # Rounded to three bits of mantissa first, so that the conversion is exact: Triton's interpreter (3.9) loses
        # the carry into the exponent.
        bits = q.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        q = bits.to(tl.float32, bitcast=True).to(tl.float8e4nv)
    else:
        q = q.to(tl.float16)
    q = tl.trans(q)
    bias = tl.load(bias_ptr + layer).to(tl.float32)
    scales = scale_ptr + layer * n_chunks
    out = out_ptr + query * n_chunks

    # Scales feed no product, so the pipeline leaves them where they are: read one tile ahead by hand.
    next_scale = tl.load(scales + begin * M + m, mask=begin * M + m < n_chunks, other=0.0)
    for tile in range(begin, end):
        chunk = tile * M + m
        scale = next_scale
        next_scale = tl.load(scales + chunk + M, mask=chunk + M < last, other=0.0)
        k = tl.load(
            keys + chunk.to(tl.int64)[:, None] * E + e[None, :],
            mask=(chunk < n_chunks)[:, None] & (e < E)[None, :],
            other=0.0,
        )
        if FP8_QUERY:
            products = tl.dot(k, q, out_dtype=tl.float32)
        else:
            products = tl.dot(k.to(tl.float16), q, out_dtype=tl.float32)
        total = tl.sum(tl.maximum(products, 0.0) * weight[None, :], 1)
        tl.store(out + chunk, bias + scale * total, mask=chunk < n_chunks)


@launches_beside(0)
def indexer_score(
    q_LXIE: torch.Tensor,
    weight_LXI: torch.Tensor,
    bias_L: torch.Tensor,
    keys_LnE: torch.Tensor,
    scale_Ln: torch.Tensor,
    *,
    query_precision: QueryPrecision = "fp8",
    out_LXn: torch.Tensor | None = None,
    tuning: Tuning = DEFAULT,
) -> torch.Tensor:
    """Score every chunk of every indexed layer: bias + scale_n * sum_i w_i relu(q_i . k_n).

    Args:
        q_LXIE: queries, any float type; each head is scaled and rounded to ``query_precision``.
        weight_LXI: head weights, scales of the model folded in.
        bias_L: one a layer.
        keys_LnE: fp8 e4m3, contiguous.
        scale_Ln: fp32, positive.
        query_precision: ``fp8`` (e4m3, the fastest) or ``fp16`` (keys are widened, exactly: nearer to the reference).
        out_LXn: fp32, written in place; made when None.

    Returns:
        Logits [L, X, n] in fp32. A chunk's score is their maximum over layers and queries, which ``select`` takes.

    Raises:
        ValueError: shapes, dtypes or layouts that do not fit.
    """
    L, X, n_heads, E = q_LXIE.shape
    n = keys_LnE.shape[1]
    shapes = ((weight_LXI, (L, X, n_heads)), (bias_L, (L,)), (keys_LnE, (L, n, E)), (scale_Ln, (L, n)))
    if any(tuple(tensor.shape) != shape for tensor, shape in shapes):
        raise ValueError(f"queries {tuple(q_LXIE.shape)} do not fit {[tuple(tensor.shape) for tensor, _ in shapes]}")
    if keys_LnE.dtype != torch.float8_e4m3fn or scale_Ln.dtype != torch.float32:
        raise ValueError(f"keys must be float8_e4m3fn with float32 scales, got {keys_LnE.dtype} and {scale_Ln.dtype}")
    if E % 16 or E > 256 or n_heads > 256:
        raise ValueError(f"key size must be a multiple of 16 up to 256 and heads at most 256, got {E} and {n_heads}")
    if not (keys_LnE.is_contiguous() and scale_Ln.is_contiguous()):
        raise ValueError("keys and scales must be contiguous")
    if out_LXn is None:
        out_LXn = torch.empty((L, X, n), dtype=torch.float32, device=keys_LnE.device)
    if not n:
        return out_LXn
    n_tiles = -(-n // tuning.tile_chunks)
    programs = max(1, min(n_tiles, tuning.programs_per_sm * n_sms(keys_LnE.device) // (L * X)))
    dependent = tuning.dependent and launches_dependents(keys_LnE.device)
    _score_kernel[(programs, L * X)](
        q_LXIE.contiguous(),
        weight_LXI.contiguous(),
        bias_L,
        keys_LnE,
        scale_Ln,
        out_LXn,
        n,
        X,
        HEADS=n_heads,
        HEADS_PAD=max(16, triton.next_power_of_2(n_heads)),
        E=E,
        E_PAD=max(32, triton.next_power_of_2(E)),
        M=tuning.tile_chunks,
        FP8_QUERY=query_precision == "fp8",
        PREFETCH=tuning.prefetch_tiles if keys_LnE.device.type == "cuda" else 0,
        DEPENDENT=dependent,
        **({"launch_pdl": True} if dependent else {}),
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
    )
    return out_LXn
