"""``kvscope lsa eval --gate``: is what the labels ask for enough?

Every prompt of a collection is answered twice: densely, and with exactly the labelled chunks resident (besides sinks,
window and decoded tokens), refreshed every tau steps. The labels pass when the second keeps 98 % of the first and at
most 30 % of the prompts is kept for it: labels that ask for everything are enough, and teach nothing.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kvscope.errors import UsageError
from kvscope.harness.engine.backend import require_token_attention
from kvscope.harness.engine.chat import AUTO, NONE, chat_tokenizer
from kvscope.harness.engine.decode import decode
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.prefill import prefill
from kvscope.harness.indexers.collection.collect import make_tasks
from kvscope.harness.indexers.collection.label_choice import LabelChoice
from kvscope.harness.indexers.collection.label_rule import LabelRule
from kvscope.harness.indexers.collection.reading import Collection, open_collections
from kvscope.harness.indexers.lsa.label_share import MOST_KEPT
from kvscope.harness.indexers.lsa.train_config import DEFAULT_TAU
from kvscope.methods.base import SequenceCache
from kvscope.methods.dense.method import Dense
from kvscope.methods.indexer_files import prompts_text
from kvscope.methods.lsa.method import Lsa
from kvscope.methods.lsa.options import ATTENTION, LsaConfig
from kvscope.methods.lsa.selection import ScriptedSelector
from kvscope.methods.store import PromptKV
from kvscope.tasks.answers import answer_of

LEAST_SHARE = 0.98


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """What the gate found.

    Attributes:
        rows: one a (task, length), and "all": n, dense score, restricted score, share, mean kept fraction.
        failures: why the labels do not pass, one clause each: the pooled restricted score is below 98 % of the dense
            one, that one is zero, or more than 30 % of the prompts is kept.
    """

    rows: list[dict[str, Any]]
    failures: list[str]

    @property
    def passed(self) -> bool:
        """Whether the labels are enough, and few enough."""
        return not self.failures


class ScriptedLsa(Lsa):
    """LSA whose choices were made beforehand."""

    name = "lsa_labels"

    def __init__(self, config: LsaConfig) -> None:
        super().__init__(config)
        self.script: list[torch.Tensor] = []

    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> SequenceCache:
        layout = self.layout(prompt.n_tokens)
        return self.open_with(
            prompt, device, ScriptedSelector(self.script), layout=layout, reserve_tokens=reserve_tokens
        )


def gate(
    folders: Sequence[str | Path],
    *,
    model: str | None = None,
    tau: int = DEFAULT_TAU,
    choice: LabelChoice | None = None,
    samples: int | None = None,
    chunk_tokens: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    note: Callable[[str], None] = lambda text: None,
) -> GateResult:
    """Answer the prompts of collections densely and under their own labels.

    Args:
        model: None: the one that was collected from.
        tau: as in training.
        choice: which labels; None: the collections' own.
        samples: most prompts of each task and length.
        chunk_tokens: of the chunks kept; None: as they were recorded.

    Raises:
        UsageError: another model than the collections', or damaged shards.
    """
    collections = open_collections(folders, chunk_tokens=chunk_tokens)
    info = collections[0].info
    choice = choice or LabelChoice()
    labels = choice.rule(info)
    loaded = load_model(model or info.model, device=device, dtype=dtype)
    require_token_attention(loaded.backend, model=loaded.name, what="the label gate")
    if loaded.shape.revision != info.model_revision:
        raise UsageError(
            f"The collection was made with model '{info.model}' ({info.model_revision}), not with '{loaded.name}' "
            f"({loaded.shape.revision})."
        )
    chat = chat_tokenizer(loaded.tokenizer, NONE if info.chat_template is None else AUTO)
    template = None if chat is None else chat.sha256
    if template != info.chat_template:
        raise UsageError(
            f"The prompts of the collection are in another chat template than that of '{loaded.name}' "
            f"({prompts_text(info.chat_template)}, {prompts_text(template)}), so they cannot be built again: put "
            "the template into its tokenizer."
        )
    config = LsaConfig(
        tau=tau,
        indexer=ATTENTION,  # whatever needs no trained part: the choices are scripted
        chunk_tokens=info.chunk_tokens,
        sink_tokens=choice.sink_tokens,
        recency_tokens=choice.recency_tokens,
    )
    method, dense = ScriptedLsa(config), Dense()
    scores: dict[tuple[str, int], list[tuple[float, float, float]]] = defaultdict(list)
    for collection in collections:
        tasks = {task.name: task for task in make_tasks(collection.info.tasks)}
        for index, document_info in enumerate(collection.documents):
            if samples is not None and document_info.sample >= samples:
                continue
            task = tasks[document_info.task]
            sample = task.build(
                chat or loaded.tokenizer, length_tokens=document_info.length_tokens, sample=document_info.sample,
                seed=collection.info.seed,
            )  # fmt: skip
            sample = sample if chat is None else replace(sample, stop=())
            method.script = script(collection, index, method, tau=tau, rule=labels)
            prompt = prefill(loaded, sample.ids[:-1])
            found = []
            kept = 1.0
            for each in (dense, method):
                result = decode(
                    loaded, each, prompt, sample.ids[-1:], max_new_tokens=sample.max_new_tokens,
                    stop_strings=sample.stop,
                )  # fmt: skip
                found.append(task.score(sample, answer_of(result.text, sample.stop)))
                if result.residency is not None:
                    resident = result.residency.resident_tokens
                    kept = sum(resident) / len(resident) / max(1, result.residency.prompt_tokens)
            scores[task.name, document_info.length_tokens].append((found[0], found[1], kept))
            done = sum(map(len, scores.values()))
            if done % 10 == 0:
                note(f"{done} prompts answered twice")
    rows = [_row(task, length, triples) for (task, length), triples in sorted(scores.items())]
    pooled = _row("all", 0, [triple for triples in scores.values() for triple in triples])
    return GateResult(rows=[pooled, *rows], failures=gate_failures(pooled))


def gate_failures(pooled: dict[str, Any]) -> list[str]:
    """Return why labels do not pass, by the pooled row; empty where they do."""
    failures = []
    if not pooled["dense"]:
        failures.append("dense answers none of these prompts, so nothing is told; collect tasks that the model answers")
    elif pooled["restricted"] < LEAST_SHARE * pooled["dense"]:
        failures.append(
            f"restricted to its labels, dense keeps {pooled['share']:.1%} of its score, under {LEAST_SHARE:.0%}"
        )
    if pooled["kept_fraction"] > MOST_KEPT:
        failures.append(
            f"labels keep {pooled['kept_fraction']:.1%} of the prompts, over {MOST_KEPT:.0%}: that much predicts "
            "nothing; raise --least-mass or lower --top-p"
        )
    return failures


def script(collection: Collection, index: int, method: Lsa, *, tau: int, rule: LabelRule) -> list[torch.Tensor]:
    """Return the labelled candidates of every refresh of a document."""
    document = collection.load(index)
    layout = method.layout(document.info.prompt_tokens)
    positives = collection.positives(index, rule, tau=tau)
    rows = document.refresh_rows(tau)
    return [positives[row, layout.first : layout.last].nonzero()[:, 0] for row in rows.tolist()]


def _row(task: str, length_tokens: int, triples: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    n = len(triples)
    dense, restricted, kept = (sum(triple[i] for triple in triples) / n for i in range(3))
    return {
        "task": task,
        "length_tokens": length_tokens,
        "n": n,
        "dense": round(dense, 4),
        "restricted": round(restricted, 4),
        "share": round(restricted / dense, 4) if dense else None,
        "kept_fraction": round(kept, 4),
    }
