"""Greedy decoding of one sequence under one method, and teacher-forced likelihood.

Step 0 is the first forced token, fed under the method: no scored token comes from dense logits. Batch 1, no padding,
positions from the logical length. Several sequences at once: ``batch_decode``, of which this is the batch of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from kvscope.harness.engine.batch_decode import BatchDecode
from kvscope.harness.engine.decoding import DecodeResult, Request, check_lengths
from kvscope.harness.engine.finite import finite_tokens
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.rehearsal import rehearsed
from kvscope.harness.engine.session import Session
from kvscope.methods.base import CacheMethod
from kvscope.methods.store import PromptKV
from kvscope.results.schema import DecodeGraph


def decode(
    loaded: LoadedModel,
    method: CacheMethod[Any],
    prompt_kv: PromptKV,
    forced_ids: Sequence[int],
    *,
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
    stop_at_eos: bool = True,
    decode_graph: DecodeGraph = "off",
) -> DecodeResult:
    """Feed ``forced_ids`` under the method, then decode greedily. A method with a rehearsal decodes twice.

    Args:
        loaded: the model.
        method: from ``create_method``.
        prompt_kv: from ``prefill``; not changed, so the next method opens the same one.
        forced_ids: what follows the prefilled tokens and is fed under the method, one step a token: the last prompt
            token, or the whole question. At least one.
        max_new_tokens: longest answer.
        stop_strings: end the answer where one of them begins.
        stop_at_eos: end the answer at the model's end-of-sequence tokens.
        decode_graph: whether steps are replays of a CUDA graph; as ``Session``.

    Raises:
        UsageError: no forced token, no new token, stop strings without a tokenizer, an unsupported method, or a graph
            demanded where there can be none.
        NotFinite: logits, or scores that the method chose by, are NaN or infinite.
    """
    request = Request(
        method=method,
        prompt=prompt_kv,
        forced_ids=forced_ids,
        max_new_tokens=max_new_tokens,
        stop_strings=tuple(stop_strings),
        stop_at_eos=stop_at_eos,
    )
    with BatchDecode(loaded, decode_graph=decode_graph) as batch:
        row = batch.add(rehearsed(loaded, request))
        while not row.has_ended:
            batch.step()
    if row.error is not None:
        raise row.error
    assert row.result is not None
    return row.result


@torch.inference_mode()
def answer_nll(
    loaded: LoadedModel,
    method: CacheMethod[Any],
    prompt_kv: PromptKV,
    forced_ids: Sequence[int],
    answer_ids: Sequence[int],
    *,
    decode_graph: DecodeGraph = "off",
) -> float:
    """Return the mean negative log-likelihood of ``answer_ids`` under the method, in nats a token, teacher forced.

    Opens the prompt anew; arguments as ``decode``.

    Raises:
        UsageError: no forced token, no answer token, or an unsupported method.
        NotFinite: as ``decode``.
    """
    check_lengths(loaded, prompt_kv, forced_ids, len(answer_ids))
    fed = [*forced_ids, *answer_ids[:-1]]
    # A rehearsal feeds the same tokens; the one that it then chooses is fed to nobody.
    asked = rehearsed(loaded, Request(method=method, prompt=prompt_kv, forced_ids=fed, max_new_tokens=1))
    total = 0.0
    with Session(loaded, decode_graph=decode_graph) as session:
        session.add(asked.method, prompt_kv, reserve_tokens=len(fed))
        for index, token in enumerate(fed):
            logits_1V = session.step([token])
            finite_tokens(session, logits_1V, step=index)
            logits = logits_1V[0]
            answered = index - (len(forced_ids) - 1)
            if answered >= 0:
                target = torch.tensor(answer_ids[answered], device=logits.device)
                total += float(F.cross_entropy(logits.float(), target))
    return total / len(answer_ids)
