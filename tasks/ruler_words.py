"""Common and frequent words extraction after RULER (arXiv 2404.06654, appendix B).

cwe: ten common words among many uncommon ones in a numbered list; the number of uncommon words grows with the length.
fwe: coded words whose counts follow a zeta law; the answer is ranks two to four, rank one being dots. Other than in
RULER, lists are shuffled anew for every sample (not by one fixed seed), lengths are exact, and no in-context example is
given. Both ask for every part of the text, so a sample's depth is near 0.5 whatever its seed.
"""

import math
import re
import string
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from kvscope.tasks.base import Sample, Task, Tokenizer, contains_all_score
from kvscope.tasks.counted import Body, assemble_counted
from kvscope.tasks.draws import Draws
from kvscope.tasks.needle import TRIM_WORDS
from kvscope.tasks.words import words

_STEP_TOKENS = 64

CWE_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
CWE_TAIL = (
    "Question: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often in "
    "the list are:"
)
COMMON_WORDS = 10
# From this length on RULER repeats words 30 and 3 times, below it 6 times and once.
LONG_TOKENS = 4096
LONG_REPEATS, SHORT_REPEATS = (30, 3), (6, 1)
ENTRIES_A_LINE = 10

FWE_HEAD = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words.\n"
)
FWE_TAIL = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
    "appeared words are:"
)
DOTS = "..."
CODED_LETTERS = 6
CODED_VOCABULARY = 2000
ANSWER_RANKS = (2, 3, 4)
WORDS_A_LINE = 20
# The zeta law's exponent is 2.0, RULER's alpha.
_ZETA_2 = math.pi**2 / 6
# Fewest drawn words: ranks 4 and 5 then stand five and three times.
FWE_LEAST = 150
# Words differ in tokens, and those that stand often decide: the smallest length is that of the longest of these draws.
_PROBES: tuple[tuple[int, ...], ...] = ((), *((k,) for k in range(1, 12)))


