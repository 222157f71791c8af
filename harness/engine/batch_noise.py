"""How far logits differ between a sequence's own steps and steps that it shares: measured, for a product of several
rows is added up in another order than that of one.

Shapes: V vocabulary.
"""

from __future__ import annotations

import torch

from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.engine.self_check import random_ids
from kvscope.harness.engine.session import Session
from kvscope.methods.dense.method import Dense
from kvscope.methods.store import PromptKV
from kvscope.results.schema import DecodeGraph

_PROMPT_TOKENS = 256
_N_STEPS = 6
_MOST_ALONE = 4


@torch.inference_mode()
def batch_noise(loaded: LoadedModel, *, rows: int, decode_graph: DecodeGraph = "off") -> float:
    """Return the largest difference of a logit, in nats, over probe sequences stepped alone and all together.

    The sequences are random tokens behind one random prompt under ``dense``. Both times they are fed the same ones.

    Args:
        rows: sequences of a shared step, at least 2.
        decode_graph: as ``Session``.
    """
    page_tokens = loaded.shape.page_tokens
    n_prompt = min(_PROMPT_TOKENS, loaded.max_length_tokens - _N_STEPS - 1)
    ids = random_ids(loaded, n_prompt + rows * _N_STEPS)
    prompt = prefill(loaded, ids[:n_prompt], chunk_tokens=-(-n_prompt // page_tokens) * page_tokens)
    fed = [ids[n_prompt + row * _N_STEPS :][:_N_STEPS] for row in range(rows)]
    together = _logits(loaded, prompt, fed, decode_graph=decode_graph)
    # Rows at both ends of the step, and between them.
    alone = sorted({round(k * (rows - 1) / (_MOST_ALONE - 1)) for k in range(_MOST_ALONE)})
    return max(
        float((_logits(loaded, prompt, [fed[row]], decode_graph=decode_graph)[:, 0] - together[:, row]).abs().max())
        for row in alone
    )


def _logits(loaded: LoadedModel, prompt: PromptKV, fed: list[list[int]], *, decode_graph: DecodeGraph) -> torch.Tensor:
    """Return the logits of the steps, [steps, rows, V]."""
    with Session(loaded, decode_graph=decode_graph) as session:
        for _ in fed:
            session.add(Dense(), prompt, reserve_tokens=_N_STEPS)
        return torch.stack([session.step(list(tokens)).float() for tokens in zip(*fed, strict=True)])
