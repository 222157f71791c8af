"""Chat templates: a prompt as one turn of a user, in the form that an instruct model was trained on.

A ``ChatTokenizer`` is to tasks what any tokenizer is. What the template puts around a text takes the place of special
tokens, so that prompts have their exact length with the template in it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from kvscope.errors import UsageError, shown
from kvscope.files import first_line
from kvscope.paths import user_path
from kvscope.results.reading import read_regular

AUTO, NONE = "auto", "none"
MOST_TEMPLATE_BYTES = 1 << 20
#: Templates that write today's date would make another prompt every day: they are told Llama 3.1's default. As a macro,
#: since with transformers 5.23 and later no function reaches a template by keyword.
_DATE = {"%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri"}
_TIME = dict.fromkeys(("%H", "%M", "%S"), "00")
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f".replace('{code}', '{text}')" for code, text in {**_DATE, **_TIME}.items())
    + " }}{%- endmacro -%}"
)
# No template says this by itself.
_PROBE = "kvscope's own probe, 7351"


class ChatTokenizer:
    """A tokenizer whose prompts are a user's turn, with the beginning of the assistant's behind it.

    Tokens are those of ``apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)``, with
    ``enable_thinking=False`` (answers have no room for thoughts; templates without such a switch ignore it) and a fixed
    date. Texts that are encoded without special tokens have no template.

    Args:
        tokenizer: the transformers tokenizer of the model; one of the tokenizers library, which tells offsets.
        template: the Jinja template.

    Raises:
        UsageError: the template cannot be rendered, or does not hold the user's text as it is.
    """

    is_fast = True

    def __init__(self, tokenizer: Any, template: str, *, origin: str | None = None) -> None:
        """Take a template; ``origin`` is where it is from, where that is not the tokenizer's own."""
        self.plain = tokenizer
        self._origin = origin or f"of {tokenizer.name_or_path}"
        self.name_or_path: str = tokenizer.name_or_path
        self._template = template
        self._timeless = _FIXED_DATE + template if "strftime_now" in template else template
        if not getattr(tokenizer, "is_fast", False):
            raise UsageError(
                f"The tokenizer of {self.name_or_path} does not tell which characters its tokens stand for, which a "
                "chat template needs: use --chat-template none."
            )
        whole = self._rendered(_PROBE)
        self._before, middle, self._behind = whole.partition(_PROBE)
        if not middle:
            raise self._other_text(_PROBE, whole)

    @property
    def sha256(self) -> str:
        """Hash of the template."""
        return f"sha256:{hashlib.sha256(self._template.encode()).hexdigest()}"

    def __call__(
        self, text: str | list[str], *, add_special_tokens: bool = True, return_offsets_mapping: bool = False
    ) -> dict[str, Any]:
        """Encode texts as the tokenizer does; with special tokens, each as a turn.

        Returns:
            ``input_ids``, and ``offset_mapping`` where asked for: the characters of the text that each token stands
            for, none at its start or end for tokens of the template.
        """
        if not add_special_tokens:
            found: dict[str, Any] = self.plain(
                text, add_special_tokens=False, return_offsets_mapping=return_offsets_mapping
            )
            return found
        texts = [text] if isinstance(text, str) else text
        turns = [self._turn(each, offsets=return_offsets_mapping) for each in texts]
        keys = ("input_ids", "offset_mapping") if return_offsets_mapping else ("input_ids",)
        return {key: turns[0][key] if isinstance(text, str) else [turn[key] for turn in turns] for key in keys}

    def decode(self, token_ids: Any, **kwargs: Any) -> str:
        """Return the text of tokens, of a template's too."""
        text: str = self.plain.decode(token_ids, **kwargs)
        return text

    def rendered(self, text: str) -> str:
        """Return a user's text in its template: what is encoded, special tokens spelled out."""
        return self._whole(text)[0]

    def _turn(self, text: str, *, offsets: bool) -> dict[str, Any]:
        whole, skipped = self._whole(text)
        made = self.plain(whole, add_special_tokens=False, return_offsets_mapping=offsets)
        if not offsets:
            return {"input_ids": made["input_ids"]}
        first, last = len(self._before), len(whole) - len(self._behind)

        def place(start: int, end: int) -> tuple[int, int]:
            if end <= first:
                return 0, 0
            if start >= last:
                return len(text), len(text)
            return max(start, first) - first + skipped, min(end, last) - first + skipped

        return {"input_ids": made["input_ids"], "offset_mapping": [place(a, b) for a, b in made["offset_mapping"]]}

    def _whole(self, text: str) -> tuple[str, int]:
        """Return the text in its template, and how many characters at its start are left out there.

        Many templates strip white space off both ends of a text.
        """
        whole = self._rendered(text)
        kept = whole[len(self._before) : len(whole) - len(self._behind)]
        if whole != self._before + kept + self._behind or kept.strip() != text.strip() or kept not in text:
            raise self._other_text(text, whole)
        return whole, text.find(kept)

    def _rendered(self, text: str) -> str:
        try:
            whole: str = self.plain.apply_chat_template(
                [{"role": "user", "content": text}],
                chat_template=self._timeless,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
        except Exception as error:  # a template is a program, and may raise anything
            raise UsageError(
                f"The chat template {self._origin} cannot be used ({first_line(error)}): use --chat-template "
                "none, or a file with another."
            ) from error
        return whole

    def _other_text(self, text: str, whole: str) -> UsageError:
        return UsageError(
            f"The chat template {self._origin} does not hold the text of a user as it is, but makes "
            f"{shown(whole)} of {shown(text)}: use --chat-template none, or a file with another."
        )


def chat_tokenizer(tokenizer: Any, choice: str) -> ChatTokenizer | None:
    """Return the tokenizer of a run's prompts with its template; None where prompts have none.

    Args:
        tokenizer: the transformers tokenizer of the model; None for a preset.
        choice: ``auto`` (the tokenizer's own template, where it has one), ``none``, or a file with one.

    Raises:
        UsageError: as :class:`ChatTokenizer`; the file cannot be read; a file for a model without tokenizer.
    """
    own = getattr(tokenizer, "chat_template", None)
    if choice == NONE or (choice == AUTO and not own):
        return None
    if choice == AUTO and not isinstance(own, str | dict):
        raise UsageError(
            f"The chat template of {tokenizer.name_or_path} is {shown(own)}, and no text: use --chat-template none, or "
            "a file with one."
        )
    if choice == AUTO:
        try:
            template: str = tokenizer.get_chat_template()
        except ValueError as error:  # several, and none of them is called default
            raise UsageError(
                f"The tokenizer of {tokenizer.name_or_path} has several chat templates and no default: use "
                "--chat-template none, or a file with one."
            ) from error
    else:
        if tokenizer is None:
            raise UsageError("A preset has no tokenizer, so no chat template: leave out --chat-template.")
        template = _read(user_path(choice, what="chat_template"))
    return ChatTokenizer(tokenizer, template, origin=None if choice == AUTO else f"in {choice}")


def _read(path: Path) -> str:
    data = read_regular(path, most_bytes=MOST_TEMPLATE_BYTES, mend="Give --chat-template a file with a Jinja template.")
    if data is None:
        raise UsageError(
            f"Cannot read the chat template '{path}' (no such file): give --chat-template auto, none or an existing "
            "file."
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"The chat template '{path}' is not UTF-8 text: pass another file.") from error
