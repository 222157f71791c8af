"""Requests to an OpenAI-compatible server: JSON in, JSON out, tried again where that may help."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from kvscope.errors import EnvironmentProblem, KvscopeError, shown
from kvscope.files import first_line
from kvscope.harness.served.address import KEY_VARIABLE

if TYPE_CHECKING:
    import requests

CONNECT_TIMEOUT_S = 10.0
FIRST_PAUSE_S, MOST_PAUSE_S = 0.5, 30.0
_MOST_SHOWN_CHARACTERS = 300
_ERRNO = re.compile(r"\[Errno -?\d+\] ")
#: What servers say of a prompt that is too long (vLLM, SGLang, llama.cpp, OpenAI).
_OVERFLOW_WORDS = ("context length", "context size", "context window", "maximum context", "too long", "max_model_len")


class RequestFailed(KvscopeError):  # noqa: N818 - it says what happened
    """A request has no answer to use; the message is one clause."""


class Refused(RequestFailed):
    """The server refuses this request (4xx): the same again would be refused again.

    Attributes:
        status: of HTTP.
        overflow: whether it says that the prompt is longer than its context.
    """

    def __init__(self, status: int, said: str) -> None:
        super().__init__(f"HTTP {status}: {said}")
        self.status = status
        self.overflow = status in (400, 413, 422) and any(word in said.lower() for word in _OVERFLOW_WORDS)


class Unanswered(RequestFailed):
    """No try got an answer to use: the server is busy or broken, too slow, or says no JSON."""


class ServerGone(EnvironmentProblem):
    """Nothing listens there any more, or the server no longer lets us in."""


class Client:
    """A server under one base URL.

    A request is tried again after 408, 429, 5xx, a time-out, a connection that breaks or is refused, and an answer that
    is no JSON (cut off on the way). Pauses double from half a second on, to 30 s; ``Retry-After`` counts up to there.

    Args:
        url: of the API, as ``http://HOST:PORT/v1``.
        key: the API key; None for none. It stands in no message: what a server says of it is struck out.
        timeout_s: longest time that the server may be silent.
        tries: most times that a request is sent.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        timeout_s: float = 600.0,
        tries: int = 6,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        import requests  # a fifth of a second, for runs that ask no server

        self.url = url
        self._key = key
        self._timeout_s, self._tries, self._sleep = timeout_s, tries, sleep
        self._session = requests.Session()
        self._session.auth = self._authorize  # given, so that no ~/.netrc is looked into

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def get(self, path: str, *, tries: int | None = None) -> Any:
        """Return the JSON at a path below the URL, or at ``/path`` of its host.

        Raises:
            Refused, Unanswered, ServerGone: as ``post``.
        """
        return self._send("GET", path, None, tries)[0]

    def post(self, path: str, body: Mapping[str, Any], *, tries: int | None = None) -> tuple[Any, int]:
        """Return (the JSON that answers a body, how often it was sent).

        Args:
            tries: most times that it is sent; None: the client's.

        Raises:
            Refused: the server does not take this request.
            Unanswered: no try was answered in a way that can be used.
            ServerGone: nothing listens there, or the key is not (any longer) good.
        """
        return self._send("POST", path, body, tries)

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None, tries: int | None) -> tuple[Any, int]:
        import requests

        most = self._tries if tries is None else tries
        problem: KvscopeError | None = None
        for count in range(1, most + 1):
            pause_s = min(MOST_PAUSE_S, FIRST_PAUSE_S * 2 ** (count - 1))
            try:
                reply = self._session.request(
                    method,
                    self._place(path),
                    json=body,
                    timeout=(min(CONNECT_TIMEOUT_S, self._timeout_s), self._timeout_s),
                    allow_redirects=False,
                )
                problem = self._problem(reply)
                if problem is None:
                    return reply.json(), count
                pause_s = max(pause_s, min(MOST_PAUSE_S, _retry_after_s(reply)))
            except requests.ConnectTimeout:
                problem = ServerGone(f"The server at {self.url} cannot be reached (no connection in time)")
            except requests.Timeout:
                problem = Unanswered(f"no answer within {self._timeout_s:g} s")
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
                problem = ServerGone(f"The server at {self.url} cannot be reached ({self._redacted(_cause(error))})")
            except (requests.exceptions.JSONDecodeError, RecursionError):
                problem = Unanswered(f"no whole JSON, but {shown(self._redacted(reply.text))}")
            except requests.RequestException as error:
                raise Unanswered(self._redacted(_cause(error))) from error
            if count < most:
                self._sleep(pause_s)
        assert problem is not None  # there is one try at least
        raise Unanswered(f"{problem} ({most} tries)") if isinstance(problem, Unanswered) and most > 1 else problem

    def _problem(self, reply: requests.Response) -> KvscopeError | None:
        """Return why an answer cannot be used but may be at another try; None where it can.

        Raises:
            Refused, ServerGone: no other try would help.
        """
        status = reply.status_code
        if status in (408, 429) or status >= 500:
            return Unanswered(f"HTTP {status}: {self._said(reply)}")
        if status in (401, 403):
            asked = "it does not take the key in" if self._key else "it asks for an API key: set"
            raise ServerGone(f"The server at {self.url} answers HTTP {status}: {asked} {KEY_VARIABLE}")
        if 300 <= status < 400:
            where = self._redacted(reply.headers.get("Location", "another place"))
            raise Refused(status, f"it sends us to {shown(where)}: give that URL instead")
        if status >= 400:
            raise Refused(status, self._said(reply))
        return None

    def _said(self, reply: requests.Response) -> str:
        """Return what an error says, on one line."""
        import requests

        text = reply.text
        try:
            found = reply.json()
        except (requests.exceptions.JSONDecodeError, RecursionError):
            found = None
        if isinstance(found, dict):
            inner = found.get("error", found)
            text = str(inner.get("message") or inner.get("detail") or inner) if isinstance(inner, dict) else str(inner)
        elif "<html" in text[:1000].lower():
            text = "a page of HTML"
        flat = " ".join(self._redacted(text).split()) or "nothing"
        return flat if len(flat) <= _MOST_SHOWN_CHARACTERS else f"{flat[:_MOST_SHOWN_CHARACTERS]}..."

    def _place(self, path: str) -> str:
        if path.startswith("/"):
            parts = urlsplit(self.url)
            return f"{parts.scheme}://{parts.netloc}{path}"
        return f"{self.url}/{path}"

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _redacted(self, text: str) -> str:
        return text if not self._key else text.replace(self._key, "***")


def _retry_after_s(reply: requests.Response) -> float:
    text = reply.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdecimal() else 0.0


def _cause(error: BaseException) -> str:
    """Return the innermost reason of a failed connection."""
    inner: Any = error
    while True:
        inside = [getattr(inner, "reason", None), *inner.args]
        deeper = next((each for each in inside if isinstance(each, BaseException)), None)
        if deeper is None:
            break
        inner = deeper
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    text = first_line(inner) if isinstance(inner, Exception) else str(inner)
    return _ERRNO.sub("", text.rpartition(": ")[2]).rstrip(".)") or type(inner).__name__
