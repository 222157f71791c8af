"""Do sequences that share a step compute what each computes alone? Measured on the loaded model.

Logits differ by rounding: a product of several rows is added up in another order than that of one. A model that reads
more of its cache than its own row's positions differs by more, and must step its sequences one by one.

What rounding makes of logits depends on the tokens. On random ones some models are far from sure, and in bfloat16
Gemma 3 270M's logits moved by a third of their size: the run's own prompts are what tells. The model's own forward is
held against itself in a batch, too, as ``self_check`` does.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch

from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.engine.self_check import (
    LEAST_TOLERANCE,
    MOST_TOLERANCE,
    NOISE_FACTOR,
    difference,
    own_noise,
    random_ids,
)
from kvscope.harness.engine.session import Session
from kvscope.methods.dense.method import Dense
from kvscope.methods.store import PromptKV
from kvscope.results.schema import DecodeGraph

_PROMPT_TOKENS = (256, 100)
_N_STEPS = 6
_MOST_ALONE = 4


@dataclass(frozen=True, kw_only=True)
class BatchNoise:
    """What the probes found.

    Attributes:
        logit_noise: largest difference of a logit between steps of one sequence and of several, in nats.
        share: the largest difference as a share of the logits' norm about their mean.
        tolerance: what rounding may make of that.
    """

    logit_noise: float
    share: float
    tolerance: float

    @property
    def is_rounding(self) -> bool:
        """Whether sequences may share steps."""
        return math.isfinite(self.logit_noise) and self.share <= self.tolerance


@torch.inference_mode()
def batch_noise(
    loaded: LoadedModel,
    *,
    rows: int,
    text: Sequence[int] = (),
    decode_graph: DecodeGraph = "off",
    step_rows: int | None = None,
) -> BatchNoise:
    """Step probe sequences alone and all together, and compare.

    The sequences are tokens behind prompts of two lengths, under ``dense``. Both times they are fed the same ones.

    Args:
        rows: sequences of a shared step, at least 2.
        text: ids to take them from, over and over; none: random ones.
        decode_graph, step_rows: as ``Session``.
    """
    page_tokens, most_tokens = loaded.shape.page_tokens, loaded.max_length_tokens - _N_STEPS - 1
    lengths = [min(n_tokens, most_tokens // (k + 1)) for k, n_tokens in enumerate(_PROMPT_TOKENS)]
    n_ids = sum(lengths) + rows * _N_STEPS
    ids = list(islice(cycle(text), n_ids)) if text else random_ids(loaded, n_ids)
    # In float32 the least is far above what a batch does.
    own_share = 0.0 if loaded.dtype == torch.float32 else own_noise(loaded, ids[: lengths[0]])
    prompts = []
    for n_tokens in lengths:
        own, ids = ids[:n_tokens], ids[n_tokens:]
        prompts.append(prefill(loaded, own, chunk_tokens=-(-n_tokens // page_tokens) * page_tokens))
    fed = [(prompts[row % 2], ids[row * _N_STEPS :][:_N_STEPS]) for row in range(rows)]
    options: dict[str, Any] = {"decode_graph": decode_graph, "step_rows": step_rows}
    together = _logits(loaded, fed, **options)
    noise = share = 0.0
    # Rows at both ends of the step, and between them; of both lengths.
    for row in sorted({0, 1, rows // 2, rows - 1})[:_MOST_ALONE]:
        alone = _logits(loaded, [fed[row]], **options)[:, 0]
        apart = float((alone - together[:, row]).abs().max())
        noise = max(noise, apart if math.isfinite(apart) else math.inf)
        share = max(share, difference(together[:, row], alone))
    tolerance = min(max(LEAST_TOLERANCE[loaded.dtype], NOISE_FACTOR * own_share), MOST_TOLERANCE)
    return BatchNoise(logit_noise=noise, share=share, tolerance=tolerance)


def _logits(
    loaded: LoadedModel, fed: list[tuple[PromptKV, list[int]]], *, decode_graph: DecodeGraph, step_rows: int | None
) -> torch.Tensor:
    """Return the logits of the steps, [steps, rows, V]."""
    with Session(loaded, decode_graph=decode_graph, step_rows=step_rows) as session:
        for prompt, _ in fed:
            session.add(Dense(), prompt, reserve_tokens=_N_STEPS)
        steps = zip(*(tokens for _, tokens in fed), strict=True)
        return torch.stack([session.step(list(tokens)).float() for tokens in steps])
