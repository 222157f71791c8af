"""How an answer is scored, by the names the field uses. Every score is in [0, 1]."""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from kvscope.tasks.base import contains_all_score

_PUNCTUATION = str.maketrans("", "", string.punctuation)


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
