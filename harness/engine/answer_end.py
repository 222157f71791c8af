"""Where an answer ends: a token that ends it, a stop string in its text, or its length.

A stop string is looked for in the whole text, for only the whole text is right: a character may be made of several
tokens, and what a token reads as depends on those before it. But a text is only written where the newest token can have
brought the last character of a stop string along: at a hundred sequences a step, writing it always takes longer than
the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvscope.harness.engine.loaded import LoadedModel
from kvscope.results.schema import StopReason
from kvscope.tasks.answers import stop_index

#: What incomplete bytes of a character read as: the token that completes it changes text that was there.
_INCOMPLETE = "\ufffd"


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of generated tokens, special ones left out; empty without a tokenizer."""
    if tokenizer is None:
        return ""
    text: str = tokenizer.decode(ids, skip_special_tokens=True)
    return text


class AnswerEnd:
    """Says why an answer ends with its newest token. One object serves any number of answers.

    Tokens must be shown one by one, from the first on: what was looked at before is not looked at again.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        stop_strings: Sequence[str] = (),
        stop_at_eos: bool = True,
        stops_before_text: bool = False,
    ) -> None:
        """Take what ends answers of a model; arguments as ``Request``."""
        self._tokenizer = loaded.tokenizer
        self._eos_ids = loaded.eos_ids if stop_at_eos else frozenset[int]()
        self._stop_strings, self._stops_before_text = tuple(stop_strings), stops_before_text
        self._lasts = {string[-1:] for string in self._stop_strings}
        # Spaces may be taken out of text that was there, or be written before a token for the sake of the next one.
        self._looks_always = " " in self._lasts or bool(getattr(self._tokenizer, "clean_up_tokenization_spaces", False))
        self._ends_by_itself: dict[int, bool] = {}
        self._can_complete: dict[int, bool] = {}

    def reason(self, ids: list[int], *, max_new_tokens: int) -> StopReason | None:
        """Return why an answer of these tokens ends with the last of them; None when it goes on."""
        newest = ids[-1]
        if newest in self._eos_ids:
            return "eos"
        if self._stop_strings:
            if newest not in self._can_complete:
                self._learn(newest)
            if self._ends_by_itself[newest]:
                return "stop"
            if self._can_complete[newest]:
                text = text_of(self._tokenizer, ids)
                if stop_index(text, self._stop_strings, before_text=self._stops_before_text) is not None:
                    return "stop"
        return "length" if len(ids) == max_new_tokens else None

    def _learn(self, token: int) -> None:
        alone = text_of(self._tokenizer, [token])
        # A token that texts leave out can be a stop string as it is written.
        self._ends_by_itself[token] = not alone and self._tokenizer.decode([token]) in self._stop_strings
        self._can_complete[token] = (
            self._looks_always or not alone or _INCOMPLETE in alone or any(last in alone for last in self._lasts)
        )
