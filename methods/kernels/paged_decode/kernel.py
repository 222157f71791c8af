"""Decode attention over pages in Triton: work cut evenly over a fixed grid, partial results merged by log-sum-exp.

Shapes: B sequences, Q query heads, H KV heads, G = Q / H, D head size, S slots (pages), P tokens a page, N tokens a
tile.
README.md has the mathematics, the layout and the limits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvscope.methods.kernels.grid import converts_fp8, launches_beside, launches_dependents, n_sms
from kvscope.methods.kernels.paged_decode.inputs import PagedKV, check_inputs, index_strides
from kvscope.methods.kernels.paged_decode.merge import merge_kernel
from kvscope.methods.kernels.paged_decode.packed import packed_split_kernel
from kvscope.methods.kernels.paged_decode.split import split_kernel
from kvscope.methods.kv_format import PagePacking

_LOG2E = 1.4426950408889634
MIN_TILES = 4  # below this many tiles a program costs more than it hides
MOST_MERGE_ROWS, MERGE_PART_ROWS = 256, 64


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Constants of the kernel; every choice gives the same result up to rounding.

    Attributes:
        tile_bytes: of K (and of V) read in one iteration; decides the tokens of a tile.
        programs_per_sm: size of the grid.
        num_warps, num_stages: as Triton means them.
    """

    tile_bytes: int = 16 * 1024
    programs_per_sm: int = 2
    num_warps: int = 4
    num_stages: int = 4


DEFAULT = Tuning()


@dataclass(frozen=True, kw_only=True)
class PackedTuning:
    """The same of packed pages.

    Attributes:
        tile_tokens: most tokens read in one iteration; a tile's tokens share their channels' scales.
        programs_per_sm, num_warps, num_stages: as ``Tuning``'s.
        max_registers: most registers a thread may take, so that more programs find room; None: as many as it likes.
        piece_words: words of two bytes of a token that are unpacked at once, a power of two; 16 or more. The fewer, the
            fewer registers. Of heads that are no multiple, a token's words are one piece.
    """

    tile_tokens: int = 64
    programs_per_sm: int = 8
    num_warps: int = 1
    num_stages: int = 2
    max_registers: int | None = None
    piece_words: int = 32


#: By format: the fastest on an H200 at 1 x 128K (benchmarks/results/packed_variants_h200.json). All the registers there
#: are beat the warps that a limit of 168 would let in.
PACKED_DEFAULTS = {
    "fp8": PackedTuning(piece_words=64),
    "int8": PackedTuning(piece_words=64),
    "int4": PackedTuning(piece_words=32),
    "kivi2": PackedTuning(tile_tokens=32, num_stages=3, piece_words=16),
}


