"""One document of a collection: a prompt, prefilled once, and what its decode steps attend to.

Every document is a task's prompt with its answer. The prompt is prefilled as for any method; its last token and the
answer are then fed one by one, as decode would, and every such step leaves the hidden states entering the indexed
layers and the attention of the managed layers, reduced to masses of chunks.

The answer is the model's own, greedily decoded, unless the task's reference answer is asked for: which chunks the next
steps need depends on what they say, and a model may say the same in other words and another order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from kvscope.harness.engine.answer_end import AnswerEnd
from kvscope.harness.engine.chat import ChatTokenizer
from kvscope.harness.engine.finite import finite_tokens
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.prefill import DEFAULT_CHUNK_TOKENS, prefill
from kvscope.harness.engine.session import Session
from kvscope.harness.indexers.collection.document import STORED_DTYPE, CollectionInfo, Document, DocumentInfo
from kvscope.harness.indexers.collection.entry_recorder import EntryRecorder
from kvscope.harness.indexers.collection.recorder import Recorder, StepRecord
from kvscope.harness.indexers.collection.token_records import token_tensors

if TYPE_CHECKING:
    from kvscope.tasks.base import Sample, Task


@dataclass(frozen=True)
class Job:
    """One document to make."""

    task: "Task"
    length_tokens: int
    sample: int


def answer_ids(loaded: LoadedModel, sample: "Sample") -> list[int]:
    """Return the reference answer as tokens, in the form whose likelihood ``run --answer-nll`` measures."""
    text = " " + ", ".join(sample.targets)
    ids: list[int] = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def make_document(
    loaded: LoadedModel,
    recorder: Recorder | EntryRecorder,
    info: CollectionInfo,
    job: Job,
    *,
    seed: int,
    chat: ChatTokenizer | None = None,
) -> Document:
    """Prefill a prompt, feed its last token and an answer, and return what was recorded.

    Args:
        chat: what puts the prompt into a chat template; None: it is a plain text.
    """
    sample = job.task.build(chat or loaded.tokenizer, length_tokens=job.length_tokens, sample=job.sample, seed=seed)
    if chat is not None:
        sample = replace(sample, stop=())  # as in a run: a model that is spoken to ends its answers itself
    context_ids, fed_ids = sample.ids[:-1], [sample.ids[-1]]
    if info.answers == "reference":
        fed_ids += answer_ids(loaded, sample)
    return record(
        loaded, recorder, info, context_ids, fed_ids, task=sample.task, question_type=sample.question_type,
        length_tokens=job.length_tokens, sample=job.sample,
        own_answer=sample if info.answers == "own" else None,
    )  # fmt: skip


@torch.inference_mode()
def record(
    loaded: LoadedModel,
    recorder: Recorder | EntryRecorder,
    info: CollectionInfo,
    context_ids: Sequence[int],
    fed_ids: Sequence[int],
    *,
    task: str,
    question_type: str,
    length_tokens: int,
    sample: int,
    own_answer: "Sample | None" = None,
) -> Document:
    """Record one document.

    Args:
        context_ids: tokens to prefill.
        fed_ids: tokens fed as decode steps.
        own_answer: the sample whose answer the model goes on to decode behind ``fed_ids``; None: it ends with them.
    """
    chunk_tokens = min(
        DEFAULT_CHUNK_TOKENS, -(-len(context_ids) // loaded.shape.page_tokens) * loaded.shape.page_tokens
    )
    prompt = prefill(
        loaded, context_ids, collectors=recorder.listeners(loaded.shape.layers),
        chunk_tokens=max(chunk_tokens, loaded.shape.page_tokens),
    )  # fmt: skip
    records: list[StepRecord] = []
    own: list[int] = []
    pending = list(fed_ids)
    end = AnswerEnd(loaded, stop_strings=() if own_answer is None else own_answer.stop)
    reserve_tokens = len(fed_ids) + (0 if own_answer is None else own_answer.max_new_tokens - 1)
    with Session(loaded) as session:
        sequence = session.add(recorder.method, prompt, reserve_tokens=reserve_tokens).cache
        while pending:
            _, [best] = finite_tokens(session, session.step([pending.pop(0)]), step=len(records))
            records.append(recorder.take(sequence))
            if own_answer is None or pending:
                continue
            own.append(best)
            if end.reason(own, max_new_tokens=own_answer.max_new_tokens) is None:
                pending.append(own[-1])
        features = recorder.features(prompt, sequence)
        before = recorder.states_before(prompt, sequence)
        angles = recorder.angles(prompt, sequence, len(records))
    during = torch.stack([each.hidden_LM for each in records])
    counts = torch.tensor([len(each.values) for each in records])
    return Document(
        info=DocumentInfo(
            task=task,
            question_type=question_type,
            length_tokens=length_tokens,
            sample=sample,
            prompt_tokens=prompt.n_tokens,
            n_steps=len(records),
        ),
        features=features.to(STORED_DTYPE).cpu(),
        hidden=torch.cat([before.to(during.device), during]).to(STORED_DTYPE).cpu(),
        steps=torch.arange(len(records), dtype=torch.int32),
        segments=torch.zeros(len(records), dtype=torch.int32),  # one answer
        indptr=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int().cpu(),
        indices=torch.cat([each.chunks for each in records]).int().cpu(),
        voters=torch.cat([each.voters for each in records]).to(torch.int16).cpu(),
        values=torch.cat([each.values for each in records]).half().cpu(),
        rest=torch.stack([each.rest_V for each in records]).half().cpu(),
        mass=torch.stack([each.mass_M for each in records]).half().cpu(),
        queries=torch.stack([each.queries_LF for each in records]).to(STORED_DTYPE).cpu(),
        **angles,
        **token_tensors(prompt, [each.token_mass_LN for each in records], info, n_steps=len(records), sample=sample),
    )