class _CountingTask(Task):
    """What cwe and fwe share: every occurrence of a target is evidence, the score is the share of targets named."""

    source = "RULER, arXiv 2404.06654, appendix B"
    head: str
    tail: str

    def __init__(self, name: str, *, question_type: str, new_tokens: int) -> None:
        self.name = name
        self.max_new_tokens = new_tokens
        self.question_types = (question_type,)

    def _sample(
        self,
        tokenizer: Tokenizer,
        *,
        length_tokens: int,
        sample: int,
        seed: int,
        body: Callable[[int], Body],
        least: int,
        trim_words: Sequence[str],
        targets: Sequence[str],
    ) -> Sample:
        made = assemble_counted(
            tokenizer,
            what=f"{self.name} at length {length_tokens}",
            head=self.head,
            body=body,
            least=least,
            trim_words=trim_words,
            tail=self.tail,
            prompt_tokens=length_tokens - self.max_new_tokens,
        )
        return made.sample(
            self,
            question_type=self.question_types[0],
            length_tokens=length_tokens,
            sample=sample,
            seed=seed,
            evidence=made.line_spans,
            targets=targets,
            stop=(),
        )

    def _needed(self, tokenizer: Tokenizer, bodies: Iterable[Body]) -> int:
        """Return the tokens the longest of some smallest bodies asks for, a fifth more for words that take more yet."""
        texts = [self.head + "".join(" ".join(line) + "\n" for line in body.lines) + self.tail for body in bodies]
        tokens = 6 * max(len(ids) for ids in tokenizer(texts, add_special_tokens=True)["input_ids"]) // 5
        return self.max_new_tokens + -(-tokens // _STEP_TOKENS) * _STEP_TOKENS

    def score(self, sample: Sample, output: str) -> float:
        """Share of the words found in the output (RULER's string_match_all)."""
        return contains_all_score(sample.targets, output)


@lru_cache(maxsize=2)
def _compounds() -> tuple[str, ...]:
    """Return the evaluation split's adjective-noun pairs, for lists longer than its single words reach."""
    lists = words("eval")
    return tuple(f"{adjective}-{noun}" for adjective in lists.adjectives for noun in lists.nouns)


class CommonWordsTask(_CountingTask):
    """RULER's cwe. The words are the evaluation split's; lists too long for them take adjective-noun pairs as well."""

    head, tail = CWE_HEAD, CWE_TAIL

    def __init__(self, name: str) -> None:
        super().__init__(name, question_type="common_words", new_tokens=120)

    def min_length_tokens(self, tokenizer: Tokenizer) -> int:
        """Return the length that a list with as many uncommon words as common ones needs."""
        drawn = [self._words(Draws("min", self.name, *parts), 200) for parts in _PROBES]
        needed = {
            repeats: self._needed(
                tokenizer,
                (self._body(Draws("min"), *each, repeats, self._least(repeats)) for each in drawn),
            )
            for repeats in (SHORT_REPEATS, LONG_REPEATS)
        }
        # From LONG_TOKENS on the longer list must fit; a tokenizer it does not fit for there starts further up.
        if needed[LONG_REPEATS] > LONG_TOKENS:
            return needed[LONG_REPEATS]
        return needed[SHORT_REPEATS]

    def _least(self, repeats: tuple[int, int]) -> int:
        return COMMON_WORDS * repeats[1]

    def _words(self, draws: Draws, wanted: int) -> tuple[list[str], list[str]]:
        """Return ten common words and at least ``wanted`` uncommon ones, all different, in random order.

        No common word stands inside another word: the score looks for substrings.
        """
        lists = words("eval")
        pool = [*lists.adjectives, *lists.nouns]
        draws.shuffle(pool)
        if wanted + 2 * COMMON_WORDS > len(pool):
            pairs, taken = _compounds(), set[str]()
            # A tenth more: those that hold a common word will be left out.
            while len(taken) < 1.1 * (wanted + 2 * COMMON_WORDS) - len(pool):
                pair = draws.pick(pairs)
                if pair not in taken:
                    taken.add(pair)
                    pool.append(pair)
            draws.shuffle(pool)
        common: list[str] = []
        for word in pool:
            if not any(word in other or other in word for other in common):
                common.append(word)
            if len(common) == COMMON_WORDS:
                break
        barred = re.compile("|".join(map(re.escape, common)))
        uncommon = [word for word in pool if not barred.search(word)]
        return common, uncommon

    def _body(
        self, draws: Draws, common: Sequence[str], uncommon: Sequence[str], repeats: tuple[int, int], size: int
    ) -> Body:
        """Return a list with ``size`` entries of uncommon words; the last of them may be cut short of its repeats."""
        often, seldom = repeats
        entries = [word for word in common for _ in range(often)]
        entries += [uncommon[i // seldom] for i in range(size)]
        draws.shuffle(entries)
        flat = [part for i, word in enumerate(entries, start=1) for part in (f"{i}.", word)]
        step = 2 * ENTRIES_A_LINE
        return Body([flat[i : i + step] for i in range(0, len(flat), step)], frozenset(common))

    def build(self, tokenizer: Tokenizer, *, length_tokens: int, sample: int, seed: int) -> Sample:
        """Build one sample (see Task.build)."""
        repeats = LONG_REPEATS if length_tokens >= LONG_TOKENS else SHORT_REPEATS
        # An entry is a number, a full stop and a word: at least three tokens.
        wanted = length_tokens // (3 * repeats[1])
        common, uncommon = self._words(Draws("cwe-words", self.name, seed, length_tokens, sample), wanted)
        return self._sample(
            tokenizer,
            length_tokens=length_tokens,
            sample=sample,
            seed=seed,
            body=lambda size: self._body(
                Draws("cwe-order", self.name, seed, length_tokens, sample), common, uncommon, repeats, size
            ),
            least=self._least(repeats),
            trim_words=TRIM_WORDS,
            targets=common,
        )


class _CodedWords:
    """fwe's words by rank, drawn as far as a text has them: of 2,000, one of 32K words has some 140."""

    def __init__(self, draws: Draws) -> None:
        self._draws = draws
        self._made = {DOTS: None}  # the first stands for the dots

    def first(self, count: int) -> list[str]:
        """Return the words of the first ranks; there are no more than ``CODED_VOCABULARY``."""
        while len(self._made) < min(count, CODED_VOCABULARY):
            self._made["".join(self._draws.pick(string.ascii_lowercase) for _ in range(CODED_LETTERS))] = None
        return list(self._made)[:count]

    def answers(self) -> list[str]:
        """Return the words that are asked for."""
        found = self.first(max(ANSWER_RANKS))
        return [found[rank - 1] for rank in ANSWER_RANKS]


class FrequentWordsTask(_CountingTask):
    """RULER's fwe."""

    head, tail = FWE_HEAD, FWE_TAIL

    def __init__(self, name: str) -> None:
        super().__init__(name, question_type="frequent_words", new_tokens=50)

    def min_length_tokens(self, tokenizer: Tokenizer) -> int:
        """Return the length that the shortest text with four clearly different counts needs."""
        drawn = [_CodedWords(Draws("min", self.name, *parts)) for parts in _PROBES]
        return self._needed(tokenizer, (self._body(Draws("min"), each, FWE_LEAST) for each in drawn))

    def _body(self, draws: Draws, vocabulary: "_CodedWords", size: int) -> Body:
        """Return a text for which about ``size`` words are drawn: rank k stands ``size / (zeta(2) k^2)`` times."""
        flat: list[str] = []
        words = vocabulary.first(math.isqrt(int(size / _ZETA_2)) + 1)
        for rank, word in enumerate(words, start=1):
            count = int(size / (_ZETA_2 * rank * rank))
            if not count:
                break
            flat += [word] * count
        draws.shuffle(flat)
        lines = [flat[i : i + WORDS_A_LINE] for i in range(0, len(flat), WORDS_A_LINE)]
        return Body(lines, frozenset(vocabulary.answers()))

    def build(self, tokenizer: Tokenizer, *, length_tokens: int, sample: int, seed: int) -> Sample:
        """Build one sample (see Task.build)."""
        vocabulary = _CodedWords(Draws("fwe-words", self.name, seed, length_tokens, sample))
        return self._sample(
            tokenizer,
            length_tokens=length_tokens,
            sample=sample,
            seed=seed,
            body=lambda size: self._body(Draws("fwe-order", self.name, seed, length_tokens, sample), vocabulary, size),
            least=FWE_LEAST,
            trim_words=(DOTS,) * 100,
            targets=vocabulary.answers(),
        )
