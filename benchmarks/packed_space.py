"""The launch constants of packed decode that are counted and timed, and how many programs of each find room."""

import dataclasses

from kvscope.methods.kernels.paged_decode.kernel import (
    PACKED_DEFAULTS,
    PackedTuning,
    packed_piece_size,
    packed_tile_size,
)
from kvscope.methods.kv_format import FORMATS, PagePacking

PAGE_TOKENS, HEAD_DIM = 64, 128
#: Registers a thread that let one warp more share a quarter of a multiprocessor: 2 (None), 3, 4 and 5 of them.
_REGISTERS = (168, None, 128, 96)
#: Tokens of a tile, warps, stages, registers and words of a piece. The first ones are timed first.
COMPILED = (
    *((64, 1, 2, registers, piece) for piece in (32, 16, 64) for registers in _REGISTERS),
    *((32, 1, stages, registers, 32) for stages in (2, 3, 4) for registers in _REGISTERS),
    *((64, 1, 3, registers, 32) for registers in _REGISTERS),
    *((32, 1, stages, registers, 16) for stages in (2, 3) for registers in (168, 128)),
    *((64, 2, stages, registers, 32) for stages in (2, 3) for registers in (None, 168, 128)),
)
#: Of a multiprocessor of Hopper.
_QUARTERS, _QUARTER_REGISTERS, _SHARED_BYTES, _MOST_PROGRAMS = 4, 16384, 228 * 1024, 32
_OWN_SHARED_BYTES = 1024  # what the system takes of each program's


def tunings(kv: str) -> list[PackedTuning]:
    """Return what is compiled of a format, its default first; tiles and pieces of one size once."""
    packing = PagePacking(FORMATS[kv], PAGE_TOKENS, HEAD_DIM)
    given = [
        PackedTuning(tile_tokens=tile, num_warps=warps, num_stages=stages, max_registers=registers, piece_words=piece)
        for tile, warps, stages, registers, piece in COMPILED
    ]
    first = dataclasses.replace(PACKED_DEFAULTS[kv], programs_per_sm=given[0].programs_per_sm)
    sized = [
        dataclasses.replace(
            each, tile_tokens=packed_tile_size(packing, each), piece_words=packed_piece_size(packing, each)
        )
        for each in (first, *given)
    ]
    return list(dict.fromkeys(sized))


def programs_that_fit(*, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Return how many programs a multiprocessor holds at once.

    Args:
        registers: of a thread.
        shared_bytes: of a program.
        num_warps: of a program; warps stay in their quarter of the multiprocessor, with a quarter of the registers.
    """
    warps = _QUARTERS * (_QUARTER_REGISTERS // (32 * -(-registers // 8) * 8))
    return min(warps // num_warps, _SHARED_BYTES // (shared_bytes + _OWN_SHARED_BYTES), _MOST_PROGRAMS)


def worth_timing(fits: dict[PackedTuning, int]) -> list[PackedTuning]:
    """Return the variants in which fewer registers let more programs run than the same with more registers."""

    def kind(each: PackedTuning) -> tuple[int, ...]:
        return each.tile_tokens, each.num_warps, each.num_stages, each.piece_words

    def registers(each: PackedTuning) -> int:
        return each.max_registers or 255

    return [
        each
        for each, fit in fits.items()
        if fit
        and all(
            fit > more
            for other, more in fits.items()
            if kind(other) == kind(each) and registers(other) > registers(each)
        )
    ]


def with_programs(tuning: PackedTuning, fit: int) -> list[PackedTuning]:
    """Return a variant with as many programs as fit, and with a few less: what is launched early takes room, too."""
    counts = (fit, fit - 1, fit - 2, fit - 3, fit - 4)
    return [dataclasses.replace(tuning, programs_per_sm=each) for each in counts if each > 0 and 2 * each >= fit]
