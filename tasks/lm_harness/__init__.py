"""kvscope's tasks as lm-eval tasks, so that the stock ``lm_eval`` command runs the same prompts.

The YAML files of this folder name the functions below. Lengths, samples and seed come from ``--metadata``; the
tokenizer from the model arguments. Prompts are the bytes that ``kvscope run`` uses for the same seed.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from kvscope.errors import UsageError
from kvscope.tasks.answers import answer_of
from kvscope.tasks.base import Tokenizer, contains_all_score
from kvscope.tasks.registry import create_task

FOLDER = Path(__file__).parent


@cache
def _tokenizer(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    made: Tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return made


def build(
    *,
    kvscope_task: str,
    length_tokens: int = 4096,
    samples: int = 20,
    seed: int = 0,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Return the documents of one task at one length, as lm-eval's ``custom_dataset`` wants them.

    Args:
        kvscope_task: registry name, from the YAML file.
        length_tokens: prompt and answer room together.
        samples: documents.
        seed: as ``kvscope run --seed``.
        tokenizer: name or folder; ``pretrained`` where absent. Both reach us through lm-eval's metadata.

    Raises:
        UsageError: neither tokenizer nor pretrained given, or a length the task cannot be built at.
    """
    from datasets import Dataset

    name = tokenizer or pretrained
    if not name:
        raise UsageError(
            f"{kvscope_task} builds prompts of an exact token length and so needs a tokenizer: pass pretrained= in "
            "--model_args, or tokenizer in --metadata."
        )
    task = create_task(kvscope_task)
    rows = []
    for index in range(samples):
        made = task.build(_tokenizer(str(name)), length_tokens=int(length_tokens), sample=index, seed=int(seed))
        rows.append(
            {
                "text": made.text,
                "targets": list(made.targets),
                "stop": list(made.stop),
                "question_type": made.question_type,
                "length_tokens": made.length_tokens,
                "depth": made.depth,
                "prompt_sha256": made.prompt_sha256,
            }
        )
    return {"test": Dataset.from_list(rows)}


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one answer: the share of the targets found (RULER's string_match_all)."""
    return {"recall": contains_all_score(doc["targets"], answer_of(results[0], doc["stop"]))}


def process_long_qa(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one answer of a long_qa task, as ``kvscope run`` does."""
    from kvscope.tasks.long_qa.score import score_answer

    return {"score": score_answer(doc["question_type"], doc["targets"], answer_of(results[0], doc["stop"]))}
