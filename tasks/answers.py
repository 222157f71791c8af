"""Where an answer ends, and how it is scored by the names the field uses. Every score is in [0, 1]."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from kvscope.tasks.base import contains_all_score

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def stop_index(text: str, stop: Sequence[str], *, before_text: bool = False) -> int | None:
    """Return where the first stop string begins in a text; None when there is none.

    White space before an answer is no answer yet, so a stop string of white space does not count there: a model that
    begins with a new line is judged by what follows. It does ``before_text``, as lm-eval has it.
    """
    blank = 0 if before_text else len(text) - len(text.lstrip())
    found = [text.find(string, max(0, blank - len(string) + 1)) for string in stop]
    return min((index for index in found if index >= 0), default=None)


def answer_of(text: str, stop: Sequence[str]) -> str:
    """Return what of a text is the answer: up to the first stop string, without white space around it."""
    return text[: stop_index(text, stop)].strip()


def contains_any_score(targets: Sequence[str], output: str) -> float:
    """RULER's ``string_match_part``: whether one of the targets is in the output, case ignored."""
    low = output.lower()
    return float(any(target.lower() in low for target in targets))


def exact_score(targets: Sequence[str], output: str) -> float:
    """SQuAD's exact match: whether the output is one of the targets, both normalized."""
    return float(normalized(output) in {normalized(target) for target in targets})


def f1_score(targets: Sequence[str], output: str) -> float:
    """SQuAD's F1: the best overlap in words of the output with one of the targets, both normalized."""
    return max(_overlap(normalized(target).split(), normalized(output).split()) for target in targets)


def _overlap(target: list[str], output: list[str]) -> float:
    common = sum((Counter(target) & Counter(output)).values())
    if not common:
        return float(target == output)
    return 2 * common / (len(target) + len(output))


def normalized(text: str) -> str:
    """Return a text as SQuAD compares it: lower case, without punctuation, articles and repeated spaces."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


METRICS: Mapping[str, Callable[[Sequence[str], str], float]] = {
    "string_match_all": contains_all_score,
    "string_match_any": contains_any_score,
    "exact_match": exact_score,
    "f1": f1_score,
}
