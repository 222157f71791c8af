"""The model's side of long_qa's guards: closed book near chance, evidence alone nearly perfect.

The dense model answers the very prompts that are evaluated, cut down twice: to instruction and question (nothing to
look up: what it still answers it guessed or was taught), and to instruction, evidence and question (nothing to look
for: what it misses it does not understand, and no cache method is to blame). The text's side of the guards needs no
model and is tested: ``kvscope.tasks.long_qa.guards``.

    kvscope backbone controls FOLDER --out controls.json -l 4k -l 16k -n 450
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvscope.harness.reference_model import attention
from kvscope.harness.reference_model.evaluate import prompts
from kvscope.results.statistics import mean_interval
from kvscope.tasks.answers import answer_of
from kvscope.tasks.base import Sample, Task
from kvscope.tasks.long_qa.guards import chance, closed_book_text, oracle_text
from kvscope.tasks.long_qa.questions import PLANNERS
from kvscope.tasks.registry import create_task

LEAST_ORACLE = 0.95


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, texts: Sequence[str], *, max_new_tokens: int, batch: int = 64) -> list[str]:
    """Answer prompts of unlike length greedily with the stock ``generate``: padded on the left, under stock masks."""
    batch = batch if attention.use_for_batches(model, padded=True) else 1
    found: list[str] = []
    for at in range(0, len(texts), batch):
        inputs = tokenizer(list(texts[at : at + batch]), padding=True, padding_side="left", return_tensors="pt")
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
        )
        found += tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def guessing(question_type: str) -> float:
    """Return what guessing earns; numbers, UUIDs and random names of the other tasks are never guessed."""
    return chance(question_type) if question_type in PLANNERS else 0.0


def score_control(
    control: str, task: Task, samples: Sequence[Sample], outputs: Sequence[str], *, left_out: frozenset[str]
) -> dict[str, Any]:
    """Score one control of one (task, length): by question type, and pooled over the types that count.

    ``passed``: closed book, guessing lies inside or above the 95 % interval; oracle, at least 95 %.

    Args:
        control: ``closed_book`` or ``oracle``.
        left_out: question types that no pooled score counts.
    """
    by_type: dict[str, list[float]] = defaultdict(list)
    for sample, output in zip(samples, outputs, strict=True):
        by_type[sample.question_type].append(task.score(sample, answer_of(output, sample.stop)))
    counted = [kind for kind in sorted(by_type) if kind not in left_out]

    def verdict(scores: Sequence[float], guessed: float) -> dict[str, Any]:
        found = mean_interval(list(scores))
        passed = found.mean >= LEAST_ORACLE if control == "oracle" else (found.low or found.mean) <= guessed
        values: dict[str, Any] = {"n": len(scores), "accuracy_percent": round(100 * found.mean, 2)}
        if control == "closed_book":
            values["chance_percent"] = round(100 * guessed, 2)
        return values | {"passed": passed}

    pooled = [score for kind in counted for score in by_type[kind]]
    expected = sum(guessing(kind) * len(by_type[kind]) for kind in counted) / max(1, len(pooled))
    row: dict[str, Any] = {
        "control": control,
        "task": task.name,
        "length_tokens": samples[0].length_tokens,
        "seed": samples[0].seed,
        "left_out": sorted(left_out & set(by_type)),
    }
    if pooled:
        row |= verdict(pooled, expected)
    return row | {"by_type": {kind: verdict(by_type[kind], guessing(kind)) for kind in sorted(by_type)}}


def run_controls(
    model: Any,
    tokenizer: Any,
    *,
    tasks: Sequence[str] = ("long_qa",),
    lengths_tokens: Sequence[int],
    samples: int,
    seed: int = 0,
    workers: int = 0,
    batch: int = 64,
    left_out: frozenset[tuple[str, str]] = frozenset(),
    note: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Return two rows a (task, length), see :func:`score_control`.

    Args:
        samples, seed: as in evaluation, so that a control is about the prompts that are scored.
        left_out: (task, question type) that no pooled score counts.
        note: given each row as soon as it is there.
    """
    texts: dict[str, Callable[[Sample], str]] = {
        "closed_book": closed_book_text,
        "oracle": lambda sample: oracle_text(sample, tokenizer),
    }
    jobs = [(task, length, i, seed) for task in tasks for length in lengths_tokens for i in range(samples)]
    made = (sample for sample, _ in prompts(tokenizer, jobs, workers=workers))
    rows = []
    for name in tasks:
        task, excluded = create_task(name), frozenset(kind for own, kind in left_out if own == name)
        for _ in lengths_tokens:
            cell = [next(made) for _ in range(samples)]
            for control, text in texts.items():
                given = answers(
                    model, tokenizer, [text(sample) for sample in cell], max_new_tokens=task.max_new_tokens, batch=batch
                )
                rows.append(score_control(control, task, cell, given, left_out=excluded))
                note(rows[-1])
    return rows
