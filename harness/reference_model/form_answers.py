"""How an answer is written: lists with one mark or another between, lines, JSON, sentences; and how to ask for it."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from kvscope.harness.reference_model.wording_composed import expand
from kvscope.tasks.draws import Draws


class AnswerForm(NamedTuple):
    """One way to write a list.

    Attributes:
        write: items to text; it begins with a space or a newline.
        asks: patterns of instructions that ask for it; none where no instruction is needed.
    """

    write: Callable[[Sequence[str]], str]
    asks: tuple[str, ...] = ()


def _joined(mark: str) -> Callable[[Sequence[str]], str]:
    return lambda items: " " + mark.join(items)


def _and(last: str) -> Callable[[Sequence[str]], str]:
    def write(items: Sequence[str]) -> str:
        return " " + (", ".join(items[:-1]) + last + items[-1] if len(items) > 1 else items[0])

    return write


def _json(items: Sequence[str]) -> str:
    return " [" + ", ".join(f'"{item}"' for item in items) + "]"


def _lines(mark: str) -> Callable[[Sequence[str]], str]:
    return lambda items: "".join(f"\n{mark}{item}" for item in items)


_ASK = "<Answer|Reply|Respond|Write your answer|Give the answer|Put the answer|Say it>"
COMMA = AnswerForm(
    _joined(", "), (f"{_ASK} <as a list with|with> commas <between|in between|>.", "Separate by commas.")
)
FORMS: Mapping[str, AnswerForm] = MappingProxyType({
    "comma": COMMA,
    "space": AnswerForm(_joined(" "), (f"{_ASK} with <single spaces|nothing but spaces|spaces> <between|in between>.",
                                       "Use spaces between them, no commas.")),
    "semicolon": AnswerForm(_joined("; "), (f"{_ASK} with semicolons <between|in between>.",)),
    "bar": AnswerForm(_joined(" | "), (f"{_ASK} with bars <between|in between>.",)),
    "and": AnswerForm(_and(" and "), (f"{_ASK} <in words, as one would speak|as one says it aloud>.",)),
    "and_comma": AnswerForm(_and(", and "), (f"{_ASK} as in <running text|prose>.",)),
    "sentence": AnswerForm(lambda items: _and(" and ")(items) + ".",
                           (f"{_ASK} as <a|one> <whole|full|complete> sentence.", "End with a full stop.")),
    "json": AnswerForm(_json, (f"{_ASK} as a JSON <list|array>.", "Only a JSON array, please.", "Use JSON.")),
    "json_object": AnswerForm(lambda items: ' {"answer":' + _json(items) + "}",
                              (f"{_ASK} as a JSON object with the key answer.", "Return JSON with an answer field.")),
    "brackets": AnswerForm(lambda items: " [" + ", ".join(items) + "]", (f"{_ASK} in square brackets.",)),
    "round": AnswerForm(lambda items: " (" + ", ".join(items) + ")", (f"{_ASK} in <round brackets|parentheses>.",)),
    "quotes": AnswerForm(lambda items: " " + ", ".join(f'"{item}"' for item in items), (f"{_ASK} in quotes.",)),
    "lines": AnswerForm(_lines(""), (f"{_ASK} one <a|per> line.", "One <item|entry|of them> <a|per> line.")),
    "dashes": AnswerForm(_lines("- "), (f"{_ASK} as <bullet points|a bulleted list>.", "Use dashes.")),
    "stars": AnswerForm(_lines("* "), (f"{_ASK} as a list with stars.",)),
    "numbered": AnswerForm(lambda items: "".join(f" {i}. {item}" for i, item in enumerate(items, 1)),
                           (f"{_ASK} as a numbered list on one line.", "Number them, on one line.")),
    "numbered_lines": AnswerForm(lambda items: "".join(f"\n{i}. {item}" for i, item in enumerate(items, 1)),
                                 (f"{_ASK} as a numbered list.", "Number <them|the lines|the answers>.")),
})  # fmt: skip


def draw_form(draws: Draws, *, shown: bool) -> tuple[AnswerForm, str]:
    """Return a form and its instruction ("" for none).

    Args:
        shown: solved examples show the form. Where they do not, it is the usual one or is asked for: what cannot be
            known from the prompt is not to be learnt.
    """
    if shown:
        name = "space" if draws.unit() < 0.25 else draws.pick(tuple(FORMS))
        form = FORMS[name]
        return form, expand(draws.pick(form.asks), draws) if draws.unit() < 0.3 else ""
    if draws.unit() < 0.6:
        return COMMA, ""
    form = FORMS[draws.pick(tuple(FORMS))]
    return form, expand(draws.pick(form.asks), draws)
