"""Controls on long_qa: what guessing earns, the prompt without its haystack or with evidence alone, and a text check.

The model's side of them (closed book near chance, oracle evidence near perfect) runs on ``closed_book_text`` and
``oracle_text``; ``violations`` and ``recency_reader`` need no model.
"""

import re
from collections.abc import Iterable

from kvscope.tasks.base import Sample, Tokenizer
from kvscope.tasks.long_qa.lexicon import category_of, lexicon
from kvscope.tasks.long_qa.questions import COUNTS, LETTERS
from kvscope.tasks.long_qa.reader import Line, Reader, read
from kvscope.tasks.long_qa.task import TRIM_WORDS
from kvscope.tasks.long_qa.wording import ATTRIBUTES, CHANGING, TOPICS
from kvscope.tasks.long_qa.world import Fact


def _guess(categories: Iterable[str]) -> float:
    shares = [1 / len(lexicon("eval")[category]) for category in categories]
    return sum(shares) / len(shares)


def chance(question_type: str) -> float:
    """Return the score that guessing without the haystack can earn, in [0, 1].

    A guesser who knows evaluation's word lists is assumed. ``abstention`` is 1: who has seen nothing is right to say
    so. ``no_context`` is 1: the question holds its fact. A mean over types must be compared with the mean of these.
    """
    attribute = _guess(ATTRIBUTES.values())
    changing = _guess(ATTRIBUTES[slot] for slot in CHANGING)
    return {
        "single_fact": attribute,
        "assistant_fact": _guess(TOPICS.values()),
        "knowledge_update": changing,
        # One of two events; one of some thirty gaps (short ones are likelier: 1 day, 2 / 30); a value.
        "temporal": (1 / 2 + 2 / 30 + changing) / 3,
        # One of three counts; a list is never guessed.
        "multi_session": 1 / len(COUNTS) / 2,
        "hops_2": attribute,
        "hops_3": attribute,
        "abstention": 1.0,
        "multiple_choice": 1 / len(LETTERS),
        "no_context": 1.0,
        "mrcr": 0.0,
    }[question_type]


def question_text(sample: Sample) -> str:
    """Return a prompt's last line."""
    return sample.text.rsplit("\n", 1)[1]


def head_text(sample: Sample) -> str:
    """Return a prompt's instruction, newline included."""
    return sample.text.split("\n", 1)[0] + "\n"


def closed_book_text(sample: Sample) -> str:
    """Return the prompt without its haystack: instruction and question."""
    return head_text(sample) + question_text(sample)


def oracle_text(sample: Sample, tokenizer: Tokenizer) -> str:
    """Return the prompt with the evidence as its only haystack."""
    lines = [tokenizer.decode(sample.ids[start:end]) for start, end in sample.evidence_spans]
    return head_text(sample) + "".join(lines) + question_text(sample)


def haystack(sample: Sample) -> list[Line]:
    """Read the haystack; the padding line before the question is left out."""
    text = sample.text.removeprefix(head_text(sample)).removesuffix(question_text(sample))
    lines = list(read(text))
    if lines and not lines[-1].known and set(lines[-1].text.split()) <= {*TRIM_WORDS, "a"}:
        lines.pop()
    return lines


def recency_reader(sample: Sample, tokenizer: Tokenizer, *, keep_tokens: int) -> Reader:
    """Return a reader of the last ``keep_tokens`` prompt tokens alone, for the answer they allow."""
    kept = tokenizer.decode(sample.ids[-keep_tokens:]).removesuffix(question_text(sample))
    # The first line is cut somewhere.
    return Reader([line.fact for line in read(kept.split("\n", 1)[-1]) if line.fact is not None])


def violations(sample: Sample, tokenizer: Tokenizer) -> list[str]:
    """Return what is wrong with a sample's text; nothing, for a good one.

    Checked: every line is in evaluation's wording; the reader's answer from the whole haystack and from the evidence
    alone are the expected one; no fact contradicts another; the answer stands in the evidence alone (choices aside).
    """
    lines = haystack(sample)
    problems = [f"unknown line {line.text!r}" for line in lines if not line.known]
    facts = [line.fact for line in lines if line.fact is not None]
    question = question_text(sample)
    if Reader(facts).answer(question) != sample.targets:
        problems.append(f"the haystack says {Reader(facts).answer(question)}, expected {sample.targets}")
    evidence = [tokenizer.decode(sample.ids[start:end]) for start, end in sample.evidence_spans]
    shown = [line.fact for text in evidence for line in read(text) if line.fact is not None]
    told = Reader(shown).answer(question) if shown else None
    if sample.question_type == "mrcr":
        told = (shown[0].value,)
    if shown and told != sample.targets:
        problems.append(f"the evidence says {told}, expected {sample.targets}")
    return problems + contradictions(facts) + _leaks(sample, lines, evidence)


def contradictions(facts: Iterable[Fact]) -> list[str]:
    """Return every fact that denies an earlier one without being told as a change."""
    holds: dict[tuple[str, str], str] = {}
    problems: list[str] = []
    for fact in facts:
        if fact.kind in ("visit", "trip", "reply"):
            continue
        if (
            fact.kind in ("attribute", "relation", "appointment", "advice")
            and holds.get(fact.key, fact.value) != fact.value
        ):
            problems.append(f"{fact} after {holds[fact.key]!r}")
        holds[fact.key] = fact.value
    return problems


def _leaks(sample: Sample, lines: Iterable[Line], evidence: Iterable[str]) -> list[str]:
    """Return the lines outside the evidence that hold the answer."""
    finals = sample.targets if sample.question_type == "multi_session" else sample.targets[-1:]
    if sample.question_type == "multiple_choice":
        finals = sample.targets[:1]
    words = [word for word in finals if word.lower() in category_of()]
    shown = set(evidence)
    return [
        f"{word!r} outside the evidence: {line.text!r}"
        for line in lines
        for word in words
        if line.text not in shown and re.search(rf"\b{word}\b", line.text, re.IGNORECASE)
    ]
