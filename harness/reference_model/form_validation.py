"""Accuracy of a model on the row families, by family and length, on seeds of their own: seconds on a GPU.

Teacher-forced: an answer is right where every one of its tokens is the most likely one behind the tokens before it, and
that is exactly where greedy decoding writes it.
"""

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel

from kvscope.harness.reference_model import attention
from kvscope.harness.reference_model.curriculum import Phase, Shape
from kvscope.harness.reference_model.data import Batch, PhaseData, batches
from kvscope.harness.reference_model.row_maker import RowMaker

# Training's seeds are small, and its phases have other names: either sets these rows apart.
SEED = 7_000_000
FAMILIES = ("vt_forms", "needle_forms", "cwe_forms", "fwe_forms", "vt", "cwe", "fwe", "long_qa_2", "needles")
# (row length, rows, most questions)
SHAPES = ((1024, 64, 12), (4096, 32, 32), (16_384, 8, 64), (32_768, 6, 80))
BATCH_TOKENS = 32_768


def _answers(batch: Batch) -> list[tuple[int, int, int]]:
    """Return (row, first, behind the last) of every run of scored tokens: places in ``batch.at_N``."""
    at = batch.at_N.tolist()
    edges = [0, *(i for i, (a, b) in enumerate(pairwise(at), 1) if b != a + 1), len(at)]
    tokens = batch.ids_BT.shape[1]
    return [(at[first] // tokens, first, last) for first, last in pairwise(edges)]


@torch.no_grad()
def answers_right(model: PreTrainedModel, batch: Batch, *, end_id: int) -> list[tuple[bool, bool]]:
    """Return, for every answer of a batch, whether it is right and whether it is its row's first.

    Solved examples' answers, which no end-of-sequence follows, are left out.
    """
    device = next(model.parameters()).device
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
        torch.compiler.set_stance("force_eager"),  # another graph than training's would be compiled
    ):
        hidden_NM = model.model(batch.ids_BT.to(device)).last_hidden_state.flatten(0, 1)[batch.at_N.to(device)]
        right = (model.lm_head(hidden_NM).argmax(-1).cpu() == batch.targets_N).tolist()
    targets = batch.targets_N.tolist()
    rows: set[int] = set()
    found = []
    for row, first, last in _answers(batch):
        if targets[last - 1] == end_id:
            found.append((all(right[first:last]), row not in rows))
            rows.add(row)
    return found


def validate(
    model: PreTrainedModel,
    maker: RowMaker,
    *,
    end_id: int,
    families: Sequence[str] = FAMILIES,
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    workers: int = 0,
    note: Callable[..., None] = lambda **row: None,
) -> list[dict[str, Any]]:
    """Return one row a (family, length): answers, the share that is right in percent, and that of rows' first answers.

    Args:
        shapes: (row length in tokens, rows, most questions a row).
    """
    was_training, was = model.training, model.config._attn_implementation
    model.eval()
    if was != attention.NAME:
        model.set_attn_implementation(attention.NAME)
    rows: list[dict[str, Any]] = []
    for tokens, n_rows, questions in shapes:
        a_batch = max(1, min(n_rows, BATCH_TOKENS // tokens))
        shape = Shape(tokens=tokens, rows=a_batch, questions=questions)
        for family in families:
            began = time.perf_counter()
            documents = () if family == "needles" else ((family, 1.0),)
            phase = Phase(
                name=f"validation-{family}", shapes=(shape,), steps=-(-n_rows // a_batch), lr=(0.0, 0.0),
                documents=documents,
            )  # fmt: skip
            found: list[tuple[bool, bool]] = []
            for batch in batches(PhaseData(maker, phase, seed=SEED), workers=min(workers, phase.steps)):
                found += answers_right(model, batch, end_id=end_id)
            firsts = [right for right, first in found if first]
            rows.append(
                {
                    "family": family, "length_tokens": tokens, "answers": len(found), "rows": len(firsts),
                    "right_percent": _percent([right for right, _ in found]), "first_right_percent": _percent(firsts),
                    "seconds": round(time.perf_counter() - began, 2),
                }
            )  # fmt: skip
            note(**rows[-1])
    model.train(was_training)
    if was != attention.NAME:
        model.set_attn_implementation(was)
    return rows


def _percent(right: Sequence[bool]) -> float:
    return round(100 * sum(right) / max(1, len(right)), 1)
