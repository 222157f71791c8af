"""How much attention reaches the evidence: dilution, measured from the question to the first step of the answer.

The context is prefilled as always, the question's tokens are fed one by one under dense, and every head's softmax
weight on the evidence is summed where the query meets the keys: one row of logits a head at a time, never a full
attention matrix, so 512K tokens are no harder than 1K.

The answer's first step alone would mislead: a model may look the answer up while it reads the question and carry it on
from there, with no weight on the evidence left when it speaks.

Shapes: H KV heads, G query heads of a group, N tokens, D head size, P tokens a page.

Run it: ``kvscope study attention-mass -t niah_single_1 -l 1k -l 4k -n 10 --out mass.csv``, then ``kvscope study
attention-figure mass.csv`` for the figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kvscope.errors import UsageError
from kvscope.files import csv_file
from kvscope.harness.engine.backend import require_token_attention
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.engine.presets import refuse_preset
from kvscope.harness.engine.session import Session
from kvscope.harness.studies.feeding import feed, told_of
from kvscope.methods.base import AttentionCall, SequenceCache
from kvscope.methods.dense.method import Dense
from kvscope.methods.lsa.labels import token_logits
from kvscope.methods.resident import ResidentSequence
from kvscope.methods.store import PromptKV
from kvscope.tasks.base import Sample
from kvscope.tasks.registry import create_task, create_tasks

COLUMNS = (
    "model",
    "model_revision",
    "task",
    "question_type",
    "length_tokens",
    "sample",
    "seed",
    "depth",
    "prompt_sha256",
    "prompt_tokens",
    "evidence_tokens",
    "answer_tokens",
    "decode_step",
    "layer",
    "head",
    "evidence_mass",
    "answer_mass",
    "evidence_peak",
    "evidence_peak_step",
    "answer_peak",
    "answer_peak_step",
)


@torch.inference_mode()
def evidence_attention(loaded: LoadedModel, sample: Sample) -> list[dict[str, Any]]:
    """Return one row per managed layer and query head, keys as ``COLUMNS``.

    Masses are softmax weights in [0, 1]; sink logits that models learn take their share.

    - ``evidence_mass``: on all tokens of the evidence, ``answer_mass``: on those of them that spell a target (None
      where none does), both from the query that yields the answer's first token that is not white space.
      ``decode_step`` is its place: 0 is the prompt's last token; a tokenizer that spells the space before a number
      apart makes it 1.
    - ``evidence_peak``, ``answer_peak``: the largest of these masses of any query from the question's first token to
      that one, and ``.._peak_step`` its place, 0 for the question's first token. A question that repeats words of the
      evidence draws attention to them, so the peak on the answer's own tokens says more about the look-up.

    Raises:
        UsageError: a sample without evidence, or one longer than the model takes.
        NotFinite: the model's numbers are NaN or infinite somewhere.
    """
    if not sample.evidence_spans:
        raise UsageError(
            f"Sample {sample.sample} of {sample.task} has no evidence in its prompt, so no attention to it can be "
            "measured: leave the task out."
        )
    evidence = [index for start, end in sample.evidence_spans for index in range(start, end)]
    split = sample.question_start
    assert max(evidence) < split, "evidence stands before the question"
    answer = answer_positions(loaded, sample)
    lead = _lead_ids(loaded, sample)
    groups = {
        "evidence": torch.tensor(evidence, device=loaded.device),
        "answer": torch.tensor(answer, device=loaded.device, dtype=torch.long),
    }
    fed = [*sample.ids[split:], *lead]
    with told_of(sample), Session(loaded) as session:
        prompt = prefill(loaded, sample.ids[:split], seed=sample.seed)
        watched = session.add(_WatchedDense(groups), prompt, reserve_tokens=len(fed)).cache
        assert isinstance(watched, _WatchedSequence)
        feed(session, fed)
        masses, peaks = watched.masses, watched.peaks
    head_columns = {
        "model": loaded.name,
        "model_revision": loaded.revision,
        "task": sample.task,
        "question_type": sample.question_type,
        "length_tokens": sample.length_tokens,
        "sample": sample.sample,
        "seed": sample.seed,
        "depth": sample.depth,
        "prompt_sha256": sample.prompt_sha256,
        "prompt_tokens": len(sample.ids),
        "evidence_tokens": len(evidence),
        "answer_tokens": len(answer),
        "decode_step": len(lead),
    }
    rows = []
    for layer in loaded.shape.layers:
        columns: dict[str, list[Any]] = {}
        for name, mass in masses[layer].items():
            peak, step = peaks[layer][name]
            columns |= {
                f"{name}_mass": mass.tolist(),
                f"{name}_peak": peak.tolist(),
                f"{name}_peak_step": step.tolist(),
            }
        for head in range(loaded.shape.n_q_heads):
            row = {name: values[head] for name, values in columns.items()}
            if not answer:  # no token, so no mass to speak of
                row |= {name: None for name in row if name.startswith("answer")}
            rows.append({name: (head_columns | {"layer": layer, "head": head} | row)[name] for name in COLUMNS})
    return rows


class _WatchedDense(Dense):
    """Dense, with the mass on some groups of positions noted at every step."""

    def __init__(self, groups: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._groups = groups

    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> SequenceCache:
        return _WatchedSequence(prompt, torch.device(device), self._groups, reserve_tokens=reserve_tokens)


class _WatchedSequence(ResidentSequence):
    """Every token resident in the order of the prompt, so that a packed position is a token's index.

    Attributes:
        masses: layer -> group -> mass [query heads] of the latest step, fp32.
        peaks: layer -> group -> largest mass of any step yet, and that step, each [query heads].
    """

    def __init__(
        self, prompt: PromptKV, device: torch.device, groups: dict[str, torch.Tensor], *, reserve_tokens: int
    ) -> None:
        super().__init__(prompt, device, ranges=[(0, prompt.n_tokens)], reserve_tokens=reserve_tokens)
        self._groups = groups
        self._n_prompt_tokens = prompt.n_tokens
        self.masses: dict[int, dict[str, torch.Tensor]] = {}
        self.peaks: dict[int, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        out = super().attend(layer, call)
        n_tokens = self.pool.lengths[layer]
        logits_QN = token_logits(call, self.pool.pages[layer], n_tokens=n_tokens)
        total_Q = torch.logsumexp(logits_QN, -1)
        if call.sink_logits is not None:
            total_Q = torch.logaddexp(total_Q, call.sink_logits.float())
        step = n_tokens - 1 - self._n_prompt_tokens
        for name, at in self._groups.items():
            now = torch.exp(logits_QN[:, at] - total_Q[:, None]).sum(-1)
            nothing = torch.full_like(now, -1.0), torch.zeros_like(now, dtype=torch.long)
            peak, steps = self.peaks.setdefault(layer, {}).get(name, nothing)
            self.masses.setdefault(layer, {})[name] = now
            self.peaks[layer][name] = torch.maximum(now, peak), torch.where(now > peak, step, steps)
        return out


def _lead_ids(loaded: LoadedModel, sample: Sample) -> list[int]:
    """Return the white space that begins an answer where the tokenizer gives it tokens of its own."""
    if loaded.tokenizer is None or not sample.targets:
        return []
    lead: list[int] = []
    for token in loaded.tokenizer(" " + sample.targets[0], add_special_tokens=False)["input_ids"]:
        if loaded.tokenizer.decode([token]).strip():
            break
        lead.append(token)
    return lead


def answer_positions(loaded: LoadedModel, sample: Sample) -> list[int]:
    """Return the evidence tokens that spell a target."""
    if loaded.tokenizer is None:
        return []
    found: list[int] = []
    for start, end in sample.evidence_spans:
        ids = list(sample.ids[start:end])
        text = loaded.tokenizer.decode(ids)
        ranges = [(text.index(target), text.index(target) + len(target)) for target in sample.targets if target in text]
        if not ranges:
            continue
        ends = [len(loaded.tokenizer.decode(ids[: k + 1])) for k in range(len(ids))]
        for k, (left, right) in enumerate(zip([0, *ends], ends, strict=False)):
            if any(left < stop and begin < right for begin, stop in ranges):
                found.append(start + k)
    return found


def measured(
    loaded: LoadedModel, *, tasks: Sequence[str], lengths_tokens: Sequence[int], samples: int, seed: int
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of one sample after another, shortest length first."""
    for length in sorted(lengths_tokens):
        for name in tasks:
            task = create_task(name)
            for index in range(samples):
                sample = task.build(loaded.tokenizer, length_tokens=length, sample=index, seed=seed)
                yield evidence_attention(loaded, sample)


