"""What a server does in silence, asked before a run: small greedy prompts whose answers and counts tell.

Servers take fields that they ignore, count tokens that nobody sent, answer one prompt in two ways, and say nothing of
it. What is found decides how prompts are sent, and is kept in run.json.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from kvscope.errors import UsageError, shown
from kvscope.harness.served.asking import Answer, Api, Manner, ServedPrompt, ask
from kvscope.harness.served.client import Client, RequestFailed, ServerGone
from kvscope.harness.served.server import Server

PROBE_TOKENS = 16
"""New tokens of each probe."""
OPTIONAL_FIELDS: dict[str, Any] = {"cache_prompt": False, "repetition_penalty": 1.0, "seed": 0}
"""Fields that are sent where the server takes them: no reuse of another prompt's cache (llama.cpp), none of the penalty
that a model's own generation config may bring, and one seed."""
CHAT_FIELDS: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
"""The same for the chat API: its template as kvscope's own prompts have it, without thoughts."""
_SHORT = "The numbers in order are one, two, three, four, five,"
_LONG = "\n".join(
    f"Line {number}: the code of room {number * 37 % 101} is {number * 7919 % 1000}." for number in range(12)
)

MakePrompt = Callable[[str], ServedPrompt]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found of a server; ``run.json`` keeps it as ``environment.server``.

    Attributes:
        software: what it says it is; None where it does not.
        form: what prompts are sent as: ``token_ids``, ``text`` or ``messages``.
        no_token_ids: why token ids are not; None where they are, or the API is chat.
        bos: what was done with the beginning of sequence: ``as it is``, ``taken off`` or ``put before``.
        fields: optional fields that it does not refuse; it may ignore them.
        fields_refused: those that it refuses.
        extra_prompt_tokens: its count of a prompt minus ours; None where it does not count.
        extra_is: what that means, in words.
        repeats: whether a greedy prompt gave the same answer twice.
        concurrency: requests at a time.
        concurrency_changes: whether answers to requests that were under way together were others; None where that was
            not asked for.
        max_tokens_kept: whether an answer was no longer than allowed, by its own count; None where it does not count.
        finish_reason: what it said of an answer of four tokens at most. kvscope goes by text and counts instead.
        stop_strings: what becomes of them.
        context_tokens: longest prompt plus answer that is sent.
        context_from: who says so.
    """

    software: str | None
    form: str
    no_token_ids: str | None
    bos: str
    fields: tuple[str, ...]
    fields_refused: tuple[str, ...]
    extra_prompt_tokens: int | None
    extra_is: str
    repeats: bool
    concurrency: int
    concurrency_changes: bool | None
    max_tokens_kept: bool | None
    finish_reason: str | None
    stop_strings: str
    context_tokens: int
    context_from: str

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values."""
        values = asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @property
    def notes(self) -> list[str]:
        """What the user may not expect, one sentence each."""
        said = []
        if not self.repeats:
            said.append("the server answered one greedy prompt in two ways: single answers are not repeatable.")
        if self.concurrency_changes:
            said.append("requests at a time change the server's answers: one is sent at a time.")
        if self.extra_prompt_tokens is None:
            said.append("the server does not count prompt tokens: a prompt that it cuts would go unnoticed.")
        elif self.extra_prompt_tokens:
            said.append(f"the server counts {self.extra_prompt_tokens:+} prompt tokens against ours: {self.extra_is}.")
        if self.no_token_ids is not None:
            said.append(f"the server takes no token ids ({self.no_token_ids}): prompts are sent as text.")
        return said


def probe(
    client: Client,
    server: Server,
    make_prompt: MakePrompt,
    *,
    api: Api,
    bos: str,
    concurrency: int,
    context_tokens: int,
    context_from: str,
) -> tuple[Manner, Findings]:
    """Find out how a server can be asked, and what it does in silence.

    Args:
        make_prompt: makes a prompt of a text, by our tokenizer.
        api: the API that is asked.
        bos: the tokenizer's beginning of sequence as text; empty where it puts none.
        concurrency: most requests at a time.
        context_tokens, context_from: the longest prompt plus answer, and who says so.

    Raises:
        UsageError: the server cannot be used: it is gone, refuses a plain prompt, answers as another model, gives more
            tokens than asked for, or counts prompts so that our tokenizer cannot be its.
    """
    short, long = make_prompt(_SHORT), make_prompt(_LONG)
    try:
        form, why_not = _form(client, server, short, api)
        manner = _with_bos(client, Manner(model=server.model, form=form), short, bos)
        manner = replace(manner, fields=_fields(client, manner, short))
        first, again = (_ask(client, manner, long) for _ in range(2))
        small = _ask(client, manner, short, max_new_tokens=4)
        _check_model(client.url, server, first)
        extra = _extra(client.url, [(short, small), (long, first)])
        if small.completion_tokens is not None and small.completion_tokens > 4:
            raise UsageError(
                f"The server at {client.url} gives {small.completion_tokens} tokens where 4 are asked for, so no "
                "answer would have its length: check it, or use another."
            )
        repeats = first.text == again.text
        changes = _concurrency_changes(client, manner, make_prompt, concurrency) if concurrency > 1 else None
    except ServerGone as error:
        raise UsageError(f"{error}.") from error
    except RequestFailed as error:
        if not server.listed:
            raise UsageError(
                f"The server at {client.url} has no list of models, and does not answer {api} requests for "
                f"{shown(server.model)}: {error}. The URL of most servers ends in /v1."
            ) from error
        raise UsageError(
            f"The server at {client.url} lists {shown(server.model)}, but does not answer {api} requests: {error}."
        ) from error
    return manner, Findings(
        software=server.software,
        form=form,
        no_token_ids=why_not,
        bos="as it is" if not manner.bos else "taken off" if manner.cut_bos else "put before",
        fields=tuple(manner.fields),
        fields_refused=tuple(key for key in _optional(api) if key not in manner.fields),
        extra_prompt_tokens=extra,
        extra_is=_extra_text(extra, api),
        repeats=repeats,
        concurrency=concurrency if repeats and changes is False else 1,
        concurrency_changes=changes,
        max_tokens_kept=None if small.completion_tokens is None else True,
        finish_reason=small.finish_reason,
        stop_strings="none is sent; kvscope cuts answers itself",
        context_tokens=context_tokens,
        context_from=context_from,
    )


