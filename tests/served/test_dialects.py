"""What other servers, gateways and networks do with a request: read as what it is, or named in a clause."""

import json
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
import requests
from stub_server import KEY, Stub, reference_tokenizer, served_prompt
from test_probe import probed

from kvscope.errors import UsageError
from kvscope.harness.served import client as module
from kvscope.harness.served.address import KEY_VARIABLE, checked_url, is_loopback
from kvscope.harness.served.asking import BROKEN_OFF, Answer, Manner, UnusableAnswer, ask
from kvscope.harness.served.client import Client, Refused, ServerGone, Unanswered
from kvscope.harness.served.error_words import error_words
from kvscope.harness.served.probe import probe
from kvscope.harness.served.server import describe_server

BODY = {"model": "stub", "prompt": "The sky is", "max_tokens": 4}
ANSWER = json.dumps({"choices": [{"text": "Grüße, 日本"}]}, ensure_ascii=False)


def answered(stub: Stub, choice: dict[str, Any], *, form: Any = "messages", key: str | None = None) -> Answer:
    stub.planned.append((200, {}, json.dumps({"choices": [choice]})))
    return ask(
        Client(stub.url, key=key, tries=1), Manner(model="stub", form=form), served_prompt("Hello"), max_new_tokens=4
    )


@pytest.mark.parametrize(
    ("content_type", "text"),
    [
        ("text/plain", ANSWER),
        ("text/json", ANSWER),
        ("application/json; charset=utf-8", "\ufeff" + ANSWER),
        ("application/json; charset=nonsense", ANSWER),
    ],
    ids=["no charset", "text", "BOM", "unknown charset"],
)
def test_json_is_utf_8_whatever_the_header_says(stub: Stub, content_type: str, text: str) -> None:
    stub.planned.append((200, {"Content-Type": content_type}, text))
    assert Client(stub.url, tries=1).post("completions", BODY)[0]["choices"][0]["text"] == "Grüße, 日本"


@pytest.mark.parametrize(
    "broken",
    [
        (200, {}, '{"usage": ' + "9" * 5000 + "}"),
        (200, {"Content-Encoding": "gzip"}, "no gzip"),
        (200, {}, json.dumps({"error": {"message": "overloaded", "code": 502}})),
        (200, {}, json.dumps({"error": "overloaded"})),
    ],
    ids=["a number of thousands of digits", "broken compression", "an error of 200", "an error in a word"],
)
def test_what_may_be_better_next_time_is_asked_for_again(stub: Stub, broken: tuple[int, dict[str, str], str]) -> None:
    reference_tokenizer()
    stub.planned.append(broken)
    assert Client(stub.url).post("completions", BODY)[1] == 2


def test_an_error_of_200_is_what_its_code_says(stub: Stub) -> None:
    stub.planned.append((200, {}, json.dumps({"error": {"message": "maximum context length is 8", "code": 400}})))
    with pytest.raises(Refused, match=r"^HTTP 400: maximum context length is 8$") as raised:
        Client(stub.url).post("completions", BODY)
    assert raised.value.overflow
    stub.planned.extend([(200, {}, json.dumps({"error": {"message": "overloaded"}}))] * 2)
    with pytest.raises(Unanswered, match=r"HTTP 200 with an error: overloaded \(2 tries\)"):
        Client(stub.url, tries=2).post("completions", BODY)


