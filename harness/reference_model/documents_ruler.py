"""Training documents for vt, cwe and fwe, from training words, training wording and the row's own seed.

vt rows hold many chains and ask them one by one. cwe and fwe rows hold one list and one question: a second question
about the same list would be answered by copying the first answer.
"""

from collections.abc import Callable, Sequence
from functools import cache

from kvscope.harness.reference_model.documents import Document, Question
from kvscope.harness.reference_model.templates import FILLERS
from kvscope.harness.reference_model.templates_ruler import (
    CHAIN_FORMS,
    CHAIN_HEADS,
    CHAIN_QUESTIONS,
    CODED_HEADS,
    CODED_QUESTIONS_MANY,
    CODED_QUESTIONS_ONE,
    COMMON_HEADS,
    COMMON_QUESTIONS,
    COPY_QUESTIONS,
    MORE_TAGS,
    TAGGED_FORMS,
    TAGS,
    VALUE_QUESTIONS,
    coded_word,
    composed_question,
    name,
    random_text,
    static_text,
)
from kvscope.tasks.draws import Draws
from kvscope.tasks.words import words

__all__ = ["coded_words", "common_words", "random_text", "static_text", "variable_chains"]

Count = Callable[[str], int]
_MOST_HOPS = 6
_FILLER_LINES = 400
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# A list is rebuilt, aiming at one share of the room, until it is close.
_AIM, _CLOSE, _MOST_TRIES = 0.985, 0.97, 4


def variable_chains(
    draws: Draws, *, room_tokens: int, n_questions: int, count: Count, composed: bool = True
) -> Document:
    """Chains of one to six hops among filler, each asked for its names (see DocumentMaker).

    Args:
        composed: ask in wordings put together from parts, too. The first phases were trained without.
    """
    if composed:
        tag = draws.pick(TAGS if draws.unit() < 0.7 else MORE_TAGS)
        form = draws.pick(CHAIN_FORMS if draws.unit() < 0.75 else TAGGED_FORMS) if draws.unit() < 0.8 else None
    else:
        tag = draws.pick(TAGS)
        form = draws.pick(CHAIN_FORMS) if draws.unit() < 0.8 else None
    letters = 5 if draws.unit() < 0.7 else draws.between(3, 7)
    digits = 5 if draws.unit() < 0.7 else draws.between(4, 7)
    hops = draws.between(1, _MOST_HOPS) if draws.unit() < 0.4 else None
    lines, room = _with_head(draws, CHAIN_HEADS, room_tokens, count, tag=tag)

    # From two chains to as many as fill the haystack, each order of magnitude as often.
    chain_room = max(room * draws.unit() ** 2 * (1.0 if draws.unit() < 0.3 else 0.5), min(room, 120))
    taken = set(TAGS)
    chains: list[tuple[str, list[str]]] = []
    placed: list[tuple[float, int, str]] = []
    while True:
        names, value = [], ""
        for _ in range(1 + (hops if hops is not None else draws.between(1, _MOST_HOPS))):
            names.append(_fresh(taken, lambda: name(draws, letters)))
        value = _fresh(taken, lambda: draws.digits(digits))
        said = _statements(draws, form, tag, names, value)
        size = sum(map(count, said))
        if size > chain_room and len(chains) >= 2:
            break
        if size > room:
            break
        room -= size
        chain_room -= size
        at = _places(draws, len(said))
        placed += [(depth, len(placed) + i, line) for i, (depth, line) in enumerate(zip(at, said, strict=True))]
        chains.append((value, names))
    body = _fill(draws, [line for _, _, line in sorted(placed)], [depth for depth, _, _ in sorted(placed)], room, count)
    return Document(lines + body, _chain_questions(draws, chains, tag, n_questions, composed))


def _fresh(taken: set[str], make: Callable[[], str]) -> str:
    while (made := make()) in taken:
        pass
    taken.add(made)
    return made


def _statements(draws: Draws, form: tuple[str, str] | None, tag: str, names: Sequence[str], value: str) -> list[str]:
    said = []
    for i, new in enumerate(names):
        give, copy = form or draws.pick(CHAIN_FORMS)
        old = names[i - 1]
        said.append(give.format(tag=tag, x=new, v=value) if i == 0 else copy.format(tag=tag, x=new, y=old))
    return said


