# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc"
"""A gather kernel that reads pinned host memory itself: scattered units over the bus with no copy engine.

A unit is ``PIECES`` pieces of ``PIECE_WORDS`` 4-byte words each; in the mirror they lie ``PARTS`` pieces apart.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kvscope.methods.kernels.grid import launches_beside

_BLOCK_WORDS = 4096


@triton.jit(do_not_specialize=["n_most", "n_layers"])
def _gather_kernel(
    mirror_ptr,
    slots_ptr,
    chunks_ptr,
    chunk_slots_ptr,
    n_ptr,
    n_most,
    layers_ptr,
    n_layers,
    UNITS_PER_CHUNK: tl.constexpr,
    PARTS: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy blocks of pieces, dealt to programs in turn, layer after layer.

    ``layers_ptr``: of each layer, how many words its mirror and its slots are behind the first layer's.
    """
    BLOCKS: tl.constexpr = (PIECE_WORDS + BLOCK - 1) // BLOCK
    PER_CHUNK: tl.constexpr = UNITS_PER_CHUNK * PIECES * BLOCKS
    word = tl.arange(0, BLOCK)
    n_items = tl.minimum(tl.load(n_ptr), n_most) * PER_CHUNK
    for work in range(tl.program_id(0), n_items * n_layers, tl.num_programs(0)):
        layer, item = work // n_items, work % n_items
        mirror = mirror_ptr + tl.multiple_of(tl.load(layers_ptr + 2 * layer), 4)
        slots = slots_ptr + tl.multiple_of(tl.load(layers_ptr + 2 * layer + 1), 4)
        entry = item // PER_CHUNK
        rest = item % PER_CHUNK
        unit = rest // (PIECES * BLOCKS)
        piece = rest // BLOCKS % PIECES
        at = rest % BLOCKS * BLOCK + word
        source = tl.load(chunks_ptr + entry).to(tl.int64) * UNITS_PER_CHUNK + unit
        target = tl.load(chunk_slots_ptr + entry).to(tl.int64) * UNITS_PER_CHUNK + unit
        start = (source // PARTS * PIECES + piece) * (PARTS * PIECE_WORDS) + source % PARTS * PIECE_WORDS
        words = tl.load(mirror + start + at, mask=at < PIECE_WORDS)
        tl.store(slots + (target * PIECES + piece) * PIECE_WORDS + at, words, mask=at < PIECE_WORDS)


def layer_distances(mirrors: Sequence[torch.Tensor], slots: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return [L, 2] on the device of the slots: how many words each layer's mirror and slots are behind the first's."""
    words = [
        [(own.data_ptr() - first.data_ptr()) // 4 for own, first in ((mirror, mirrors[0]), (held, slots[0]))]
        for mirror, held in zip(mirrors, slots, strict=True)
    ]
    return torch.tensor(words, dtype=torch.int64, device=slots[0].device)


@launches_beside(1)
def gather(
    mirror: torch.Tensor,
    slots: torch.Tensor,
    chunks: torch.Tensor,
    chunk_slots: torch.Tensor,
    n: torch.Tensor,
    *,
    layers_L2: torch.Tensor,
    units_per_chunk: int,
    n_programs: int,
) -> None:
    """Launch the kernel. ``chunks``, ``chunk_slots`` and ``n`` [1] are int32 on the device of the slots.

    Args:
        mirror, slots: of the first layer; the others are alike.
        layers_L2: ``layer_distances`` of all layers.

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
        layers_L2,
        layers_L2.shape[0],
        UNITS_PER_CHUNK=units_per_chunk,
        PARTS=P // U,
        PIECES=1 if whole else 2 * H,
        PIECE_WORDS=piece_words,
        BLOCK=min(_BLOCK_WORDS, triton.next_power_of_2(piece_words)),
        num_warps=8,
    )