@pytest.mark.parametrize(
    ("said", "pause_s"),
    [
        (lambda: format_datetime(datetime.now(UTC) + timedelta(days=1), usegmt=True), 30.0),
        (lambda: format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True), 0.5),
        (lambda: "Tue, 01 Dec 2099 07:00:00", 30.0),
        (lambda: "12.5", 12.5),
        (lambda: "soon", 0.5),
        (lambda: "\u0661\u0662", 0.5),
        (lambda: "9" * 400, 0.5),
    ],
)
def test_when_to_ask_again(stub: Stub, said: Any, pause_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.5)
    monkeypatch.setattr(module, "MOST_PAUSE_S", 30.0)
    reply = requests.Response()
    reply.headers["Retry-After"] = said()
    assert min(30.0, max(0.5, module._retry_after_s(reply))) == pause_s


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (
            422,
            {"error": "Input validation error: `inputs` must have less than 4095 tokens", "error_type": "validation"},
        ),
        (400, {"error": {"message": "The decoder prompt is longer than the maximum model length of 4096."}}),
        (400, {"object": "error", "message": "Input length (5000 tokens) exceeds the maximum allowed length (4096)."}),
        (400, {"error": {"message": "Reduce your prompt.", "code": "context_length_exceeded"}}),
        (400, {"error": {"code": 400, "message": "the request exceeds the available context size"}}),
    ],
    ids=["TGI", "vLLM", "SGLang", "OpenAI", "llama.cpp"],
)
def test_an_overflow_is_told_in_every_dialect(stub: Stub, status: int, body: dict[str, Any]) -> None:
    stub.planned.append((status, {}, json.dumps(body)))
    with pytest.raises(Refused) as raised:
        Client(stub.url).post("completions", BODY)
    assert raised.value.overflow


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"error": {"error": {"message": "deep"}}}, "deep"),
        ([{"error": {"message": "in a list"}}], "in a list"),
        ({"detail": [{"loc": ["body", "seed"], "msg": "Field required"}]}, "body.seed: Field required"),
        ({"error": None, "message": "beside it"}, "beside it"),
        ({}, "{}"),
        ("a text", "a text"),
        (7, "7"),
    ],
)
def test_the_words_of_an_error(found: Any, words: str) -> None:
    assert error_words(found)[0] == words


def test_words_that_no_file_and_no_terminal_should_get(stub: Stub) -> None:
    stub.planned.append((400, {}, '{"error": "half \\ud83d and \\u001b[31m red"}'))
    with pytest.raises(Refused, match=r"^HTTP 400: half \ufffd and \ufffd\[31m red$"):
        Client(stub.url).post("completions", BODY)
    assert answered(stub, {"text": "a", "finish_reason": "\ud83d"}, form="text").finish_reason is None


def test_a_page_is_called_one(stub: Stub) -> None:
    stub.planned.append((404, {}, "<!DOCTYPE html>\n<title>nothing here</title>"))
    with pytest.raises(Refused, match=r"^HTTP 404: a page of HTML$"):
        Client(stub.url).post("completions", BODY)


@pytest.mark.parametrize("reason", BROKEN_OFF)
def test_an_answer_that_was_broken_off_is_none(stub: Stub, reason: str) -> None:
    with pytest.raises(UnusableAnswer, match=f"broke the answer off: '{reason}'"):
        answered(stub, {"text": " 1234567", "finish_reason": reason}, form="text")
    with pytest.raises(UnusableAnswer, match="broke the answer off: 'upstream died'"):
        answered(stub, {"message": {"content": " 12"}, "error": {"message": "upstream died"}})


def test_text_in_parts(stub: Stub) -> None:
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert answered(stub, {"message": {"content": parts}}).text == "one two"
    assert answered(stub, {"message": {"content": parts[:1]}}).text == ""
    for content in ([], ["one"], 7):
        with pytest.raises(UnusableAnswer):
            answered(stub, {"message": {"content": content}})


def test_a_key_in_a_reply_is_struck_out(stub: Stub) -> None:
    """A gateway that echoes its request would put it into rows and run.json; a placeholder is part of answers."""
    choice = {"text": f"you are {KEY}", "finish_reason": f"stop {KEY}"}
    answer = answered(stub, choice, form="text", key=KEY)
    assert (answer.text, answer.finish_reason) == ("you are ***", "stop ***")
    assert answered(stub, {"text": " EMPTY"}, form="text", key="EMPTY").text == " EMPTY"
    for key in (KEY, "EMPTY"):
        with pytest.raises(UnusableAnswer) as raised:
            answered(stub, {"told": f"{key} is bad"}, form="text", key=key)
        assert key not in str(raised.value)
        stub.planned.append((200, {}, json.dumps({"error": {"message": f"{key} is bad"}})))
        with pytest.raises(Unanswered, match=r"error: \*\*\* is bad"):
            Client(stub.url, key=key, tries=1).post("completions", BODY)


def test_who_is_not_let_in_is_told_the_servers_words(stub: Stub) -> None:
    stub.planned.append((403, {}, json.dumps({"error": {"message": f"{KEY} has no access to model 'stub'."}})))
    with pytest.raises(ServerGone, match=rf"{KEY_VARIABLE} \(it says: \*\*\* has no access to model 'stub'\)$"):
        Client(stub.url, key=KEY).post("completions", BODY)


