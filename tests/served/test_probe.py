"""What a probe finds of servers that differ in silence, and which of them it refuses."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from stub_server import Stub, needle, reference_tokenizer, served_prompt

from kvscope.errors import UsageError
from kvscope.harness.served.asking import Answer, Manner, UnusableAnswer, ask
from kvscope.harness.served.client import Client
from kvscope.harness.served.probe import Findings, probe
from kvscope.harness.served.server import describe_server


def probed(stub: Stub, **given: Any) -> tuple[Manner, Findings]:
    client = Client(stub.url, tries=2)
    asked = {"api": "completions", "bos": "", "concurrency": 1, "context_tokens": 4096, "context_from": "the test"}
    return probe(client, describe_server(client, model=None), served_prompt, **{**asked, **given})


def test_a_good_server(stub: Stub) -> None:
    manner, found = probed(stub, concurrency=3)
    assert manner == Manner(
        model="stub", form="token_ids", fields={"cache_prompt": False, "repetition_penalty": 1.0, "seed": 0}
    )
    assert (found.extra_prompt_tokens, found.extra_is, found.no_token_ids) == (0, "the same count", None)
    assert (found.repeats, found.concurrency, found.concurrency_changes) == (True, 3, False)
    assert (found.max_tokens_kept, found.software) == (True, "tests")
    assert found.notes == []
    sent = stub.requests[-1]
    assert (sent["temperature"], sent["cache_prompt"]) == (0, False)
    assert not any("stop" in body for body in stub.requests)
    assert json.loads(json.dumps(found.plain()))["fields"] == ["cache_prompt", "repetition_penalty", "seed"]


def test_a_server_without_ids_and_fields(stub: Stub) -> None:
    stub.token_ids, stub.unknown = False, {"cache_prompt", "repetition_penalty"}
    manner, found = probed(stub)
    assert (manner.form, dict(manner.fields)) == ("text", {"seed": 0})
    assert found.no_token_ids == "HTTP 400: prompt must be a string."
    assert found.fields_refused == ("cache_prompt", "repetition_penalty")
    assert found.notes == [
        "the server takes no token ids (HTTP 400: prompt must be a string.): prompts are sent as text."
    ]


def test_ids_that_are_taken_for_something_else(stub: Stub) -> None:
    stub.extra_tokens = lambda n_ids: 5 if len(stub.requests) == 1 else 0
    manner, found = probed(stub)
    assert manner.form == "text"
    assert "ids" in str(found.no_token_ids)


def test_a_server_that_counts_nothing(stub: Stub) -> None:
    stub.usage = False
    manner, found = probed(stub)
    assert manner.form == "token_ids"
    assert (found.extra_prompt_tokens, found.max_tokens_kept) == (None, None)
    assert found.notes == ["the server does not count prompt tokens: a prompt that it cuts would go unnoticed."]


@pytest.mark.parametrize(
    ("text", "bos", "extra", "said", "first"),
    [
        ("<s>{}", "taken off", 0, "the same count", "The numbers"),
        ("{}", "as it is", 1, "a second token at the start (BOS twice?)", "The numbers"),
        ("{}", "as it is", 7, "more around the prompt (another template?)", "The numbers"),
    ],
    ids=["a template that writes BOS", "one that cannot be taken off", "a template that nobody asked for"],
)
def test_bos_twice(stub: Stub, text: str, bos: str, extra: int, said: str, first: str) -> None:
    """The stub's tokenizer puts BOS before every text: a text that begins with it has two."""
    tokenizer = reference_tokenizer()
    stub.token_ids = False
    own = str(tokenizer.bos_token)
    stub.extra_tokens = extra

    def make(words: str) -> Any:
        plain = served_prompt(words)
        return type(plain)(ids=plain.ids, text=text.replace("<s>", own).format(words), message=words)

    client = Client(stub.url)
    manner, found = probe(
        client, describe_server(client, model=None), make, api="completions", bos=own, concurrency=1,
        context_tokens=4096, context_from="the test",
    )  # fmt: skip
    assert (found.bos, found.extra_prompt_tokens, found.extra_is) == (bos, extra, said)
    assert manner.body(make("The numbers"), 1)["prompt"].startswith(first)


def test_the_chat_api(stub: Stub) -> None:
    stub.extra_tokens = 1
    manner, found = probed(stub, api="chat")
    assert (manner.form, found.form, found.extra_is) == ("messages", "messages", "one token more in its template")
    assert stub.requests[0]["messages"][0]["role"] == "user"
    assert stub.requests[-1]["chat_template_kwargs"] == {"enable_thinking": False}
    assert "the server counts +1 prompt tokens against ours: one token more in its template." in found.notes


def test_a_server_that_does_not_repeat_itself(stub: Stub) -> None:
    stub.answer = lambda text, asked: f"{needle(text)} {asked}"
    _, found = probed(stub, concurrency=2)
    assert (found.repeats, found.concurrency) == (False, 1)
    assert "the server answered one greedy prompt in two ways: single answers are not repeatable." in found.notes


