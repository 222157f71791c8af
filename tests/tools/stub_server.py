"""A small OpenAI-compatible server in a thread, with the faults of real ones: each is a switch or a planned reply.

It answers a prompt with the last number of seven digits in it, the needle of ``niah_single_1``, or with a sum.
"""

import json
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.served import client
from kvscope.harness.served.address import KEY_VARIABLE
from kvscope.harness.served.asking import ServedPrompt

KEY = "sk-very-secret-7f3a"


@cache
def reference_tokenizer() -> Any:
    """Return the tokenizer that the stub counts by."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(REFERENCE_MODEL_FOLDER))


def served_prompt(text: str) -> ServedPrompt:
    """Return a text as a prompt of that tokenizer."""
    return ServedPrompt(ids=tuple(reference_tokenizer()(text)["input_ids"]), text=text, message=text)


class Stub:
    """What the server does. Everything may be changed while it runs.

    Attributes:
        models: entries of ``/models``.
        planned: replies to the next POSTs, each (status, headers, body text); None of them is an answer.
        requests: bodies of all POSTs, and headers of all requests.
        key: asked for, where it is not None.
        token_ids: whether prompts of ids are taken.
        unknown: fields that are refused.
        extra_tokens: counted on top of the prompt's.
        usage: whether it counts at all.
        answer: (prompt text, how often it was asked before) -> text.
        finish_reason, model_said: what replies say.
        overlong: whether ``max_tokens`` is ignored.
        cut_from: prompts of more tokens are cut to as many, without a word.
        dies_after: POSTs that are answered; then connections are closed without a word.
    """

    def __init__(self) -> None:
        self.models: Any = {"object": "list", "data": [{"id": "stub", "owned_by": "tests", "max_model_len": 4096}]}
        self.planned: deque[tuple[int, dict[str, str], str]] = deque()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.key: str | None = None
        self.token_ids = True
        self.unknown: set[str] = set()
        self.extra_tokens: int | Callable[[int], int] = 0
        self.usage = True
        self.answer: Callable[[str, int], str] = lambda text, asked: needle(text)
        self.finish_reason = "stop"
        self.model_said: str | None = "stub"
        self.overlong = False
        self.cut_from: int | None = None
        self.dies_after: int | None = None
        self.url = ""
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()

    def get(self, path: str) -> tuple[int, dict[str, str], str]:
        """Answer a GET."""
        if path != "/v1/models":
            return 404, {}, json.dumps({"detail": "Not Found"})
        return 200, {}, self.models if isinstance(self.models, str) else json.dumps(self.models)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], str] | None:
        """Answer a POST; None closes the connection."""
        with self._lock:
            self.requests.append(body)
            if self.dies_after is not None:
                if self.dies_after == 0:
                    return None
                self.dies_after -= 1
            if self.planned:
                return self.planned.popleft()
        refused = sorted(self.unknown & body.keys())
        if refused:
            return 422, {}, json.dumps({"detail": f"Unexpected fields in the request: {refused}"})
        chat = path.endswith("/chat/completions")
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        if isinstance(prompt, list) and not self.token_ids:
            return 400, {}, json.dumps({"detail": "prompt must be a string."})
        return 200, {}, json.dumps(self._reply(prompt, body, chat=chat))

    def _reply(self, prompt: Any, body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
        tokenizer = reference_tokenizer()
        ids = prompt if isinstance(prompt, list) else tokenizer(prompt)["input_ids"]
        text = tokenizer.decode(ids, skip_special_tokens=True) if isinstance(prompt, list) else prompt
        with self._lock:
            asked = self._asked[text]
            self._asked[text] += 1
        said = tokenizer(self.answer(text, asked), add_special_tokens=False)["input_ids"]
        said = said if self.overlong else said[: body["max_tokens"]]
        answer = tokenizer.decode(said)
        extra = self.extra_tokens(len(ids)) if callable(self.extra_tokens) else self.extra_tokens
        counted = len(ids) + extra if self.cut_from is None else min(len(ids) + extra, self.cut_from)
        choice = {"message": {"role": "assistant", "content": answer}} if chat else {"text": answer}
        reply: dict[str, Any] = {"choices": [{"index": 0, "finish_reason": self.finish_reason, **choice}]}
        if self.model_said is not None:
            reply["model"] = self.model_said
        if self.usage:
            reply["usage"] = {"prompt_tokens": counted, "completion_tokens": len(said)}
        return reply


def needle(text: str) -> str:
    """Return the answer to ``niah_single_1``, and more behind it."""
    found = re.findall(r"\b\d{7}\b", text)
    return f" {found[-1]}.\nThe grass is green." if found else f" {sum(text.encode()) % 9973} is the sum."


@contextmanager
def stub_server() -> Iterator[Stub]:
    """Run a stub on a free port of this machine."""
    stub = Stub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet a reply: a second one would wait for the first one's receipt

        def do_GET(self) -> None:
            self._answer(lambda: stub.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(lambda: stub.post(self.path, body))

        def _answer(self, make: Callable[[], tuple[int, dict[str, str], str] | None]) -> None:
            stub.headers.append(dict(self.headers.items()))
            said = self.headers.get("Authorization", "")
            if stub.key is not None and said != f"Bearer {stub.key}":
                reply: Any = (401, {}, json.dumps({"error": {"message": f"bad key {said}"}}))
            else:
                reply = make()
            if reply is None:
                self.close_connection = True
                return
            status, headers, text = reply
            self.close_connection = "Content-Length" in headers  # one that promises more than there is
            data = text.encode()
            self.send_response(status)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(data)),
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """Return a stub that runs; nobody waits between tries."""
    no_pauses(monkeypatch)
    with stub_server() as running:
        yield running


def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let further tries follow at once, and take this machine's key away."""
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(client, "MOST_PAUSE_S", 0.0)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
