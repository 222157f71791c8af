"""Whether the small DeepSeek-V4 can be trained on this machine, and what a step costs: two minutes before a long run.

Attention through the card's flash kernel is held against one masked softmax in fp32, output and gradients. Then every
batch shape of the phases is timed, forward and backward, and its peak of memory read. Exit 1 where a part fails.

    python benchmarks/v4_training_check.py --out check.json [--small] [--seconds 150]

``--profile`` says instead where the time of one shape's step goes, in a minute with its compilation:

    python benchmarks/v4_training_check.py --out profile.json --profile 64
"""

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import say
from transformers import PreTrainedTokenizerFast
from v4_step_profile import lines, step_profile

from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.reference_model.curriculum import Phase, Shape
from kvscope.harness.reference_model.data import PhaseData
from kvscope.harness.reference_model.pieces import Pieces
from kvscope.harness.reference_model.row_maker import RowMaker
from kvscope.harness.reference_model.train import document_makers, versions
from kvscope.harness.reference_model.trainer import Trainer
from kvscope.harness.reference_model.v4 import attention
from kvscope.harness.reference_model.v4.architecture import DeepseekV4, v4_config
from kvscope.harness.reference_model.v4.phases import V4_PHASES

# bf16 has 8 bits: what its rounding of inputs, weights and output explains, in relative norm.
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-4}
HEADS, HEAD_DIM, WINDOW = 8, 64, 32
# Tokens, tokens an entry, rows.
KERNELS = ((64, 4, 64), (64, 32, 64), (1000, 4, 2), (4096, 4, 1), (4096, 32, 1))
KERNELS_SMALL = ((64, 4, 2), (100, 32, 2))
SMALL = {"hidden_size": 32, "moe_intermediate_size": 32, "num_attention_heads": 2, "hc_sinkhorn_iters": 3}
Row = dict[str, Any]


def by_mask(
    q: torch.Tensor, kv: torch.Tensor, e: torch.Tensor, sinks: torch.Tensor, *, rate: int, scale: float
) -> torch.Tensor:
    """One softmax over a masked matrix of window, entries and sinks."""
    at = torch.arange(q.shape[1], device=q.device)
    near = (at[:, None] >= at) & (at[:, None] - at < WINDOW)
    far = torch.arange(e.shape[1], device=q.device) < (at[:, None] + 1) // rate
    keys = torch.cat((kv, e), 1)
    seen = torch.cat((near, far), 1)[:, None]
    scores = (torch.einsum("btqd,bkd->btqk", q, keys) * scale).masked_fill(~seen, float("-inf"))
    last = sinks[:, None].expand(*scores.shape[:3], 1)
    return torch.einsum("btqk,bkd->btqd", torch.cat((scores, last), -1).softmax(-1)[..., :-1], keys)


def kernel_row(*, tokens: int, rate: int, rows: int, device: torch.device) -> Row:
    """Compare the folded form with one softmax: relative norms of the differences of output and gradients."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(tokens)
    n = tokens // rate
    shapes = ((rows, tokens, HEADS, HEAD_DIM), (rows, tokens, HEAD_DIM), (rows, n, HEAD_DIM), (HEADS,))
    given = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
    push = torch.randn(shapes[0], device=device).to(dtype)
    scale = HEAD_DIM**-0.5
    leaves = [each.clone().requires_grad_() for each in given]
    q, kv, e, sinks = leaves
    out, lse = attention.window_attention(q, kv, sinks, window=WINDOW, scale=scale)
    found = attention.joined_with_entries(q, e, out, lse, rate=rate, scale=scale)
    ours = (found, *torch.autograd.grad(found, leaves, push))
    exact = [each.float().requires_grad_() for each in given]
    wanted = by_mask(*exact, rate=rate, scale=scale)
    theirs = (wanted, *torch.autograd.grad(wanted, exact, push.float()))
    names = ("out", "grad_q", "grad_kv", "grad_entries", "grad_sinks")
    errors = {
        name: round(((a.float() - b).norm() / b.norm()).item(), 6)
        for name, a, b in zip(names, ours, theirs, strict=True)
    }
    good = all(error < TOLERANCE[dtype] for error in errors.values())
    return {"part": "kernel", "tokens": tokens, "rate": rate, "rows": rows, "ok": good, "relative_norm": errors}


def shapes_of(phases: tuple[Phase, ...]) -> Iterator[tuple[Phase, Shape]]:
    """Yield every batch shape once for each objective, short ones first."""
    seen: set[tuple[str, int]] = set()
    every = [(phase, shape) for phase in phases for shape in phase.shapes]
    for phase, shape in sorted(every, key=lambda pair: (pair[0].objective != "answers", pair[1].tokens)):
        if (phase.objective, shape.tokens) not in seen:
            seen.add((phase.objective, shape.tokens))
            yield phase, shape


def step_row(trainer: Trainer, maker: RowMaker, phase: Phase, shape: Shape) -> Row:
    """Check a shape's forward against the stock classes, then time its step and read its peak of memory."""
    batch = PhaseData(maker, replace(phase, shapes=(shape,), steps=1), seed=-1)[0]
    trainer.begin(phase)
    cuda = trainer.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    difference = trainer.check_against_stock(batch)
    first_s = time.perf_counter() - started
    step_s = trainer.seconds_per_step(batch)
    tokens = batch.ids_BT.numel()
    return {
        "part": "step", "objective": phase.objective, "tokens": shape.tokens, "rows": shape.rows, "ok": True,
        "difference_to_stock": round(difference, 5), "first_forward_s": round(first_s, 2), "step_s": round(step_s, 4),
        "tokens_per_s": round(tokens / step_s),
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }  # fmt: skip


