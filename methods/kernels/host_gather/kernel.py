# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""A gather kernel that reads pinned host memory itself: scattered units over the bus with no copy engine.

A unit is ``PIECES`` pieces of ``PIECE_WORDS`` 4-byte words each; in the mirror they lie ``PARTS`` pieces apart.
"""

import torch
import triton
import triton.language as tl

_BLOCK_WORDS = 4096


@triton.jit
def _gather_kernel(
    mirror_ptr,
    slots_ptr,
    chunks_ptr,
    chunk_slots_ptr,
    n_ptr,
    n_most,
    UNITS_PER_CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy blocks of pieces, dealt to programs in turn."""
    BLOCKS: tl.constexpr = (PIECE_WORDS + BLOCK - 1) // BLOCK
    PER_CHUNK: tl.constexpr = UNITS_PER_CHUNK * PIECES * BLOCKS
    word = tl.arange(0, BLOCK)
    n_items = tl.minimum(tl.load(n_ptr), n_most) * PER_CHUNK
    for item in range(tl.program_id(0), n_items, tl.num_programs(0)):
        entry = item // PER_CHUNK
        rest = item % PER_CHUNK
        unit = rest // (PIECES * BLOCKS)
        piece = rest // BLOCKS % PIECES
        at = rest % BLOCKS * BLOCK + word
        source = tl.load(chunks_ptr + entry).to(tl.int64) * UNITS_PER_CHUNK + unit
        target = tl.load(chunk_slots_ptr + entry).to(tl.int64) * UNITS_PER_CHUNK + unit
        start = (source // PARTS * PIECES + piece) * (PARTS * PIECE_WORDS) + source % PARTS * PIECE_WORDS
        words = tl.load(mirror_ptr + start + at, mask=at < PIECE_WORDS)
        tl.store(slots_ptr + (target * PIECES + piece) * PIECE_WORDS + at, words, mask=at < PIECE_WORDS)


def gather(
    mirror: torch.Tensor,
    slots: torch.Tensor,
    chunks: torch.Tensor,
    chunk_slots: torch.Tensor,
    n: torch.Tensor,
    *,
    units_per_chunk: int,
    n_programs: int,
) -> None:
    """Launch the kernel. ``chunks``, ``chunk_slots`` and ``n`` [1] are int32 on the device of the slots.

    Raises:
        ValueError: pieces that are not whole 16-byte words.
    """
    H, P = mirror.shape[1], mirror.shape[3]
    U, D = slots.shape[3:]
    whole = U == P
    piece_bytes = (2 * H if whole else 1) * U * D * slots.element_size()
    if piece_bytes % 16:
        raise ValueError(f"pieces of {piece_bytes} bytes cannot be read in words of 16 bytes")
    piece_words = piece_bytes // 4
    _gather_kernel[(n_programs,)](
        mirror.view(torch.int32),
        slots.view(torch.int32),
        chunks,
        chunk_slots,
        n,
        chunks.shape[0],
        UNITS_PER_CHUNK=units_per_chunk,
        PARTS=P // U,
        PIECES=1 if whole else 2 * H,
        PIECE_WORDS=piece_words,
        BLOCK=min(_BLOCK_WORDS, triton.next_power_of_2(piece_words)),
        num_warps=8,
    )
