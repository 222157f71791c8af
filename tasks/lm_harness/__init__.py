"""kvscope's tasks as lm-eval tasks, so that the stock ``lm_eval`` command runs the same prompts.

The YAML files of this folder name the functions below. Lengths, samples and seed come from ``--metadata``; the
tokenizer from the model arguments. Prompts are the bytes that ``kvscope run`` uses for the same seed.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from kvscope.errors import UsageError, shown
from kvscope.tasks.answers import answer_of
from kvscope.tasks.base import Tokenizer, contains_all_score
from kvscope.tasks.registry import create_task
from kvscope.units import Tokens
from kvscope.values import BadValue, read_value

FOLDER = Path(__file__).parent
_SLIPS = {
    **dict.fromkeys(("length", "lengths", "lengths_tokens", "length_token", "max_length_tokens"), "length_tokens"),
    **dict.fromkeys(("sample", "n_samples", "num_samples"), "samples"),
    "seeds": "seed",
}
"""Keys of metadata that mean one of ours; all others may be of the model's arguments, or of other tasks."""


@cache
def _tokenizer(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    if not Path(name).is_dir() and "/" not in name:
        # One of kvscope's own names, or a slip: transformers would look for it on the hub, for minutes.
        raise UsageError(
            f"There is no folder {shown(name)} with a tokenizer: give tokenizer=FOLDER, or an id (owner/name), in "
            "--model_args or --metadata."
        )
    made: Tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return made


def build(
    *,
    kvscope_task: str,
    length_tokens: int | str = 4096,
    samples: int | str = 20,
    seed: int | str = 0,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **others: Any,
) -> dict[str, Any]:
    """Return the documents of one task at one length, as lm-eval's ``custom_dataset`` wants them.

    Args:
        kvscope_task: registry name, from the YAML file.
        length_tokens: prompt and answer room together, as 4096 or 4k.
        samples: documents.
        seed: as ``kvscope run --seed``.
        tokenizer: name or folder; ``pretrained`` where absent. Both reach us through lm-eval's metadata.

    Raises:
        UsageError: neither tokenizer nor pretrained given, a value or key that is none, or a length the task cannot be
            built at.
    """
    from datasets import Dataset

    for key in others:
        if key in _SLIPS:
            raise UsageError(f"{kvscope_task} has no {key!r} in --metadata: write {_SLIPS[key]!r}.")
    length = _number("length_tokens", length_tokens, Tokens)
    n_samples, first_seed = _number("samples", samples, int), _number("seed", seed, int)
    if n_samples < 1:
        raise UsageError(f"samples of --metadata is {n_samples}, expected 1 at least.")
    name = tokenizer or pretrained
    if not name:
        raise UsageError(
            f"{kvscope_task} builds prompts of an exact token length and so needs a tokenizer: pass pretrained= in "
            "--model_args, or tokenizer in --metadata."
        )
    task = create_task(kvscope_task)
    rows = []
    for index in range(n_samples):
        made = task.build(_tokenizer(str(name)), length_tokens=length, sample=index, seed=first_seed)
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


def _number(key: str, value: Any, kind: Any) -> int:
    try:
        return int(read_value(kind, value))
    except BadValue as error:
        raise UsageError(
            f"{key} of --metadata is {shown(value)}, expected one number ({error}): give a call for each length."
            if key == "length_tokens"
            else f"{key} of --metadata is {shown(value)}, expected a whole number."
        ) from error


def process_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one answer: the share of the targets found (RULER's string_match_all)."""
    return {"recall": contains_all_score(doc["targets"], answer_of(results[0], doc["stop"]))}


def process_long_qa(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score one answer of a long_qa task, as ``kvscope run`` does."""
    from kvscope.tasks.long_qa.score import score_answer

    return {"score": score_answer(doc["question_type"], doc["targets"], answer_of(results[0], doc["stop"]))}