def test_no_proxy_stands_before_this_host(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert Client(stub.url, tries=1).get("models")["data"]
    with pytest.raises(ServerGone, match="cannot be reached"):
        Client("http://model.invalid/v1", tries=1).get("models")
    assert [host for host in ("localhost", "127.0.0.2", "::1", "h", "10.0.0.1") if is_loopback(host)] == [
        "localhost",
        "127.0.0.2",
        "::1",
    ]


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate", "REQUESTS_CA_BUNDLE"),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number", "http:// alone"),
    ],
)
def test_a_connection_that_is_not_safe_has_a_hint(
    stub: Stub, said: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise requests.exceptions.SSLError(ssl.SSLError(1, f"{said} (_ssl.c:1006)"))

    monkeypatch.setattr(requests.Session, "request", fails)
    with pytest.raises(ServerGone, match=hint):
        Client(stub.url, tries=1).get("models")


def test_a_bundle_of_certificates_that_is_none(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/ca.pem")
    with pytest.raises(ServerGone, match=r"cannot be asked \(Could not find a suitable TLS CA certificate bundle"):
        Client(stub.url.replace("http:", "https:"), tries=1).get("models")


@pytest.mark.parametrize("bad", ["http://a..b/v1", f"http://{'a' * 70}.x/v1", "http://host:99999/v1", "http://[::1/v1"])
def test_hosts_that_can_be_none(bad: str) -> None:
    with pytest.raises(UsageError, match="is not the URL of a server"):
        checked_url(bad)


@pytest.mark.parametrize("bad", ["http://host/v1?", "http://host/v1#"])
def test_an_empty_query_is_one(bad: str) -> None:
    with pytest.raises(UsageError, match="a query or a fragment"):
        checked_url(bad)


def test_an_address_of_six_parts() -> None:
    assert checked_url("http://[::1]:8000/v1/") == "http://[::1]:8000/v1"


@pytest.mark.parametrize(
    ("models", "name"),
    [
        ([{"id": "one"}], "one"),
        ({"data": [{"id": "one"}, {"id": "one"}]}, "one"),
        ({"data": [{"id": "/m/l/"}]}, "/m/l/"),
    ],
    ids=["a bare list", "one twice", "a folder"],
)
def test_lists_of_models(stub: Stub, models: Any, name: str) -> None:
    stub.models = models
    assert describe_server(Client(stub.url), model=None).model == name


def test_a_server_without_models(stub: Stub) -> None:
    for entries in (None, [], [{"id": "a\nb"}], [{"id": "\ud83d"}], [{"id": 3}]):
        stub.models = {"object": "list", "data": entries}
        with pytest.raises(UsageError, match="lists no model"):
            describe_server(Client(stub.url), model=None)
    stub.models = {"data": [{"id": "stub", "max_model_len": True}]}
    assert describe_server(Client(stub.url), model=None).context_tokens is None


def test_a_server_that_has_no_list_of_models(stub: Stub) -> None:
    real = stub.get
    stub.get = lambda path: (404, {}, "{}")  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="is no path of an OpenAI-compatible server"):
        describe_server(Client(stub.url), model=None)
    found = describe_server(Client(stub.url), model="stub")
    assert (found.model, found.listed, found.context_tokens) == ("stub", False, None)
    asked = {"api": "completions", "bos": "", "concurrency": 1, "context_tokens": 4096, "context_from": "the test"}
    assert probe(Client(stub.url), found, served_prompt, **asked)[0].form == "token_ids"  # type: ignore[arg-type]
    stub.post = lambda path, body: (404, {}, "{}")  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=r"has no list of models, and does not answer completions .* ends in /v1"):
        probe(Client(stub.url), found, served_prompt, **asked)  # type: ignore[arg-type]
    stub.get = real  # type: ignore[method-assign]
    assert describe_server(Client(stub.url), model="stub").listed


def test_a_busy_moment_in_the_probe_changes_nothing(stub: Stub) -> None:
    """A field, or ids, that met a 429 would else count as refused: other prompts, and another run."""
    quiet, _ = probed(stub)
    real, n_asked = stub.post, [0]

    def post(path: str, body: dict[str, Any]) -> Any:
        n_asked[0] += 1
        return (429, {}, "{}") if n_asked[0] % 2 else real(path, body)

    stub.post = post  # type: ignore[method-assign]
    assert probed(stub) == (quiet, _)


def test_a_folder_s_name_is_the_model_s(stub: Stub) -> None:
    stub.models, stub.model_said = {"data": [{"id": "/m/llama/"}]}, "/m/other/"
    with pytest.raises(UsageError, match="answers as '/m/other/'"):
        probed(stub)
    stub.model_said = "llama"
    assert probed(stub)[0].model == "/m/llama/"
