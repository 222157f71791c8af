"""What statements are hidden in: sentences put together from parts, in lines, paragraphs or one long run."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvscope.harness.reference_model.documents_long_qa import made_up_word
from kvscope.harness.reference_model.templates import FILLERS
from kvscope.harness.reference_model.wording_composed import expand
from kvscope.harness.reference_model.wording_forms import (
    PROSE,
    RECORDS,
    SHORT_SENTENCES,
)
from kvscope.tasks.draws import Draws
from kvscope.tasks.long_qa.lexicon import category_of
from kvscope.tasks.words import words

Count = Callable[[str], int]
Kinds = tuple[tuple[Callable[[Draws], str], float], ...]
"""Ways to make a text, with the share of each; the shares add up to one."""
_BANK_SENTENCES = 1500


def _sentence(draws: Draws, patterns: Sequence[str]) -> str:
    lists = words("train")
    noun, noun2, adjective = draws.pick(lists.nouns), draws.pick(lists.nouns), draws.pick(lists.adjectives)
    text = expand(draws.pick(patterns), draws)
    fill = {
        "noun": noun, "noun2": noun2, "adj": adjective, "a": _article(noun), "a2": _article(noun2),
        "b": draws.pick(lists.adjectives), "Word": fresh_word(draws).capitalize(),
        "Word2": fresh_word(draws).capitalize(), "small": str(draws.between(2, 30)),
        "small2": str(draws.between(2, 30)), "h": f"{draws.below(24):02d}", "m": f"{draws.below(60):02d}",
    }  # fmt: skip
    # The fillers of the first phases have articles of their own, and adjectives where the others have them.
    if patterns is FILLERS:
        fill["a"] = adjective
    else:
        text = text.replace("{a} {adj}", "a {adj}").replace("{a2} {adj}", "a {adj}")
    text = text.format_map(fill)
    return text[0].upper() + text[1:] if patterns is not RECORDS else text


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def fresh_word(draws: Draws) -> str:
    """Return a made-up word that is none of the stories' (they could be evaluation's)."""
    while (word := made_up_word(draws)) in category_of():
        pass
    return word


def drawn_kind(draws: Draws, kinds: Kinds) -> Callable[[Draws], str]:
    """Return one of several ways to make a text, each as often as its share says."""
    at = draws.unit()
    for make, share in kinds:
        at -= share
        if at < 0:
            return make
    return kinds[0][0]


def _salad(draws: Draws) -> str:
    lists = words("train")
    pool = (lists.nouns, lists.adjectives)
    said = [
        fresh_word(draws) if draws.unit() < 0.2 else draws.pick(pool[draws.below(2)])
        for _ in range(draws.between(4, 16))
    ]
    return " ".join(said) + draws.pick((".", ".", "", ",", "!", "?"))


class Layout(NamedTuple):
    """How one row's haystacks look.

    Attributes:
        units: what the noise is made of: text of a unit and its tokens; drawn from in order or at random.
        in_order: the units come one after the other, over and over.
        joints: what may stand between two units, one of it as often as it stands here.
        attach: where a statement stands: ``own`` (a unit by itself), ``behind`` or ``before`` a unit's text, or
            ``within`` it.
        wrap: what stands around a statement.
    """

    units: Sequence[tuple[str, int]]
    in_order: bool
    joints: tuple[str, ...]
    attach: str
    wrap: tuple[str, str]


_JOINTS = (
    (("\n",), 0.34), ((" ",), 0.22), (("\n\n",), 0.06), ((" ", " ", " ", " ", "\n"), 0.08),
    ((" ", " ", " ", " ", "\n\n"), 0.08), (("\n ",), 0.08), ((" \n",), 0.03), (("; ",), 0.03), ((" | ",), 0.03),
    (("\n- ",), 0.03), (("  ",), 0.02),
)  # fmt: skip
_ATTACH = (("own", 0.5), ("behind", 0.2), ("before", 0.12), ("within", 0.18))
_WRAPS = (("", ""), ("", ""), ("", ""), ("", ""), ("(", ")"), ("[", "]"), ("*", "*"), ('"', '"'), ("", "."), ("", ";"))


def _weighted(draws: Draws, choices: Sequence[tuple[object, float]]) -> object:
    at = draws.unit() * sum(share for _, share in choices)
    for value, share in choices:
        at -= share
        if at < 0:
            return value
    return choices[-1][0]


class Noise:
    """The sentences haystacks are made of; made once, the same in every process."""

    def __init__(self, count: Count) -> None:
        self.count = count
        draws = Draws("forms-noise")
        kinds: dict[str, Sequence[str]] = {"prose": PROSE, "short": SHORT_SENTENCES, "records": RECORDS, "old": FILLERS}
        self._banks = {
            kind: [
                self._counted(_sentence(draws, patterns)) for _ in range(_BANK_SENTENCES if kind == "prose" else 400)
            ]
            for kind, patterns in kinds.items()
        }
        self._banks["salad"] = [self._counted(_salad(draws)) for _ in range(400)]

    def _counted(self, text: str) -> tuple[str, int]:
        return text, self.count(" " + text)

    def layout(self, draws: Draws) -> Layout:
        """Draw how a row's haystacks look."""
        kind = _weighted(
            draws, (("repeat", 0.36), ("few", 0.14), ("prose", 0.3), ("salad", 0.06), ("records", 0.07), ("old", 0.07))
        )
        in_order = False
        if kind == "repeat":
            said = [
                _sentence(draws, SHORT_SENTENCES if draws.unit() < 0.85 else PROSE) for _ in range(draws.between(2, 7))
            ]
            texts = [" ".join(said)] if draws.unit() < 0.65 else said
            units: Sequence[tuple[str, int]] = [self._counted(text) for text in texts]
            in_order = True
        elif kind == "few":
            bank = self._banks[draws.pick(("prose", "short", "old", "salad"))]
            units = [draws.pick(bank) for _ in range(draws.between(3, 12))]
        else:
            units = self._banks[str(kind)]
        joints = ("\n",) if kind == "records" else _weighted(draws, _JOINTS)
        assert isinstance(joints, tuple)
        return Layout(units, in_order, joints, str(_weighted(draws, _ATTACH)), draws.pick(_WRAPS))

    def haystack(
        self, draws: Draws, layout: Layout, groups: Sequence[Sequence[tuple[str, float]]], room_tokens: float
    ) -> str:
        """Return noise with statements in it, of at most about ``room_tokens``; a group's statements keep their order.

        Args:
            groups: statements that must come in order, without what stands around them, and their tokens.
        """
        left, right = layout.wrap
        placed: list[tuple[float, int, str]] = []
        for group in groups:
            low, width = 0.0, 1.0
            if draws.unit() < 0.2:
                width = draws.unit() ** 2
                low = draws.unit() * (1 - width)
            at = sorted(low + width * draws.unit() for _ in group)
            for depth, (text, size) in zip(at, group, strict=True):
                room_tokens -= size + 1 + (left != "") + (right != "")
                placed.append((depth, len(placed), left + text + right))
        placed.sort()
        joint = 0 if layout.joints == (" ",) else 1
        units: list[str] = []
        pool = layout.units
        while True:
            text, tokens = pool[len(units) % len(pool)] if layout.in_order else draws.pick(pool)
            room_tokens -= tokens + joint
            if room_tokens < 0:
                break
            units.append(text)
        return self._joined(draws, layout, units, [(int(depth * (len(units) + 1)), text) for depth, _, text in placed])

    def _joined(self, draws: Draws, layout: Layout, units: list[str], placed: Sequence[tuple[int, str]]) -> str:
        by_place: dict[int, list[str]] = {}
        for at, text in placed:
            by_place.setdefault(at, []).append(text)
        out: list[str] = []
        done = 0
        for at, texts in by_place.items():
            out += units[done:at]
            done = at
            if layout.attach == "behind" and out:
                out[-1] = " ".join((out[-1], *texts))
            elif layout.attach == "before" and done < len(units):
                units[done] = " ".join((*texts, units[done]))
            elif layout.attach == "within" and out and len(texts) == 1:
                gaps = [i for i, letter in enumerate(out[-1]) if letter == " "]
                gap = draws.pick(gaps) if gaps else len(out[-1])
                out[-1] = f"{out[-1][:gap]} {texts[0]}{out[-1][gap:]}"
            else:
                out += texts
        out += units[done:]
        if len(layout.joints) == 1:
            return layout.joints[0].join(out)
        return "".join(part for unit in out for part in (unit, draws.pick(layout.joints))).rstrip()
