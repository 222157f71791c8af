"""Every kernel against its reference in fp64 on the GPU, before anything is timed. Shapes as in the modules."""

import itertools
from collections.abc import Callable

import torch

from kvscope.methods.kernels.block_scores import kernel as blocks
from kvscope.methods.kernels.block_scores import reference as blocks_reference
from kvscope.methods.kernels.host_gather.gather import HostGather
from kvscope.methods.kernels.host_gather.reference import host_gather_reference
from kvscope.methods.kernels.indexer_score.kernel import indexer_score
from kvscope.methods.kernels.indexer_score.reference import indexer_score_reference
from kvscope.methods.kernels.paged_decode.inputs import PagedKV
from kvscope.methods.kernels.paged_decode.kernel import paged_decode
from kvscope.methods.kernels.paged_decode.reference import paged_decode_reference
from kvscope.methods.kernels.select import kernel as selection
from kvscope.methods.kernels.select.reference import diff_reference, select_reference
from kvscope.methods.kv_format import FORMATS, PagePacking
from kvscope.methods.packing import pack_pages

DEVICE = torch.device("cuda")


def _randn(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*size, device=DEVICE).to(dtype)


def _near(found: torch.Tensor, exact: torch.Tensor, bound: float) -> float:
    """Return the largest error over the largest value.

    Raises:
        ValueError: it is over ``bound``.
    """
    error = float((found.double() - exact).abs().max() / exact.abs().max())
    if not error <= bound:
        raise ValueError(f"relative error {error:.2e} is over {bound:.0e}")
    return error


def check_paged_decode() -> float:
    """Pages of 16 and 64, ragged batches, two stores, token lists, in bf16."""
    worst = 0.0
    for P in (16, 64):
        n_pages = 8192 // P
        pages = _randn(n_pages, 8, 2, P, 128)
        table = torch.stack([torch.randperm(n_pages, device=DEVICE) for _ in range(3)])[:, None].int()
        q = _randn(3, 32, 1, 128)
        n = torch.tensor([[8190], [1], [4097]], dtype=torch.int32, device=DEVICE)
        tokens = torch.randperm(8192, device=DEVICE)[:2048].sort().values.int().view(1, 1, -1)
        first = PagedKV(pages=pages, n_tokens=n, page_table=table)
        second = PagedKV(pages=_randn(64, 8, 2, 4, 128), n_tokens=n.clamp(max=200))
        listed = PagedKV(pages=pages, n_tokens=2000, page_table=table, tokens=tokens)
        for stores in ([first], [first, second], [listed]):
            out, lse = paged_decode(q, stores, scale=128**-0.5)
            exact, exact_lse = paged_decode_reference(q, stores, scale=128**-0.5)
            _near(lse, exact_lse, 1e-4)
            # Each sequence for itself: a short one has larger values than the mean of thousands.
            worst = max([worst, *(_near(out[b], exact[b], 1e-2) for b in range(3))])
    return worst


def check_packed_decode() -> float:
    """Packed pages of every format, with a residual beside them; each against the reference, which unpacks in fp64."""
    worst = 0.0
    for form, P, dtype in itertools.product(FORMATS.values(), (16, 64, 128), (torch.bfloat16, torch.float16)):
        packing = PagePacking(form, P, 128)
        n_pages = 8192 // P
        # Channels of unlike means, which bases are for; and tokens of small values, which scales are for.
        raw = _randn(n_pages, 8, 2, P, 128, dtype=torch.float32) * torch.rand(n_pages, 1, 1, P, 1, device=DEVICE)
        raw += 4 * _randn(128, dtype=torch.float32)
        table = torch.randperm(n_pages, device=DEVICE)[None, None].int()
        n = torch.tensor([[8192 - 2 * P]], dtype=torch.int32, device=DEVICE)
        packed = PagedKV(pages=pack_pages(raw, packing), n_tokens=n, page_table=table, packing=packing)
        residual = PagedKV(pages=_randn(3, 8, 2, P, 128, dtype=dtype), n_tokens=2 * P + 5)
        q = _randn(1, 32, 1, 128, dtype=dtype)
        for stores in ([packed], [packed, residual]):
            for softcap in (None, 30.0):
                out, lse = paged_decode(q, stores, scale=128**-0.5, softcap=softcap)
                exact, exact_lse = paged_decode_reference(q, stores, scale=128**-0.5, softcap=softcap)
                _near(lse, exact_lse, 2e-3)
                worst = max(worst, _near(out, exact, 1e-2))
    return worst


