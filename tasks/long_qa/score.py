"""Scores of long_qa answers, in [0, 1].

Short answers: right where the expected word is in the answer and no other word of its category (another town, another
colour) stands before it; case, articles and punctuation are ignored. Letters must be exact. A list must name exactly
the expected words. A number is the first one that is not part of a date. ``mrcr`` is graded.
"""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from kvscope.tasks.long_qa.lexicon import MONTHS, category_of
from kvscope.tasks.long_qa.wording import NOT_MENTIONED

_WORD = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)*")
_NUMBER = re.compile(rf"\b(\d+)\b(?!\s*(?:{'|'.join(MONTHS)}))", re.IGNORECASE)
_DATE = re.compile(rf"\b\d+\s*(?:{'|'.join(MONTHS)})\b", re.IGNORECASE)
_LETTER = re.compile(r"(?<![A-Za-z])([A-D])(?![A-Za-z'])")


def score_answer(question_type: str, targets: Sequence[str], output: str) -> float:
    """Score one answer.

    Args:
        question_type: one of ``kvscope.tasks.long_qa.questions.PLANNERS``.
        targets: the answer's parts; the last one decides, of a list every one.
        output: the model's text.
    """
    final = targets[-1]
    if question_type == "mrcr":
        # Words, not letters: two different replies share half of their letters, but hardly a word.
        return SequenceMatcher(None, output.split(), final.split(), autojunk=False).ratio()
    if question_type == "abstention":
        return float(NOT_MENTIONED in " ".join(_WORD.findall(output.lower())))
    if question_type == "multiple_choice":
        found = _LETTER.search(output)
        return float(found is not None and found[1] == final)
    number = _NUMBER.match(final)
    if number is not None:
        said = _NUMBER.search(_DATE.sub("", output))
        return float(said is not None and said[1] == number[1])
    return _words_score(targets if question_type == "multi_session" else (final,), output)


def _words_score(targets: Sequence[str], output: str) -> float:
    """Compare the words of the targets' category in the output: all of them for a list, else the first."""
    categories = category_of()
    category = categories[targets[0].lower()]
    said = [word for word in _WORD.findall(output.lower()) if categories.get(word) == category]
    expected = [target.lower() for target in targets]
    if len(expected) == 1:
        return float(said[:1] == expected)
    return float(sorted(set(said)) == sorted(expected))