@launches_beside(0)
def paged_decode(
    q_BQ1D: torch.Tensor,
    stores: Sequence[PagedKV],
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    tuning: Tuning = DEFAULT,
    packed_tuning: PackedTuning | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend one query a sequence to the tokens of one store of pages or two.

    The grid depends on shapes alone. Tables, token lists, counts given as tensors and pages are read when the kernels
    run, so a CUDA graph that captured the call can be replayed after they were changed in place.

    Args:
        q_BQ1D: queries, rotation applied; last dimension contiguous.
        stores: disjoint sets of tokens; the softmax runs over their union.
        scale: factor on the logits, above zero.
        softcap: logits become softcap * tanh(logits / softcap).
        sink_logits: [Q], one logit a head that takes mass and has no value.
        out_dtype: of the output; the queries' when None.
        tuning, packed_tuning: constants of raw and of packed pages; the latter None: those of the format.

    Returns:
        Output [B, Q, 1, D] and natural log-sum-exp of the logits [B, Q] in fp32, sink logit included. Where nothing
        was read: 0 and -inf (or the sink logit).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_inputs(q_BQ1D, stores)
    if q_BQ1D.stride(3) != 1:
        q_BQ1D = q_BQ1D.contiguous()
    B, Q, _, D = q_BQ1D.shape
    H = stores[0].pages.shape[1]
    G = Q // H
    if sink_logits is not None and (sink_logits.shape != (Q,) or sink_logits.device != q_BQ1D.device):
        raise ValueError(f"sink_logits must be [{Q}] on {q_BQ1D.device}, got {tuple(sink_logits.shape)}")
    D_PAD = max(16, triton.next_power_of_2(D))
    dependent = launches_dependents(q_BQ1D.device)
    common = {
        "G": G,
        "D": D,
        "D_PAD": D_PAD,
        "MIN_TILES": MIN_TILES,
        "DEPENDENT": dependent,
        **({"launch_pdl": True} if dependent else {}),
    }
    device = q_BQ1D.device
    parts = []
    for store in stores:
        packing = store.packing
        if packing is None:
            tile_tokens, n_programs = tile_size(store, tuning), tuning.programs_per_sm * n_sms(device)
        else:
            packed = packed_tuning or PACKED_DEFAULTS[packing.format.name]
            tile_tokens, n_programs = packed_tile_size(packing, packed), packed.programs_per_sm * n_sms(device)
        # No more programs than the capacity could ever keep busy: short contexts launch small grids.
        most_tiles = B * H * -(-store.capacity_tokens // tile_tokens)
        programs = max(1, min(n_programs, -(-most_tiles // MIN_TILES)))
        n_partials = (B * H + programs) * G
        out = torch.empty((n_partials, D), dtype=torch.float32, device=device)
        lse = torch.empty((n_partials,), dtype=torch.float32, device=device)
        lengths = _lengths_of(store, q_BQ1D)
        table = q_BQ1D if store.page_table is None else store.page_table
        table_strides = (0, 0) if store.page_table is None else index_strides(store.page_table)
        if packing is not None:
            packed_split_kernel[(programs,)](
                q_BQ1D,
                store.pages.view(torch.int16),
                store.pages.view(torch.float16),
                store.pages.view(torch.int32),
                table,
                lengths.pointer,
                out,
                lse,
                lengths.n_tokens,
                store.capacity_tokens,
                scale if softcap is not None else scale * _LOG2E,
                1.0 if softcap is None else softcap,
                lengths.n_counts,
                lengths.rows_each,
                H,
                q_BQ1D.stride(0),
                q_BQ1D.stride(1),
                *table_strides,
                *lengths.strides,
                G=G,
                G_PAD=max(8, triton.next_power_of_2(G)),
                D=D,
                C_PAD=packed_piece_size(packing, packed),
                P=packing.page_tokens,
                N=tile_tokens,
                GROUP=packing.key_group_tokens,
                BITS=packing.format.bits,
                IS_FLOAT=packing.format.is_float,
                RECORD=packing.record_bytes,
                COUNTS=lengths.padded,
                MIN_TILES=MIN_TILES,
                HAS_TABLE=store.page_table is not None,
                HAS_SOFTCAP=softcap is not None,
                DEVICE_LENGTHS=lengths.on_device,
                OPERAND=tl.float32 if q_BQ1D.dtype == torch.float32 else tl.float16,
                ASSEMBLY=device.type == "cuda" and q_BQ1D.dtype != torch.float32,
                CONVERTS=converts_fp8(device),
                PRECISION="ieee",
                LANES=32 * packed.num_warps,
                num_warps=packed.num_warps,
                num_stages=packed.num_stages,
                maxnreg=packed.max_registers,
                DEPENDENT=dependent,
                **({"launch_pdl": True} if dependent else {}),
            )
            parts.append((store, lengths, out, lse, programs, tile_tokens))
            continue
        tokens = q_BQ1D if store.tokens is None else store.tokens
        split_kernel[(programs,)](
            q_BQ1D,
            store.pages,
            table,
            tokens,
            lengths.pointer,
            out,
            lse,
            lengths.n_tokens,
            store.capacity_tokens,
            scale if softcap is not None else scale * _LOG2E,
            1.0 if softcap is None else softcap,
            lengths.n_counts,
            lengths.rows_each,
            H,
            q_BQ1D.stride(0),
            q_BQ1D.stride(1),
            *table_strides,
            *((0, 0) if store.tokens is None else index_strides(store.tokens)),
            *lengths.strides,
            G_PAD=max(16, triton.next_power_of_2(G)),
            P=store.pages.shape[3],
            N=tile_tokens,
            COUNTS=lengths.padded,
            HAS_TABLE=store.page_table is not None,
            HAS_TOKENS=store.tokens is not None,
            HAS_SOFTCAP=softcap is not None,
            DEVICE_LENGTHS=lengths.on_device,
            PRECISION="ieee",
            num_warps=tuning.num_warps,
            num_stages=tuning.num_stages,
            **common,
        )
        parts.append((store, lengths, out, lse, programs, tile_tokens))
    result = torch.empty((B, Q, 1, D), dtype=out_dtype or q_BQ1D.dtype, device=device)
    result_lse = torch.empty((B, Q), dtype=torch.float32, device=device)
    merged = [
        (
            out,
            lse,
            lengths.pointer,
            lengths.n_tokens,
            store.capacity_tokens,
            lengths.n_counts,
            lengths.rows_each,
            *lengths.strides,
            programs,
        )
        for store, lengths, out, lse, programs, _ in parts
    ]
    options = merge_options(max(programs for *_, programs, _ in parts), B * H, D_PAD)
    merge_kernel[(B * Q, options["PARTS"])](
        result,
        result_lse,
        result if sink_logits is None else sink_logits,
        *merged[0],
        *merged[-1],
        H,
        N_A=parts[0][5],
        N_B=parts[-1][5],
        COUNTS_A=parts[0][1].padded,
        COUNTS_B=parts[-1][1].padded,
        DEVICE_LENGTHS_A=parts[0][1].on_device,
        DEVICE_LENGTHS_B=parts[-1][1].on_device,
        TWO_STORES=len(parts) == 2,
        HAS_SINK=sink_logits is not None,
        **options,
        **common,
    )
    return result, result_lse


def merge_options(n_programs: int, n_rows: int, head_dim_padded: int) -> dict[str, int]:
    """Return how partial results of programs are joined, for as many rows of the work (sequences and KV heads).

    As many at once as an even split leaves of a row: more would be masked out, fewer take a second round. Where that is
    more than ``MERGE_PART_ROWS``, programs share a query head's channels.
    """
    merge_rows = min(MOST_MERGE_ROWS, triton.next_power_of_2(-(-n_programs // n_rows) + 2))
    parts = max(1, min(merge_rows // MERGE_PART_ROWS, head_dim_padded // 16))
    return {"MERGE_ROWS": merge_rows, "PARTS": parts, "num_warps": 4 if merge_rows > 8 else 1}


def tile_size(store: PagedKV, tuning: Tuning = DEFAULT) -> int:
    """Return the tokens of a tile: a power of two, 16 or more, of about ``tile_bytes`` of K."""
    D, itemsize = store.pages.shape[4], store.pages.element_size()
    most: int = max(16, tuning.tile_bytes // (triton.next_power_of_2(D) * itemsize))
    return min(128, 1 << (most.bit_length() - 1))


def packed_tile_size(packing: PagePacking, tuning: PackedTuning | None = None) -> int:
    """Return the tokens of a tile: the greatest power of two that divides the tokens of a scale, within ``tuning``."""
    tokens, tuning = packing.key_group_tokens, tuning or PACKED_DEFAULTS[packing.format.name]
    return min(tuning.tile_tokens, tokens & -tokens)


def packed_piece_size(packing: PagePacking, tuning: PackedTuning | None = None) -> int:
    """Return the words of a piece: those of ``tuning`` where they divide a token's, else all, padded."""
    words, tuning = packing.token_bytes // 2, tuning or PACKED_DEFAULTS[packing.format.name]
    whole: int = max(16, triton.next_power_of_2(words))
    return whole if words % tuning.piece_words else tuning.piece_words


@dataclass(frozen=True)
class _Lengths:
    """Counts of tokens as the kernels take them: ``n_counts`` of them, each for ``rows_each`` rows in turn."""

    pointer: torch.Tensor
    n_tokens: int
    strides: tuple[int, int]
    on_device: bool
    n_counts: int
    rows_each: int

    @property
    def padded(self) -> int:
        """A power of two: what is past ``n_counts`` has no tokens."""
        size: int = max(2, triton.next_power_of_2(self.n_counts))
        return size


def _lengths_of(store: PagedKV, q_BQ1D: torch.Tensor) -> _Lengths:
    B, H = q_BQ1D.shape[0], store.pages.shape[1]
    if isinstance(store.n_tokens, int):
        return _Lengths(q_BQ1D, store.n_tokens, (0, 0), on_device=False, n_counts=1, rows_each=B * H)
    strides = index_strides(store.n_tokens)
    rows_each = 1 if strides[1] else H if strides[0] else B * H
    return _Lengths(store.n_tokens, 0, strides, on_device=True, n_counts=B * H // rows_each, rows_each=rows_each)
