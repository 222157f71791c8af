"""Why a block-sparse method misses a needle: where the needle's block ranks under the method's own score.

The prompt and its answer are fed densely, so that every query is what it should be; each method's sequence is fed the
same queries, keys and values beside it, and its scores are noted. In every managed layer the head and step that attend
to the answer most are looked up: how much of its attention goes there, how many blocks the method scores above the
block of that token, and whether it would have read it. Ranks by block size tell a budget that is too small (the rank
grows with the length and stays near the front) from a score that loses the needle among its neighbours (a mean over a
block: the rank falls to chance as blocks grow).

Shapes: H KV heads, G query heads a KV head, Q = H * G, N blocks before the current one, T tokens.

Run it: ``kvscope study block-ranks -m moba -m quest --sweep moba.block_tokens=16,64,256 -t niah_multikey_2 -l 2k -l 8k
-n 5 --out ranks.csv``
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tabulate import tabulate

from kvscope.errors import UsageError
from kvscope.files import csv_file
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.engine.session import Session
from kvscope.harness.indexers.collection.make_document import answer_ids
from kvscope.harness.passes.method_sweeps import sweep_methods
from kvscope.harness.studies.attention_mass import answer_positions
from kvscope.harness.studies.feeding import feed, told_of
from kvscope.methods.base import AttentionCall, SequenceCache, union_collectors
from kvscope.methods.block_query import Query, Scored
from kvscope.methods.block_sparse import BlockSparse
from kvscope.methods.dense.method import Dense
from kvscope.methods.lsa.labels import token_logits
from kvscope.methods.registry import create_method
from kvscope.methods.resident import ResidentSequence
from kvscope.methods.shape import ModelShape
from kvscope.methods.store import PromptKV
from kvscope.tasks.base import Sample
from kvscope.tasks.registry import create_tasks
from kvscope.units import format_length

COLUMNS = ("model", "task", "length_tokens", "sample", "method", "block_tokens", "budget_tokens", "layer", "head",
           "decode_step", "answer_mass", "rank", "blocks", "blocks_chosen", "read")  # fmt: skip
RETRIEVING_MASS = 0.1


@dataclass(frozen=True)
class Place:
    """Where one head's attention to the answer is largest, and what a method makes of it.

    Attributes:
        step: decode step, 0 for the prompt's last token.
        head: query head.
        mass: of its attention, on the answer.
        rank: blocks that the method scores higher than that of the answer token the head attends to most.
        blocks, chosen: blocks before the current one, and how many of them are read.
        read: whether the block is read; so is the current one, and everything where nothing is chosen.
    """

    step: int
    head: int
    mass: float
    rank: int
    blocks: int
    chosen: int
    read: bool


class Shadow:
    """A method's sequence that is fed what dense is fed; its outputs go nowhere, its scores are noted."""

    def __init__(self, method: BlockSparse[Any]) -> None:
        self.method = method
        self.places: dict[int, Place] = {}
        self.sequence: SequenceCache | None = None
        self._seen: tuple[Query, Scored] | None = None
        score = method.score

        def noted(query: Query) -> Scored:
            scored = score(query)
            self._seen = query, scored
            return scored

        method.score = noted  # type: ignore[method-assign]  # this method object serves nothing else

    def attend(self, layer: int, call: AttentionCall, mass_QA: torch.Tensor, answer: torch.Tensor, step: int) -> None:
        """Feed one call and note it, if this step attends to the answer more than any before.

        Args:
            mass_QA: the attention of each query head to each token of the answer.
            answer: those tokens.
        """
        assert self.sequence is not None
        self._seen = None
        self.sequence.attend(layer, call)
        head = int(mass_QA.sum(1).argmax())
        mass = float(mass_QA[head].sum())
        if layer in self.places and self.places[layer].mass >= mass:
            return
        token = int(answer[mass_QA[head].argmax()])
        self.places[layer] = self._place(token, head, mass, step, n_q_heads=len(mass_QA))

    def _place(self, token: int, head: int, mass: float, step: int, *, n_q_heads: int) -> Place:
        if self._seen is None:  # nothing was chosen: everything is read
            return Place(step, head, mass, 0, 0, 0, True)
        query, scored = self._seen
        scores_HGN, block = scored.scores_HGN, token // query.plan.block_tokens
        n_blocks, n_chosen = scores_HGN.shape[2], query.plan.n_blocks - 1
        if block >= n_blocks:
            return Place(step, head, mass, 0, n_blocks, n_chosen, True)
        # A score may be one for all heads, one a KV head or one a query head.
        H, G = query.q_HGD.shape[:2]
        assert n_q_heads == H * G
        group = scores_HGN[min(head // G, scores_HGN.shape[0] - 1)]
        own_N = group[min(head % G, len(group) - 1)]
        ranks_G = (group > group[:, block, None]).sum(1)
        rank = int((own_N > own_N[block]).sum())
        # A KV head reads what any of its query heads chooses.
        return Place(step, head, mass, rank, n_blocks, n_chosen, bool((ranks_G < n_chosen).any()))


class _WatchedDense(Dense):
    """Dense, with shadows beside it."""

    def __init__(self, shadows: Sequence[Shadow], answer: torch.Tensor) -> None:
        super().__init__()
        self._shadows, self._answer = shadows, answer

    def observed_layers(self, shape: ModelShape) -> tuple[int, ...]:
        wanted = (shadow.method.observed_layers(shape) for shadow in self._shadows)
        return tuple(sorted({layer for layers in wanted for layer in layers}))

    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> SequenceCache:
        for shadow in self._shadows:
            shadow.sequence = shadow.method.open(prompt, device, reserve_tokens=reserve_tokens)
        return _WatchedSequence(prompt, torch.device(device), self._shadows, self._answer, reserve_tokens)


class _WatchedSequence(ResidentSequence):
    def __init__(
        self,
        prompt: PromptKV,
        device: torch.device,
        shadows: Sequence[Shadow],
        answer: torch.Tensor,
        reserve_tokens: int,
    ) -> None:
        super().__init__(prompt, device, ranges=[(0, prompt.n_tokens)], reserve_tokens=reserve_tokens)
        self._shadows, self._answer, self._n_prompt = shadows, answer, prompt.n_tokens

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:
        for shadow in self._shadows:
            if shadow.sequence is not None and layer in shadow.method.observed_layers(self.shape):
                shadow.sequence.observe(layer, hidden_BM)

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        out = super().attend(layer, call)
        n_tokens = self.pool.lengths[layer]
        logits_QT = token_logits(call, self.pool.pages[layer], n_tokens=n_tokens)
        total_Q = torch.logsumexp(logits_QT, 1)
        if call.sink_logits is not None:
            total_Q = torch.logaddexp(total_Q, call.sink_logits.float())
        mass_QA = torch.exp(logits_QT[:, self._answer] - total_Q[:, None])
        step = n_tokens - 1 - self._n_prompt
        for shadow in self._shadows:
            shadow.attend(layer, call, mass_QA, self._answer, step)
        return out

    def scored(self) -> torch.Tensor | None:
        scored = [shadow.sequence.scored() for shadow in self._shadows if shadow.sequence is not None]
        totals = [total for total in scored if total is not None]
        return torch.stack(totals).sum() if totals else None

    def close(self) -> None:
        for shadow in self._shadows:
            if shadow.sequence is not None:
                shadow.sequence.close()
                shadow.sequence = None
        super().close()


@torch.inference_mode()
def needle_ranks(loaded: LoadedModel, methods: Sequence[BlockSparse[Any]], sample: Sample) -> list[dict[str, Any]]:
    """Return one row per method and managed layer, keys as ``COLUMNS``.

    Args:
        methods: fresh objects: their ``score`` is watched from here on.

    Raises:
        UsageError: a method cannot run on the model, or the answer does not stand in the prompt word for word.
        NotFinite: the model's numbers or a method's scores are NaN or infinite somewhere.
    """
    for method in methods:
        reasons = method.unsupported(loaded.shape, loaded.device)
        if reasons:
            raise UsageError(f"Method '{method.label}' cannot run on model '{loaded.name}': {'; '.join(reasons)}.")
    positions = answer_positions(loaded, sample)
    if not positions:
        raise UsageError(
            f"The answer of sample {sample.sample} of {sample.task} does not stand in the prompt word for word, so it "
            "has no block: take a task of needles."
        )
    shadows = [Shadow(method) for method in methods]
    watched = _WatchedDense(shadows, torch.tensor(positions, device=loaded.device))
    collectors = union_collectors(methods, loaded.shape.layers)
    fed = [sample.ids[-1], *answer_ids(loaded, sample)]
    with told_of(sample), Session(loaded) as session:
        prompt = prefill(loaded, sample.ids[:-1], collectors=collectors, seed=sample.seed)
        session.add(watched, prompt, reserve_tokens=len(fed))
        feed(session, fed)
    rows = []
    for shadow in shadows:
        effective = shadow.method.effective_config(prompt.n_tokens, loaded.shape)
        for layer in loaded.shape.layers:
            found = shadow.places[layer]
            values = (
                loaded.name, sample.task, sample.length_tokens, sample.sample, shadow.method.label,
                effective["block_tokens"], effective["budget_tokens"], layer, found.head, found.step,
                round(found.mass, 4), found.rank, found.blocks, found.chosen, found.read,
            )  # fmt: skip
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def summary_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return per method, block size, length and layer: attention to the answer, its block's rank, how often it is read.

    Only layers in which some head gives the answer at least a tenth of its attention: the others do not look it up.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["length_tokens"], row["method"], row["block_tokens"], row["layer"]].append(row)
    table = []
    for (length, method, block, layer), found in sorted(groups.items()):
        mass = median(row["answer_mass"] for row in found)
        if mass < RETRIEVING_MASS:
            continue
        table.append([
            format_length(length), method, block, layer, f"{mass:.0%}", f"{median(row['rank'] for row in found):g}",
            f"{median(row['blocks'] for row in found):g}", found[0]["blocks_chosen"],
            f"{sum(row['read'] for row in found)} of {len(found)}",
        ])  # fmt: skip
    header = ["length", "method", "block", "layer", "attention", "rank", "of blocks", "chosen", "needle read"]
    if not table:
        return f"No layer gives an answer {RETRIEVING_MASS:.0%} of a head's attention: nothing is looked up here."
    return tabulate(table, headers=header, disable_numparse=True)


def block_methods(specs: Sequence[str], sweeps: Sequence[str]) -> list[BlockSparse[Any]]:
    """Return the methods of specs and sweeps.

    Raises:
        UsageError: one of them does not choose blocks.
    """
    made = []
    for spec in sweep_methods(specs, sweeps):
        method = create_method(spec)
        if not isinstance(method, BlockSparse):
            raise UsageError(
                f"Method '{method.label}' does not choose blocks by a query; take quest, moba, msa or dsa."
            )
        made.append(method)
    return made


def measure_to_csv(
    out: Path,
    *,
    methods: Sequence[str],
    sweeps: Sequence[str],
    model: str,
    tasks: Sequence[str],
    lengths_tokens: Sequence[int],
    samples: int,
    seed: int,
    device: str,
    dtype: str,
    note: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measure methods on a model, write one CSV row per sample, method and layer, and return the rows.

    Args:
        out: file to write.
        methods, sweeps: as ``kvscope run`` takes them.
        note: told of each sample as soon as it is measured.

    Raises:
        UsageError: an unknown task, a method that does not choose blocks or cannot run on the model.
    """
    made = create_tasks(tasks, samples=samples)
    block_methods(methods, sweeps)
    loaded = load_model(model, device=device, dtype=dtype)
    rows: list[dict[str, Any]] = []
    with csv_file(out, COLUMNS) as writer:
        for length, task, index in product(lengths_tokens, made, range(samples)):
            sample = task.build(loaded.tokenizer, length_tokens=length, sample=index, seed=seed)
            found = needle_ranks(loaded, block_methods(methods, sweeps), sample)
            writer.writerows(found)
            rows += found
            note(f"{task.name} {format_length(length)} {index}")
    return rows
