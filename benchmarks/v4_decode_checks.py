"""Whether what ``v4_decode_step.py`` times is right: the native top-k, and captured steps.

Shapes: n entries of a CSA layer, E indexer key size, I indexer heads, S steps, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from step_times import Row
from v4_decode_cases import Prompts, Scale, build, with_layers

from kvscope.harness.engine.decode_graph import GraphStep, static_reasons
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.session import Session
from kvscope.methods.kernels.index_topk.ops import index_topk
from kvscope.methods.kernels.index_topk.reference import index_scores_reference
from kvscope.methods.registry import create_method

MOST_DIFFERENCE = 1e-3
#: Of the geometry, in fp32: every kind of layer.
CHECKED_LAYERS = 5
FIXED = "fixed"


def check_rows(scale: Scale, loaded: LoadedModel) -> Iterator[Row]:
    """Whether what is timed is right: the native top-k against fp64, and captured steps against eager ones.

    In bf16 a rounding changes which entries and which expert are chosen, and 43 layers of random weights make much of
    it: eager steps are as far from fp32's as captured ones are. So what a capture does is compared in two ways. In
    fp32 the first layers of the geometry give the eager logits within ``MOST_DIFFERENCE``. And in the model's own type
    every logit is, bit by bit, that of the same operations without a graph. How far eager steps are is said beside.
    """
    yield _topk_check(scale, loaded)
    length, on_gpu = min(scale.lengths_tokens), loaded.device.type == "cuda"
    captured = "on" if on_gpu else FIXED
    few = replace(scale, dtype=torch.float32)
    if scale.whole_layers > CHECKED_LAYERS:
        few = with_layers(few, CHECKED_LAYERS)
    small = build(few)
    prompt = Prompts(small, length).of(length - scale.eager_steps)
    eager, _ = _logits(small, prompt, scale.eager_steps, "off")
    found, backend = _logits(small, prompt, scale.eager_steps, captured)
    difference = float(_differences(found, eager).max())
    yield {
        "part": "check", "case": "captured against eager, fp32", "length_tokens": length,
        "layers": small.model.config.num_hidden_layers, "backend": backend, "largest_difference": difference,
        "status": "ok" if difference <= MOST_DIFFERENCE else "failed", "reason": f"logits differ by {difference:.2g}",
    }  # fmt: skip
    del small, prompt
    prompt = Prompts(loaded, length).of(length - scale.eager_steps)
    kinds = ("off", FIXED, *([captured] if on_gpu else []))
    steps = {graph: _logits(loaded, prompt, scale.eager_steps, graph)[0] for graph in kinds}
    unequal = int((steps[captured] != steps[FIXED]).sum())
    yield {
        "part": "check", "case": "captured against uncaptured", "length_tokens": length,
        "dtype": str(loaded.dtype).removeprefix("torch."), "unequal_logits": unequal,
        "median_difference_to_eager": float(_differences(steps[captured], steps["off"]).median()),
        "status": "ok" if unequal == 0 else "failed", "reason": f"{unequal} logits differ",
    }  # fmt: skip


class _FixedStep(GraphStep):
    """The step that is captured, run each time instead of replayed."""

    backend = "fixed addresses, not captured"

    @classmethod
    def reasons(cls, loaded: LoadedModel, cache: Any) -> list[str]:
        return static_reasons(loaded, cache)

    def _capture(self) -> None:
        self._versions = self._static_versions()
        self._forward()

    def _replay(self) -> None:
        self._logits_nV = self._forward()


class _FixedSession(Session):
    graph_step = _FixedStep


def _logits(loaded: LoadedModel, prompt: Any, n_steps: int, graph: Any) -> tuple[torch.Tensor, str]:
    """Logits [steps, vocabulary] of dense steps, and how they ran."""
    session_type = _FixedSession if graph == FIXED else Session
    with session_type(loaded, decode_graph="on" if graph == FIXED else graph) as session:
        session.add(create_method("dense"), prompt, reserve_tokens=n_steps)
        logits = torch.cat([session.step([1 + i]).float().clone() for i in range(n_steps)])
        return logits, session.step_backend


def _differences(found_SV: torch.Tensor, expected_SV: torch.Tensor) -> torch.Tensor:
    """The largest difference of a logit in each step, over the largest logit."""
    return (found_SV - expected_SV).abs().amax(1) / expected_SV.abs().amax()


def _topk_check(scale: Scale, loaded: LoadedModel) -> Row:
    config, device = loaded.model.config, loaded.device
    length = min(scale.lengths_tokens)
    n = length // loaded.shape.cache.csa_rate
    k = min(config.index_topk, n - 3)  # of those that count
    keys_nE = torch.randn(n, config.index_head_dim, dtype=loaded.dtype, device=device)
    q_IE = torch.randn(config.index_n_heads, config.index_head_dim, dtype=loaded.dtype, device=device)
    weight_I = torch.randn(config.index_n_heads, device=device)
    count_1 = torch.tensor([n - 3], device=device)
    found_k = index_topk(q_IE, weight_I, keys_nE, count_1, k=k).long()
    exact_n = index_scores_reference(q_IE, weight_I, keys_nE)[: n - 3]
    least, band = exact_n.sort(descending=True).values[k - 1], 1e-5 * exact_n.abs().max()
    chosen_n = torch.zeros_like(exact_n, dtype=torch.bool).index_fill_(0, found_k, value=True)
    wrong = int((chosen_n & (exact_n < least - band)).sum() + (~chosen_n & (exact_n > least + band)).sum())
    return {
        "part": "check", "case": "top-k against fp64", "length_tokens": length, "entries": n, "wrong": wrong,
        "status": "ok" if wrong == 0 else "failed", "reason": f"{wrong} entries are not the best",
    }  # fmt: skip
