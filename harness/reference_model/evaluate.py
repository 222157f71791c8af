"""Dense accuracy of a checkpoint through the text interface, in batches, with the stock ``generate``.

This is the figure the model card quotes. It shares no code with kvscope's own engine, so it checks that, too.
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvscope.errors import UsageError
from kvscope.harness.reference_model import attention
from kvscope.tasks.answers import answer_of
from kvscope.tasks.base import Sample
from kvscope.tasks.registry import create_task

NIAH = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "niah_multivalue", "niah_multiquery")
_STATE: dict[str, Any] = {}


def _build(job: tuple[str, int, int, int]) -> tuple[Sample, list[int]]:
    task, length, sample, seed = job
    if task not in _STATE:
        _STATE[task] = create_task(task)
    tokenizer = _STATE["tokenizer"]
    made: Sample = _STATE[task].build(tokenizer, length_tokens=length, sample=sample, seed=seed)
    text = tokenizer.decode(made.ids[made.question_start :]) if _STATE["closed_book"] else made.text
    return made, tokenizer(text)["input_ids"]


def prompts(
    tokenizer: Any, jobs: Sequence[tuple[str, int, int, int]], *, workers: int, closed_book: bool = False
) -> Iterator[tuple[Sample, list[int]]]:
    """Build samples and encode their texts in order, ahead of their use.

    Encoding is the workers', too: 200 prompts of 32K tokens take one process longer than the GPU.
    """
    _STATE.update(tokenizer=tokenizer, closed_book=closed_book)
    if workers == 0:
        yield from map(_build, jobs)
        return
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(_build, jobs, chunksize=2)


@torch.inference_mode()
def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    tasks: Sequence[str] = NIAH,
    lengths_tokens: Sequence[int],
    samples: int,
    seed: int,
    workers: int = 0,
    batch_tokens: int = 524_288,
    closed_book: bool = False,
    max_seconds: float | None = None,
    note: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Score every (task, length) cell; returns one row a cell with n, accuracy (also by question type) and seconds.

    ``closed_book`` keeps the prompt's question and drops the haystack: accuracy must fall to chance. ``max_seconds``:
    no cell is begun past this age; the rows done are returned. ``note`` is given each row as soon as it is there.
    """
    # Prompts of one cell have one length. Closed book they do not.
    may_pad = attention.use_for_batches(model, padded=closed_book)
    cells = [(task, length) for task in tasks for length in lengths_tokens]
    jobs = [(task, length, i, seed) for task, length in cells for i in range(samples)]
    made = prompts(tokenizer, jobs, workers=workers, closed_book=closed_book)
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    for task_name, length in cells:
        start = time.perf_counter()
        if max_seconds is not None and start - began > max_seconds:
            break
        task, scores, types = create_task(task_name), list[float](), list[str]()
        size = max(1, min(samples, batch_tokens // length)) if may_pad or not closed_book else 1
        while len(scores) < samples:
            built = [next(made) for _ in range(min(size, samples - len(scores)))]
            batch = [sample for sample, _ in built]
            # Only closed-book questions differ in length, and are padded.
            inputs = tokenizer.pad({"input_ids": [ids for _, ids in built]}, return_tensors="pt").to(model.device)
            out = model.generate(
                **inputs, do_sample=False, max_new_tokens=batch[0].max_new_tokens, pad_token_id=tokenizer.pad_token_id
            )
            answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            scores += [task.score(s, answer_of(a, s.stop)) for s, a in zip(batch, answers, strict=True)]
            types += [s.question_type for s in batch]
        rows.append(
            {
                "task": task_name,
                "length_tokens": length,
                "samples": samples,
                "seed": seed,
                "closed_book": closed_book,
                "accuracy_percent": round(100 * sum(scores) / len(scores), 2),
                "accuracy_percent_by_type": _by_type(types, scores),
                "seconds": round(time.perf_counter() - start, 2),
            }
        )
        note(rows[-1])
    return rows


def _by_type(types: Sequence[str], scores: Sequence[float]) -> dict[str, float]:
    return {
        kind: round(100 * sum(s for s, t in zip(scores, types, strict=True) if t == kind) / types.count(kind), 2)
        for kind in sorted(set(types))
    }


def load_checkpoint(folder: Path) -> tuple[Any, Any]:
    """Load (model, tokenizer) of a checkpoint folder for evaluation: bfloat16 on a GPU where there is one.

    Raises:
        UsageError: the folder holds no model.
    """
    cuda = torch.cuda.is_available()
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is no model folder: it has no config.json.")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if cuda else torch.float32, trust_remote_code=False
    )
    return model.to("cuda" if cuda else "cpu").eval(), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