def profile_row(trainer: Trainer, maker: RowMaker, phase: Phase, shape: Shape) -> Row:
    """Profile a shape's step; the same table on standard output."""
    trainer.begin(phase)
    row = step_profile(trainer, PhaseData(maker, replace(phase, shapes=(shape,), steps=1), seed=-1)[0])
    for line in lines(row):
        say(line)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--small", action="store_true", help="a tiny model and short rows, to try this script")
    parser.add_argument("--profile", type=int, metavar="TOKENS", help="profile the step of the phases' rows this long")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--seconds", type=float, default=150.0, help="begin no further part after these")
    args = parser.parse_args()
    answering = {shape.tokens: (phase, shape) for phase, shape in shapes_of(V4_PHASES) if phase.objective == "answers"}
    profiled = answering.get(args.profile)
    if args.profile is not None and profiled is None:
        parser.error(f"--profile {args.profile}: no phase has such rows; choose of {', '.join(map(str, answering))}.")
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    rows: list[Row] = []

    def part(what: dict[str, Any], measure: Callable[[], Row]) -> None:
        if time.perf_counter() - began > args.seconds:
            rows.append({**what, "ok": None, "skipped": "out of time"})
        else:
            try:
                rows.append(measure())
            except Exception as error:  # noqa: BLE001  the other parts still say something
                rows.append({**what, "ok": False, "error": repr(error)[:500], "where": traceback.format_exc()[-1500:]})
        say(json.dumps({name: value for name, value in rows[-1].items() if name != "top"}))
        args.out.write_text(json.dumps({"versions": versions(), "small": args.small, "rows": rows}, indent=1) + "\n")

    for tokens, rate, n_rows in () if args.profile else KERNELS_SMALL if args.small else KERNELS:
        part(
            {"part": "kernel", "tokens": tokens, "rate": rate},
            lambda tokens=tokens, rate=rate, n_rows=n_rows: kernel_row(
                tokens=tokens, rate=rate, rows=n_rows, device=device
            ),
        )
    backbone = DeepseekV4(topk=4) if args.small else DeepseekV4()
    config = v4_config(**SMALL) if args.small else v4_config()
    maker = RowMaker(Pieces(PreTrainedTokenizerFast.from_pretrained(REFERENCE_MODEL_FOLDER)), document_makers())
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            backbone.build(config, seed=0), device=device, out=Path(folder), backbone=backbone,
            compile_layers=device.type == "cuda" and not args.eager,
        )  # fmt: skip
        if profiled is not None:
            phase, shape = profiled
            tried = replace(shape, rows=2) if args.small else shape
            part({"part": "profile", "tokens": shape.tokens}, lambda: profile_row(trainer, maker, phase, tried))
        for phase, shape in () if args.profile else shapes_of(V4_PHASES):
            if args.small and shape.tokens > 64 and phase.objective == "answers":
                continue
            tried = replace(shape, tokens=min(shape.tokens, 64), rows=2) if args.small else shape
            part(
                {"part": "step", "objective": phase.objective, "tokens": shape.tokens},
                lambda phase=phase, tried=tried: step_row(trainer, maker, phase, tried),
            )
            if args.small and phase.objective == "sparse":
                break
    failed = [row for row in rows if row["ok"] is False]
    say(f"{len(rows)} parts, {len(failed)} failed, {time.perf_counter() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
