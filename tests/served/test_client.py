"""Requests: what is tried again and for how long, what is refused at once, and where the key may stand."""

import json
from typing import Any

import pytest
import requests
from stub_server import KEY, Stub

from kvscope.errors import UsageError
from kvscope.harness.served import client as module
from kvscope.harness.served.address import KEY_VARIABLE, checked_url, is_url, key_from_environment
from kvscope.harness.served.client import Client, Refused, ServerGone, Unanswered

BODY = {"model": "stub", "prompt": "The sky is", "max_tokens": 4}


def test_a_busy_server_is_asked_again_with_growing_pauses(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.5)
    monkeypatch.setattr(module, "MOST_PAUSE_S", 30.0)
    slept: list[float] = []
    stub.planned.extend([(429, {}, "{}"), (503, {"Retry-After": "7"}, "{}"), (500, {"Retry-After": "9999"}, "{}")])
    reply, tries = Client(stub.url, sleep=slept.append).post("completions", BODY)
    assert reply["choices"]
    assert tries == 4
    assert slept == [0.5, 7.0, 30.0]


@pytest.mark.parametrize(
    "broken",
    [
        (200, {}, '{"choices": [{"text": "cut o'),
        (200, {"Content-Length": "4000"}, '{"choices": []}'),
        (200, {}, "<html><body>proxy</body></html>"),
        (408, {}, "{}"),
        (200, {}, "[" * 100_000),
    ],
    ids=["truncated JSON", "connection cut off", "HTML", "time-out said", "a bomb of brackets"],
)
def test_half_an_answer_is_asked_for_again(stub: Stub, broken: tuple[int, dict[str, str], str]) -> None:
    stub.planned.append(broken)
    reply, tries = Client(stub.url, timeout_s=1.0).post("completions", BODY)
    assert reply["choices"]
    assert tries == 2


def test_a_server_that_stays_broken_is_named_with_its_words(stub: Stub) -> None:
    stub.planned.extend([(500, {}, json.dumps({"error": {"message": "CUDA error"}}))] * 3)
    with pytest.raises(Unanswered, match=r"^HTTP 500: CUDA error \(3 tries\)$"):
        Client(stub.url, tries=3).post("completions", BODY)
    assert len(stub.requests) == 3


def test_a_time_out_is_tried_again(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def late(*_: Any, **given: Any) -> None:
        asked.append(given["timeout"])
        raise requests.ReadTimeout

    monkeypatch.setattr(requests.Session, "request", late)
    with pytest.raises(Unanswered, match=r"no answer within 3 s \(2 tries\)"):
        Client(stub.url, timeout_s=3.0, tries=2).post("completions", BODY)
    assert asked == [(3.0, 3.0)] * 2


def test_a_host_that_takes_no_connection_is_gone(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise requests.ConnectTimeout

    monkeypatch.setattr(requests.Session, "request", unreachable)
    with pytest.raises(ServerGone, match=r"cannot be reached \(no connection in time\)"):
        Client(stub.url, tries=2).post("completions", BODY)


def test_what_is_refused_is_not_sent_again(stub: Stub) -> None:
    stub.planned.append((400, {}, json.dumps({"message": "This model's maximum context length is 4096 tokens."})))
    with pytest.raises(Refused) as raised:
        Client(stub.url).post("completions", BODY)
    assert raised.value.overflow
    stub.planned.append((400, {}, json.dumps({"detail": "prompt must be a string."})))
    with pytest.raises(Refused, match=r"^HTTP 400: prompt must be a string\.$") as raised:
        Client(stub.url).post("completions", BODY)
    assert not raised.value.overflow
    assert len(stub.requests) == 2


def test_no_redirection_is_followed(stub: Stub) -> None:
    stub.planned.append((307, {"Location": "http://elsewhere/v1/completions"}, ""))
    with pytest.raises(Refused, match=r"sends us to 'http://elsewhere/v1': give that URL instead"):
        Client(stub.url, key=KEY).post("completions", BODY)


def test_nobody_there(stub: Stub) -> None:
    stub.dies_after = 0
    with pytest.raises(ServerGone, match=r"cannot be reached \(Remote end closed connection without response\)$"):
        Client(stub.url, tries=2).post("completions", BODY)
    assert len(stub.requests) == 2


def test_the_key_is_sent_and_stands_in_no_message(stub: Stub, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    Client(stub.url).get("models")
    assert "Authorization" not in stub.headers[-1]
    stub.key = KEY
    Client(stub.url, key=KEY).get("models")
    assert stub.headers[-1]["Authorization"] == f"Bearer {KEY}"
    with pytest.raises(ServerGone, match=f"HTTP 401: it asks for an API key: set {KEY_VARIABLE}"):
        Client(stub.url).get("models")
    for status in (400, 500):
        stub.planned.append((status, {}, json.dumps({"error": {"message": f"key {KEY} has no quota"}})))
        with pytest.raises((Refused, Unanswered), match=r"key \*\*\* has no quota"):
            Client(stub.url, key=KEY, tries=1).post("completions", BODY)
    stub.planned.append((200, {}, f"no JSON but {KEY}"))
    with pytest.raises(Unanswered, match=r"no JSON but \*\*\*"):
        Client(stub.url, key=KEY, tries=1).post("completions", BODY)


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert key_from_environment() is None
    monkeypatch.setenv(KEY_VARIABLE, f" {KEY}\n")
    assert key_from_environment() == KEY
    monkeypatch.setenv(KEY_VARIABLE, "two\nlines")
    with pytest.raises(UsageError, match="characters that no header can") as raised:
        key_from_environment()
    assert "two" not in str(raised.value)


def test_what_is_a_url() -> None:
    assert is_url("http://localhost:8000/v1")
    assert is_url("HTTPS://host/v1")
    assert not is_url("reference")
    assert not is_url("./http")
    assert checked_url("http://localhost:8000/v1/") == "http://localhost:8000/v1"
    for bad in ("http://", "http://:80/v1", "http://host:port/v1", "http://a b/v1"):
        with pytest.raises(UsageError, match="is not the URL of a server"):
            checked_url(bad)
    for secret in (f"http://user:{KEY}@host/v1", f"http://host/v1?key={KEY}", "http://host/v1#top"):
        with pytest.raises(UsageError, match=r"which run\.json would keep") as raised:
            checked_url(secret)
        assert KEY not in str(raised.value)