def _ask(
    client: Client,
    manner: Manner,
    prompt: ServedPrompt,
    *,
    max_new_tokens: int = PROBE_TOKENS,
) -> Answer:
    return ask(client, manner, prompt, max_new_tokens=max_new_tokens)


def _form(client: Client, server: Server, prompt: ServedPrompt, api: Api) -> tuple[Any, str | None]:
    """Return (what prompts are sent as, why not as token ids).

    Ids count as taken where the server counts as many; where it does not count, where it answers as to the text.
    """
    if api == "chat":
        return "messages", None
    try:
        answer = _ask(client, Manner(model=server.model, form="token_ids"), prompt)
    except RequestFailed as error:
        return "text", str(error)
    if answer.prompt_tokens is not None:
        if answer.prompt_tokens == len(prompt.ids):
            return "token_ids", None
        return "text", f"it counts {answer.prompt_tokens} tokens of {len(prompt.ids)} ids"
    told = _ask(client, Manner(model=server.model, form="text"), prompt)
    if told.text == answer.text:
        return "token_ids", None
    return "text", "it does not count, and answers otherwise than to the same text"


def _with_bos(client: Client, manner: Manner, prompt: ServedPrompt, bos: str) -> Manner:
    """Return the manner whose prompts the server counts as we do, where taking BOS off or putting it before does that.

    A chat template may write BOS itself, before which many servers put another; others put none before a text.
    """
    if manner.form != "text" or not bos:
        return manner
    for other in (manner, replace(manner, bos=bos, cut_bos=prompt.text.startswith(bos))):
        if _ask(client, other, prompt, max_new_tokens=1).prompt_tokens == len(prompt.ids):
            return other
    return manner


def _fields(client: Client, manner: Manner, prompt: ServedPrompt) -> dict[str, Any]:
    """Return the optional fields that the server does not refuse."""
    taken: dict[str, Any] = {}
    for key, value in _optional(manner.api).items():
        try:
            _ask(client, replace(manner, fields={**taken, key: value}), prompt, max_new_tokens=1)
        except RequestFailed:  # a plain request was answered just now: it is the field that fails
            continue
        taken[key] = value
    return taken


def _optional(api: Api) -> dict[str, Any]:
    return {**OPTIONAL_FIELDS, **CHAT_FIELDS} if api == "chat" else OPTIONAL_FIELDS


def _check_model(url: str, server: Server, answer: Answer) -> None:
    if is_other_model(answer, server.model):
        raise UsageError(
            f"The server at {url} was asked for {shown(server.model)} and answers as {shown(answer.model)}: give "
            "--served-model the name that it answers by."
        )


def is_other_model(answer: Answer, model: str) -> bool:
    """Whether a reply names another model than the one that was asked: gateways have models that stand in."""
    return answer.model is not None and _last_part(answer.model) != _last_part(model)


def _last_part(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _extra(url: str, asked: Sequence[tuple[ServedPrompt, Answer]]) -> int | None:
    """Return how many tokens more than we the server counts of a prompt; None where it does not count.

    Raises:
        UsageError: of two prompts it is not the same number: then it has another tokenizer.
    """
    counted = [(len(prompt.ids), answer.prompt_tokens) for prompt, answer in asked]
    extra = {theirs - ours for ours, theirs in counted if theirs is not None}
    if len(extra) > 1:
        said = " and ".join(f"{theirs} where we count {ours}" for ours, theirs in counted)
        raise UsageError(
            f"The server at {url} counts {said} tokens, so the tokenizer is not its model's (or the chat template is "
            "another): give the model's own with --tokenizer, or the template with --chat-template."
        )
    return next(iter(extra), None)


def _extra_text(extra: int | None, api: Api) -> str:
    if extra is None:
        return "not told"
    if extra == 0:
        return "the same count"
    if extra == 1:
        return "a second token at the start (BOS twice?)" if api == "completions" else "one token more in its template"
    if extra == -1:
        return "one token less (no BOS?)"
    return "more around the prompt (another template?)" if extra > 0 else "less around the prompt"


def _concurrency_changes(client: Client, manner: Manner, make_prompt: MakePrompt, concurrency: int) -> bool:
    """Whether different prompts that are under way together have other answers than alone."""
    prompts = [make_prompt(f"Room {number}.\n{_LONG if number % 2 else _SHORT}") for number in range(concurrency)]
    alone = [_ask(client, manner, prompt).text for prompt in prompts]
    with ThreadPoolExecutor(max_workers=concurrency) as pool:
        together = list(pool.map(lambda prompt: _ask(client, manner, prompt).text, prompts))
    return alone != together