def test_concurrency_that_changes_answers(stub: Stub) -> None:
    stub.answer = lambda text, asked: f"{needle(text)} {asked if text.startswith('Room') else ''}"
    _, found = probed(stub, concurrency=2)
    assert (found.repeats, found.concurrency, found.concurrency_changes) == (True, 1, True)
    assert "requests at a time change the server's answers: one is sent at a time." in found.notes


def _plan(*replies: tuple[int, dict[str, str], str]) -> Callable[[Stub], None]:
    return lambda stub: stub.planned.extend(replies)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda stub: setattr(stub, "extra_tokens", lambda n_ids: n_ids // 2), "the tokenizer is not its model's"),
        (lambda stub: setattr(stub, "overlong", True), "tokens where 4 are asked for"),
        (lambda stub: setattr(stub, "model_said", "gpt-5"), "answers as 'gpt-5'"),
        (lambda stub: setattr(stub, "dies_after", 0), "cannot be reached"),
        (
            _plan(*[(500, {}, "<html>oops</html>")] * 30),
            "does not answer completions requests: HTTP 500: a page of HTML",
        ),
        (_plan(*[(200, {}, '{"choices": []}')] * 9), "the reply has no choices"),
        (_plan(*[(200, {}, '{"choices": [{"index": 0}]}')] * 9), "first choice has no text"),
        (_plan(*[(401, {}, "{}")] * 9), "HTTP 401: it asks for an API key"),
    ],
)
def test_servers_that_are_refused(stub: Stub, change: Callable[[Stub], None], said: str) -> None:
    change(stub)
    with pytest.raises(UsageError) as raised:
        probed(stub)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("models", "asked", "said"),
    [
        ("<html>a login page</html>", None, "does not list its models: no whole JSON, but '<html>a login page</html>'"),
        ({"data": "none"}, None, "which is no list of models"),
        ({"data": []}, None, "lists no model"),
        ({"data": [{"id": "one"}, {"id": "two"}]}, None, r"has 2 models: say which with --served-model (one, two)"),
        ({"data": [{"id": "llama-8b"}]}, "llama-8", "has no model 'llama-8'. Did you mean 'llama-8b'?"),
    ],
)
def test_lists_of_models_that_do_not_do(stub: Stub, models: Any, asked: str | None, said: str) -> None:
    stub.models = models
    with pytest.raises(UsageError) as raised:
        describe_server(Client(stub.url), model=asked)
    assert said in str(raised.value)


def test_a_path_that_is_none(stub: Stub) -> None:
    with pytest.raises(UsageError, match=r"the URL of most ends in /v1"):
        describe_server(Client(stub.url.removesuffix("/v1")), model=None)


@pytest.mark.parametrize(
    ("entry", "context_tokens", "source"),
    [
        ({"max_model_len": 32768}, 32768, "max_model_len of /models"),
        ({"owned_by": "llamacpp", "meta": {"n_ctx_train": 8192, "n_ctx": 1024}}, 1024, "meta.n_ctx of /models"),
        ({"owned_by": "llamacpp", "meta": {"n_ctx_train": 8192}}, None, None),
        ({"owned_by": "local"}, None, None),
    ],
)
def test_how_long_a_prompt_may_be(stub: Stub, entry: dict[str, Any], context_tokens: int | None, source: str) -> None:
    stub.models = {"data": [{"id": "stub", **entry}]}
    found = describe_server(Client(stub.url), model=None)
    assert (found.context_tokens, found.context_from) == (context_tokens, source)


def test_an_alias_is_a_name(stub: Stub) -> None:
    stub.models = {"data": [{"id": "a/b.gguf", "aliases": ["small"]}]}
    assert describe_server(Client(stub.url), model="small").model == "small"


def test_what_no_row_could_hold_is_left_out(stub: Stub) -> None:
    usage = {"prompt_tokens": 2**60, "completion_tokens": True}
    said = {"choices": [{"text": "half a smile \ud83d", "finish_reason": "x" * 2000}], "usage": usage, "model": 7}
    stub.planned.append((200, {}, json.dumps(said)))
    answer = ask(Client(stub.url), Manner(model="stub", form="text"), served_prompt("Hello"), max_new_tokens=4)
    assert answer.text == "half a smile \ufffd"
    assert (answer.prompt_tokens, answer.completion_tokens, answer.finish_reason, answer.model) == (None,) * 4


def test_thoughts_without_an_answer_are_no_answer(stub: Stub) -> None:
    said = {"choices": [{"message": {"content": None, "reasoning_content": "hmm"}, "finish_reason": "length"}]}
    stub.planned.append((200, {}, json.dumps(said)))
    answer = ask(Client(stub.url), Manner(model="stub", form="messages"), served_prompt("Hello"), max_new_tokens=4)
    assert isinstance(answer, Answer)
    assert (answer.text, answer.finish_reason, answer.prompt_tokens, answer.model) == ("", "length", None, None)
    said["choices"][0]["message"] = {"content": None}
    stub.planned.append((200, {}, json.dumps(said)))
    with pytest.raises(UnusableAnswer):
        ask(Client(stub.url), Manner(model="stub", form="messages"), served_prompt("Hello"), max_new_tokens=4)
