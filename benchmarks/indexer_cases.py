"""The indexer's score as ``kernels.py`` measures it: at the size of use, at larger ones, and its launch constants.

What a larger prompt adds a chunk says what the loop reaches; the rest of the time is the launch, the queries that every
program rounds first, and the end. Shapes as in the kernel's module.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from kernel_cases import DEVICE, Call, Row, median_s, row
from triton.runtime.errors import OutOfResources

from kvscope.methods.kernels.indexer_score.kernel import DEFAULT, QueryPrecision, Tuning, indexer_score

LAYERS, HEADS, KEY_DIM, CHUNK_TOKENS = 3, 128, 128, 4
TOKENS = 2**20
#: Tile, warps and stages; each is one kernel. Compiled for Hopper a thread has 164 registers at 64 x 4 warps, 120 at
#: 128 x 8, 206 at 128 x 4, 198 at 256 x 8.
SHAPES = ((128, 8, 3), (128, 8, 4), (128, 8, 5), (64, 4, 4), (64, 4, 6), (64, 8, 4), (128, 4, 4), (256, 8, 3))
#: Programs a multiprocessor; those that find no room run behind the others.
PROGRAMS = (1, 2, 3, 4)
EARLY_TILES = 4
_N_SETS = 4
#: Largest difference to the default's logits over the largest: sums in another order, and no more.
_DIFFERENCE = 1e-3


def inputs(n_tokens: int) -> tuple[torch.Tensor, ...]:
    """Return queries, weights, biases, keys and scales for a prompt."""
    n = n_tokens // CHUNK_TOKENS
    return (
        torch.randn(LAYERS, 1, HEADS, KEY_DIM, device=DEVICE),
        torch.randn(LAYERS, 1, HEADS, device=DEVICE),
        torch.zeros(LAYERS, device=DEVICE),
        torch.randn(LAYERS, n, KEY_DIM, device=DEVICE).to(torch.float8_e4m3fn),
        torch.rand(LAYERS, n, device=DEVICE) + 0.5,
    )


def calls(sets: list[tuple[torch.Tensor, ...]], tuning: Tuning, precision: QueryPrecision = "fp8") -> list[Call]:
    """Return a call a set of inputs."""
    outs = [torch.empty((LAYERS, 1, given[3].shape[1]), device=DEVICE) for given in sets]
    return [
        lambda given=given, out=out: indexer_score(*given, query_precision=precision, out_LXn=out, tuning=tuning)
        for given, out in zip(sets, outs, strict=True)
    ]


def n_bytes(n_tokens: int) -> int:
    """Keys and scales: the floor; logits written are not counted."""
    return LAYERS * n_tokens // CHUNK_TOKENS * (KEY_DIM + 4)


def indexer_rows() -> Iterator[Row]:
    """Indexer scoring with queries in fp8 and in fp16; in fp8 also of longer prompts."""
    for n_tokens in (TOKENS, 2 * TOKENS, 4 * TOKENS):
        sets = [inputs(n_tokens) for _ in range(_N_SETS)]
        for precision in ("fp8", "fp16") if n_tokens == TOKENS else ("fp8",):
            time_s = median_s(calls(sets, DEFAULT, precision))
            case = f"{n_tokens // 2**20}M tokens, {LAYERS} layers, {HEADS} heads, {precision} queries"
            target = 0.7 if precision == "fp8" and n_tokens == TOKENS else None
            yield row("indexer_score", case, time_s, n_bytes(n_tokens), target_share=target)


def tunings() -> Iterator[Tuning]:
    """Yield every shape as it is, and with early keys and a dependent launch; the default also with one of the two."""
    for tile, num_warps, num_stages in SHAPES:
        for per_sm in PROGRAMS:
            shape = Tuning(tile_chunks=tile, num_warps=num_warps, num_stages=num_stages, programs_per_sm=per_sm)
            yield shape
            if (tile, num_warps, num_stages) == (DEFAULT.tile_chunks, DEFAULT.num_warps, DEFAULT.num_stages):
                yield dataclasses.replace(shape, prefetch_tiles=EARLY_TILES)
                yield dataclasses.replace(shape, dependent=True)
            yield dataclasses.replace(shape, prefetch_tiles=EARLY_TILES, dependent=True)


def describe(tuning: Tuning) -> str:
    """Return constants in words."""
    early = f", {tuning.prefetch_tiles} tiles early" if tuning.prefetch_tiles else ""
    dependent = ", dependent launch" if tuning.dependent else ""
    return (
        f"tile {tuning.tile_chunks}, {tuning.num_warps} warps, {tuning.num_stages} stages, "
        f"{tuning.programs_per_sm} programs an SM{early}{dependent}"
    )


def sweep_rows() -> Iterator[Row]:
    """Launch constants, the best last. Each first gives what the default gives, which is held against the reference in
    ``kernel_checks``. What does not fit is left out."""
    sets = [inputs(TOKENS) for _ in range(_N_SETS)]
    expected = calls(sets, DEFAULT)[0]().clone()
    largest = float(expected.abs().max())
    found: list[Row] = []
    for tuning in tunings():
        made = calls(sets, tuning)
        with contextlib.suppress(OutOfResources):
            difference = float((made[0]() - expected).abs().max()) / largest
            if not difference <= _DIFFERENCE:
                raise ValueError(f"{describe(tuning)}: logits differ by {difference:.1e} of the largest")
            time_s = median_s(made, warmup_ms=5, rep_ms=20)
            found.append(row("indexer_score sweep", describe(tuning), time_s, n_bytes(TOKENS), difference=difference))
    yield from sorted(found, key=lambda r: -float(r["time_s"]))
