"""One prompt and its answer: how the request is written, and what of the reply is used."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kvscope.errors import shown
from kvscope.harness.served.client import Client, RequestFailed
from kvscope.harness.served.error_words import error_words
from kvscope.results.limits import MOST_COUNT, MOST_NAME_CHARS

Api = Literal["completions", "chat"]
Form = Literal["token_ids", "text", "messages"]
PATHS: Mapping[Api, str] = {"completions": "completions", "chat": "chat/completions"}


BROKEN_OFF = ("abort", "error", "cancelled", "content_filter")
"""Finish reasons of answers that are not the model's whole ones (vLLM, SGLang, gateways)."""


class UnusableAnswer(RequestFailed):
    """The reply is JSON, but no answer of this API."""


@dataclass(frozen=True, kw_only=True)
class ServedPrompt:
    """A prompt in the forms in which servers take it.

    Attributes:
        ids: token ids, special tokens and chat template included.
        text: what a tokenizer without special tokens would encode to ``ids``; a text of its own has no BOS in it.
        message: what the user says; the server puts it into its own chat template.
    """

    ids: tuple[int, ...]
    text: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a server is asked, as the probe found that it can be.

    Attributes:
        model: the name it knows the model by.
        form: what prompts are sent as; ``messages`` is the chat API, the others are completions.
        bos: what stands before or is taken off the text's start: see ``probe``; empty for nothing.
        cut_bos: whether ``bos`` is taken off rather than put before.
        fields: more fields of each request.
    """

    model: str
    form: Form
    bos: str = ""
    cut_bos: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def api(self) -> Api:
        """The API that is asked."""
        return "chat" if self.form == "messages" else "completions"

    def body(self, prompt: ServedPrompt, max_new_tokens: int) -> dict[str, Any]:
        """Return the request: greedy, and without stop strings, which are cut by kvscope's own rule."""
        asked: dict[str, Any] = {"model": self.model, "max_tokens": max_new_tokens, "temperature": 0, **self.fields}
        if self.form == "messages":
            return {**asked, "messages": [{"role": "user", "content": prompt.message}]}
        if self.form == "token_ids":
            return {**asked, "prompt": list(prompt.ids)}
        text = prompt.text.removeprefix(self.bos) if self.cut_bos else self.bos + prompt.text
        return {**asked, "prompt": text}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a server said.

    Attributes:
        text: the whole text, whatever stands in it.
        prompt_tokens, completion_tokens: as the server counts them; None where it does not say.
        finish_reason: as the server has it.
        model: the name that it says has answered.
        request_s: seconds from the first sending to the whole answer, pauses included.
        tries: how often the prompt was sent.
    """

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    finish_reason: str | None
    model: str | None
    request_s: float
    tries: int


def ask(client: Client, manner: Manner, prompt: ServedPrompt, *, max_new_tokens: int) -> Answer:
    """Send a prompt and return its answer.

    Raises:
        RequestFailed, ServerGone: as ``Client.post``; ``UnusableAnswer`` where the reply holds no answer.
    """
    started_s = time.perf_counter()
    reply, sent = client.post(PATHS[manner.api], manner.body(prompt, max_new_tokens))
    try:
        choice = _first_choice(reply)
        text = _text(choice, manner.api)
    except UnusableAnswer as error:
        raise UnusableAnswer(client.redacted(str(error))) from None
    usage = reply.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Answer(
        text=text,
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        finish_reason=_name(choice.get("finish_reason")),
        model=_name(reply.get("model")),
        request_s=time.perf_counter() - started_s,
        tries=sent,
    )


def _first_choice(reply: Any) -> dict[str, Any]:
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UnusableAnswer(f"the reply has no choices: {shown(reply)}")
    return choices[0]


def _text(choice: dict[str, Any], api: Api) -> str:
    if choice.get("error") or choice.get("finish_reason") in BROKEN_OFF:
        why = error_words(choice["error"])[0] if choice.get("error") else choice["finish_reason"]
        raise UnusableAnswer(f"the server broke the answer off: {shown(why)}")
    holder = choice.get("message") if api == "chat" else choice
    text = holder.get("content" if api == "chat" else "text") if isinstance(holder, dict) else None
    if text is None and isinstance(holder, dict) and (holder.get("reasoning_content") or holder.get("reasoning")):
        return ""  # all of the answer's room went into thoughts
    if isinstance(text, list) and text and all(isinstance(part, dict) for part in text):  # parts, as of Mistral's API
        text = "".join(str(part.get("text", "")) for part in text if part.get("type") in ("text", "output_text"))
    if not isinstance(text, str):
        raise UnusableAnswer(f"the reply's first choice has no text: {shown(choice)}")
    # Half a character of UTF-16, as a cut answer may end in, can be written to no file.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _count(value: Any) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_COUNT
    return value if is_count else None


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= MOST_NAME_CHARS and _is_text(value) else None


def _is_text(value: str) -> bool:
    """Whether a file can hold it: half a surrogate pair is no text."""
    return not any("\ud800" <= character <= "\udfff" for character in value)