def measure_to_csv(
    out: Path,
    *,
    model: str,
    tasks: Sequence[str],
    lengths_tokens: Sequence[int],
    samples: int,
    seed: int,
    device: str,
    dtype: str,
    note: Callable[[str], None],
) -> None:
    """Measure a model and write one CSV row per sample, layer and head.

    Args:
        out: file to write.
        note: told of each sample as soon as it is measured.

    Raises:
        UsageError: an unknown task, a model without tokens of its own to attend to, or a length it does not take.
    """
    create_tasks(tasks, samples=samples)
    refuse_preset(model, "measure attention on")
    loaded = load_model(model, device=device, dtype=dtype)
    require_token_attention(loaded.backend, model=loaded.name, what="attention on the evidence")
    if max(lengths_tokens) > loaded.max_length_tokens:
        raise UsageError(f"Model '{loaded.name}' takes {loaded.max_length_tokens} tokens, not {max(lengths_tokens)}.")
    with csv_file(out, COLUMNS) as writer:
        for rows in measured(loaded, tasks=tasks, lengths_tokens=lengths_tokens, samples=samples, seed=seed):
            writer.writerows(rows)
            best = max(rows, key=lambda row: float(row["evidence_peak"]))
            note(
                f"{best['task']} {best['length_tokens']} tokens, sample {best['sample']}: at most "
                f"{best['evidence_peak']:.3f} on the evidence (layer {best['layer']}, head {best['head']})"
            )
