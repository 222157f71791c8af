"""Training wording put together from parts: hundreds of sentences for each thing that can be said or asked.

With five or six fixed sentences a fact, the model learned where in each of them the answer stands, and read
evaluation's ``always eats up the figs`` as the dish ``up``. Here fillers and word order vary around the cue words, so that what
remains is the task: to find the word that is none of the sentence's own. No sentence holds one of evaluation's or is
part of one (``barred``; a test holds this).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from kvscope.harness.reference_model.documents_long_qa_templates import TRAIN_WORDING
from kvscope.harness.reference_model.wording_parts import FACTS, PARTS
from kvscope.harness.reference_model.wording_questions import QUESTIONS
from kvscope.tasks.draws import Draws
from kvscope.tasks.long_qa.render import capital
from kvscope.tasks.long_qa.templates import EVAL_WORDING
from kvscope.tasks.long_qa.wording import Wording

# Sentences kept for each list of patterns.
SENTENCES = 240
# A list whose patterns allow no more ends after so many sentences in a row that are known or barred.
_TRIES = 200
_PART = re.compile(r"<(\w+)>")
_ALTERNATIVES = re.compile(r"<([^<>]*)>")
_BEGINNING = re.compile(r"(Assistant: |[.?] |\{q\} )([a-z])")
_SPACES = (("  ", " "), (" ,", ","), (" .", "."), (" ?", "?"), (" :", ":"), (" ;", ";"), ("\n ", "\n"))


def expand(pattern: str, draws: Draws) -> str:
    """Return one sentence of a pattern: ``<a|b|>`` is one of its alternatives, ``<name>`` one of the part's.

    Inner brackets are drawn first; spaces that an empty alternative leaves double are made one.
    """
    pattern = _PART.sub(lambda found: f"<{PARTS.get(found[1], found[1])}>", pattern)
    while (match := _ALTERNATIVES.search(pattern)) is not None:
        pattern = pattern[: match.start()] + draws.pick(match[1].split("|")) + pattern[match.end() :]
    for wrong, right in _SPACES:
        while wrong in pattern:
            pattern = pattern.replace(wrong, right)
    return _BEGINNING.sub(lambda found: found[1] + found[2].upper(), pattern.strip(" "))


def _bare(text: str) -> str:
    return text.strip().rstrip(".?!").lower()


@cache
def _evaluation() -> tuple[str, ...]:
    """Return evaluation's sentences without full stop, request and reply apart; a single word is none."""
    halves = [half for text in EVAL_WORDING.strings() for half in text.split("\nAssistant: ")]
    return tuple(text for text in map(_bare, halves) if "{" in text and text.count(" ") >= 1)


def barred(sentence: str) -> bool:
    """Return whether one of a sentence's lines holds a sentence of evaluation, or is held by one."""
    for line in sentence.split("\nAssistant: "):
        own = _bare(line)
        if any(theirs in own or (own in theirs and own.count(" ") >= 3) for theirs in _evaluation()):
            return True
    return False


def _sentences(name: str, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return up to SENTENCES different ones, every pattern as often as another."""
    draws = Draws("composed wording", name)
    found: dict[str, None] = {}
    tried = missed = 0
    while len(found) < SENTENCES and missed < _TRIES:
        sentence = expand(patterns[tried % len(patterns)], draws)
        # Clauses stand in the middle of a sentence, and a line's beginning is made upper case when it is written.
        if name.split()[0] in (*QUESTIONS, "heads", "small_talk"):
            sentence = capital(sentence)
        tried += 1
        if sentence in found or barred(sentence):
            missed += 1
        else:
            missed = 0
            found[sentence] = None
    return tuple(found)


@cache
def composed_wording() -> Wording:
    """Return the wording; what no pattern is given for (headers, requests) is TRAIN_WORDING's."""
    made: dict[str, Any] = {}
    for field, patterns in {**FACTS, **QUESTIONS}.items():
        if isinstance(patterns, dict):
            made[field] = {slot: _sentences(f"{field} {slot}", part) for slot, part in patterns.items()}
        else:
            made[field] = _sentences(field, patterns)
    for field in ("heads", "small_talk"):
        made[field] = (*getattr(TRAIN_WORDING, field), *made[field])
    return replace(TRAIN_WORDING, **made)