def _places(draws: Draws, n: int) -> list[float]:
    """Return ascending depths: over the whole haystack, or for a third of the chains within a part of it."""
    low, width = 0.0, 1.0
    if draws.unit() < 0.35:
        width = draws.unit() ** 2
        low = draws.unit() * (1 - width)
    return sorted(low + width * draws.unit() for _ in range(n))


def _chain_questions(
    draws: Draws, chains: Sequence[tuple[str, list[str]]], tag: str, n_questions: int, composed: bool
) -> list[Question]:
    """Ask for whole chains, and with the rest of the questions for single steps of them, in random order."""
    asked = list(chains)
    draws.shuffle(asked)
    asked = asked[: n_questions - int(n_questions * 0.3)]
    questions = [
        _question(
            composed_question(draws) if composed and draws.unit() < 0.7 else draws.pick(CHAIN_QUESTIONS),
            ", ".join(names),
            tag=tag,
            v=value,
            n=str(len(names)),
        )
        for value, names in asked
    ]
    steps: set[tuple[str, str]] = set()
    for _ in range(n_questions - len(questions) if chains else 0):
        value, names = draws.pick(chains)
        at = 0 if composed else draws.between(1, len(names) - 1)
        kind = "copy" if draws.unit() < 0.5 else "value"
        if composed:  # the value behind many copies cannot be told in one step
            at = draws.between(1, len(names) - 1) if kind == "copy" else 1
        pair = draws.pick(COPY_QUESTIONS if kind == "copy" else VALUE_QUESTIONS)
        if (kind, names[at]) not in steps:
            steps.add((kind, names[at]))
            questions.append(_question(pair, names[at - 1] if kind == "copy" else value, x=names[at]))
    draws.shuffle(questions)
    return questions