def check_uneven_decode() -> float:
    """Sequences of a token to some pages, each with pages of its own, in one launch."""
    from uneven_cases import largest_error, queries, row_table, sequence

    stores = [sequence(n) for n in (1, 64, 65, 200, 4097, 8190)]
    q = queries(len(stores))
    return largest_error(row_table(stores).attend(q, scale=128**-0.5), q, stores)


def check_indexer_score() -> float:
    """Queries in fp16, and in fp8 within what rounding them to three bits of mantissa costs."""
    keys = _randn(3, 5000, 128, dtype=torch.float8_e4m3fn)
    given = (
        _randn(3, 1, 128, 128, dtype=torch.float32),
        torch.rand(3, 1, 128, device=DEVICE) / 128,
        _randn(3, dtype=torch.float32),
        keys,
        torch.rand(3, 5000, device=DEVICE) + 0.5,
    )
    exact = indexer_score_reference(*given)
    _near(indexer_score(*given, query_precision="fp8"), exact, 2e-2)
    return _near(indexer_score(*given, query_precision="fp16"), exact, 1e-3)


def check_select() -> float:
    """Lists and slot table over three choices, exactly."""
    n, S = 250_000, 60_000
    found, slots = selection.empty_selection(n, S, DEVICE), selection.empty_slots(n, S, DEVICE)
    delta = selection.empty_delta(S, S, DEVICE)
    for _ in range(3):
        logits, threshold = _randn(3, n, dtype=torch.float32), torch.tensor([1.9], device=DEVICE)
        selection.select(logits, threshold, found, n_sink=1, n_recent=8)
        selection.diff(found, slots, delta)
        expected = select_reference(logits, 1.9, n_sink=1, n_recent=8)
        missing, free = diff_reference(expected, slots.chunk_of_slot_S)
        for listed, count, wanted in (
            (found.chunks_K, found.n, expected),
            (delta.missing_K, delta.n_missing, missing),
            (delta.free_S, delta.n_free, free),
        ):
            if not torch.equal(listed[: int(count)].long(), wanted.long()):
                raise ValueError("a list differs from the reference's")
        selection.apply(found, slots, delta)
        held = slots.chunk_of_slot_S[slots.slot_of_chunk_n[expected].long()]
        if not torch.equal(held.long(), expected):
            raise ValueError("the slot table does not hold the chosen chunks")
    return 0.0


def check_host_gather() -> float:
    """Whole pages and parts of pages by each backend, bit for bit, poisoned slots untouched."""
    mirror = torch.randn(64, 2, 2, 64, 128).to(torch.bfloat16).pin_memory()
    chunks, targets = torch.randperm(60)[:20].int(), torch.randperm(30)[:20].int()
    for U, per_chunk in ((64, 1), (16, 2)):
        for backend in ("uva", "copies", "contiguous"):
            slots = torch.full((64, 2, 2, U, 128), torch.nan, dtype=torch.bfloat16, device=DEVICE)
            expected = slots.clone()
            host_gather_reference(mirror, expected, chunks, targets, units_per_chunk=per_chunk)
            where = DEVICE if backend == "uva" else torch.device("cpu")
            n = torch.tensor([20], dtype=torch.int32, device=where)
            move = HostGather(mirror, slots, backend=backend, units_per_chunk=per_chunk)
            move(chunks.to(where), targets.to(where), n)
            torch.cuda.synchronize()
            if not torch.equal(slots.view(torch.int16), expected.view(torch.int16)):
                raise ValueError(f"{backend} with slots of {U} tokens differs from the reference")
    return 0.0


def check_block_scores() -> float:
    """The three scores in bf16."""
    q, bounds, means = _randn(8, 4, 128), _randn(1000, 8, 2, 128).sort(2).values, _randn(300, 8, 1, 128)
    worst = _near(blocks.quest_scores(q, bounds), blocks_reference.quest_reference(q, bounds), 1e-5)
    worst = max(worst, _near(blocks.moba_scores(q, means), blocks_reference.moba_reference(q, means), 1e-5))
    pages = _randn(100, 8, 2, 64, 128)
    for block in (16, 128, 512):
        n = {"n_blocks": 6400 // block, "block_tokens": block}
        exact = blocks_reference.msa_reference(q, pages, **n)
        worst = max(worst, _near(blocks.msa_scores(q, pages, **n), exact, 1e-5))
    return worst


CHECKS: dict[str, Callable[[], float]] = {
    "paged_decode": check_paged_decode,
    "packed_decode": check_packed_decode,
    "uneven_decode": check_uneven_decode,
    "indexer_score": check_indexer_score,
    "select": check_select,
    "host_gather": check_host_gather,
    "block_scores": check_block_scores,
}
