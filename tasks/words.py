"""Word lists for keys and filler, split so that training and evaluation never share a key word."""

import hashlib
import re
from functools import cache
from importlib import resources
from typing import Literal, NamedTuple

from kvscope.errors import EnvironmentProblem

Split = Literal["train", "eval"]
EVAL_SHARE_PERCENT = 20
# Every prompt depends on these lists, so a package release that edits them must not pass unnoticed.
WORDS_SHA256 = "654bd21238b76a311aa4a3b40ee441fa4b192ba7cefc33eeaa10fd669198b93e"


class WordLists(NamedTuple):
    """Lower-case words of one split, in alphabetical order."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]


def split_of(word: str) -> Split:
    """Assign a word to a split by its hash: stable whatever else the list holds."""
    bucket = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") % 100
    return "eval" if bucket < EVAL_SHARE_PERCENT else "train"


@cache
def _all_words() -> WordLists:
    folder = resources.files("wonderwords") / "assets"

    def read(name: str) -> set[str]:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        return {line for line in (raw.strip() for raw in lines) if re.fullmatch("[a-z]{3,12}", line)}

    barred = read("profanitylist.txt")
    adjectives = read("adjectivelist.txt") - barred
    # A word in both lists would blur the two halves of a key.
    nouns = read("nounlist.txt") - barred - adjectives
    lists = WordLists(tuple(sorted(adjectives)), tuple(sorted(nouns)))
    digest = hashlib.sha256("\n".join((*lists.adjectives, "", *lists.nouns)).encode()).hexdigest()
    if digest != WORDS_SHA256:
        raise EnvironmentProblem(
            f"The installed wonderwords package holds other word lists (sha256 {digest[:12]}) than the ones every "
            f"kvscope prompt is made from ({WORDS_SHA256[:12]}): install wonderwords==3.0.1."
        )
    return lists


@cache
def words(split: Split) -> WordLists:
    """Return the adjectives and nouns of one split.

    Raises:
        EnvironmentProblem: the installed wonderwords release ships other lists.
    """
    both = _all_words()
    return WordLists(*(tuple(word for word in part if split_of(word) == split) for part in both))