def common_words(draws: Draws, *, room_tokens: int, n_questions: int, count: Count) -> Document:
    """A list in which two to ten words are repeated more than the rest (see DocumentMaker)."""
    lines, room = _with_head(draws, COMMON_HEADS, room_tokens, count)
    item, between, a_line = draws.pick(_LIST_FORMS)
    n_common = 10 if draws.unit() < 0.4 else draws.between(2, 10)
    seldom = draws.between(1, 4)
    often = seldom * draws.between(3, 12)
    pool = _train_words(draws)
    common, uncommon = pool[:n_common], pool[n_common:]

    def listed(n_entries: int) -> list[str]:
        # Half of the list at least is uncommon, and there is something to be told from in the shortest one.
        repeats = max(2, min(often, n_entries // (2 * n_common)))
        rare = min(seldom, max(1, repeats // 3))
        rest = max(n_entries - repeats * n_common, 0)
        # More entries than there are words: all of them come more often, and so do the common ones.
        scale = -(-rest // (rare * len(uncommon)))
        rare, repeats = rare * max(scale, 1), repeats * max(scale, 1)
        rest = max(n_entries - repeats * n_common, 0)
        entries = [word for word in common for _ in range(repeats)]
        entries += [uncommon[i // rare] for i in range(rest)]
        draws.shuffle(entries)
        parts = [item.format(i=i, w=word) for i, word in enumerate(entries, start=1)]
        return [between.join(parts[i : i + a_line]) + "\n" for i in range(0, len(parts), a_line)]

    body = _fitting(listed, room, count, least=2 * n_common + 2)
    if n_questions < 1 or not body:
        return Document(lines + body, [])
    # In the order in which they first stand in the text: a fixed order is a learnable target.
    seen = dict.fromkeys(word for line in body for word in line.replace(",", " ").split())
    spoken = [word for word in seen if word in set(common)]
    pair = draws.pick(COMMON_QUESTIONS)
    return Document(lines + body, [_question(pair, ", ".join(spoken), n=_number(draws, n_common))])


# (one entry, what stands between two, entries a line)
_LIST_FORMS = (
    ("{i}. {w}", " ", 10),
    ("{i}. {w}", " ", 10),
    ("{i}. {w}", " ", 25),
    ("{i}. {w}", "", 1),
    ("{i}) {w}", " ", 10),
    ("{w}", " ", 12),
    ("{w}", ", ", 12),
)


def _train_words(draws: Draws) -> list[str]:
    lists = words("train")
    pool = [*lists.adjectives, *lists.nouns]
    draws.shuffle(pool)
    return pool


def coded_words(draws: Draws, *, room_tokens: int, n_questions: int, count: Count) -> Document:
    """Code words whose counts fall by a power law, asked for the most frequent ones (see DocumentMaker)."""
    lines, room = _with_head(draws, CODED_HEADS, room_tokens, count)
    letters = 6 if draws.unit() < 0.7 else draws.between(4, 8)
    alpha = 2.0 if draws.unit() < 0.5 else 1.5 + draws.unit()
    gap = "..." if draws.unit() < 0.7 else draws.pick(("--", "***", "..", "____"))
    asked = 3 if draws.unit() < 0.5 else draws.between(1, 5)
    vocabulary: dict[str, None] = {}
    while len(vocabulary) < 1000:
        vocabulary[coded_word(draws, letters)] = None
    ranked = [gap, *vocabulary]

    def counts(size: int) -> list[int]:
        """Return how often each rank stands; its first is the gap. Falls to zero at the end."""
        found = []
        for rank in range(1, len(ranked) + 1):
            times = int(size / (1.6 * rank**alpha))
            if not times:
                break
            found.append(times)
        return found

    def text(size: int) -> list[str]:
        flat = [word for word, times in zip(ranked, counts(size), strict=False) for _ in range(times)]
        draws.shuffle(flat)
        return [" ".join(flat[i : i + 20]) + "\n" for i in range(0, len(flat), 20)]

    body = _fitting(text, room, count, least=12)
    said = " ".join(body).split()
    tally = sorted(((said.count(word), word) for word in ranked[1 : asked + 2]), reverse=True)
    # Only as many as can be told apart by their counts.
    clear = 0
    while clear < asked and clear + 1 < len(tally) and tally[clear][0] > tally[clear + 1][0]:
        clear += 1
    if n_questions < 1 or not clear:
        return Document(lines + body, [])
    pair = draws.pick(CODED_QUESTIONS_ONE if clear == 1 else CODED_QUESTIONS_MANY)
    answer = ", ".join(word for _, word in tally[:clear])
    return Document(lines + body, [_question(pair, answer, n=_number(draws, clear))])


def _number(draws: Draws, n: int) -> str:
    return str(n) if draws.unit() < 0.5 else _NUMBERS[n]


def _question(pair: tuple[str, str], answer: str, **fill: str) -> Question:
    return Question(prompt=(pair[0] + pair[1]).format(**fill), answer=" " + answer)


def _with_head(draws: Draws, heads: Sequence[str], room: int, count: Count, **fill: str) -> tuple[list[str], int]:
    """Return the opening lines, none for a fifth of the documents, and the room left."""
    if draws.unit() < 0.2:
        return [], room
    head = draws.pick(heads).format(**fill)
    return [head], room - count(head)


def _fitting(make: Callable[[int], list[str]], room: int, count: Count, *, least: int) -> list[str]:
    """Return lines that take at most ``room`` tokens and nearly as many; none where not even the least size fits."""
    size, taken = 64, sum(map(count, make(64)))
    best: list[str] = []
    best_taken = 0
    for _ in range(_MOST_TRIES):
        size = max(int(_AIM * room * size / taken), least)
        lines = make(size)
        taken = sum(map(count, lines))
        if best_taken < taken <= room:
            best, best_taken = lines, taken
        if _CLOSE * room <= taken <= room or (size == least and taken > room):
            break
    return best


@cache
def _filler_lines() -> tuple[str, ...]:
    """Return lines of one to three training sentences."""
    draws = Draws("ruler-filler")
    lists = words("train")

    def sentence() -> str:
        fill = {"a": draws.pick(lists.adjectives), "b": draws.pick(lists.adjectives)}
        return draws.pick(FILLERS).format(noun=draws.pick(lists.nouns), noun2=draws.pick(lists.nouns), **fill)

    return tuple(" ".join(sentence() for _ in range(draws.between(1, 3))) + "\n" for _ in range(_FILLER_LINES))


def _fill(draws: Draws, lines: Sequence[str], depths: Sequence[float], room: int, count: Count) -> list[str]:
    """Put filler among ``lines`` until the room is used, each line at its depth."""
    bank = _filler_lines()
    same = draws.pick(bank) if draws.unit() < 0.5 else None
    fillers: list[str] = []
    shortest = min(bank, key=len)
    while True:
        filler = same or draws.pick(bank)
        size = count(filler)
        if size > room:
            filler = shortest
            size = count(filler)
            if size > room:
                break
        room -= size
        fillers.append(filler)
    out: list[str] = []
    done = 0
    for line, depth in zip(lines, depths, strict=True):
        before = int(depth * (len(fillers) + 1))
        out += fillers[done:before]
        done = max(done, before)
        out.append(line)
    return out + fillers[done:]
