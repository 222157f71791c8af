"""Requests to an OpenAI-compatible server: JSON in, JSON out, tried again where that may help."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from kvscope.errors import EnvironmentProblem, KvscopeError, shown
from kvscope.files import first_line
from kvscope.harness.served.address import KEY_VARIABLE, is_loopback
from kvscope.harness.served.error_words import error_words

if TYPE_CHECKING:
    import requests

CONNECT_TIMEOUT_S = 10.0
FIRST_PAUSE_S, MOST_PAUSE_S = 0.5, 30.0
_MOST_SHOWN_CHARACTERS = 300
_ERRNO = re.compile(r"\[Errno -?\d+\] ")
_SECRET_CHARACTERS = 16
"""A key of so many is a secret; a shorter one (``EMPTY``, ``none``) may stand in an answer by itself."""
#: What servers say of a prompt that is too long (vLLM, SGLang, llama.cpp, TGI, OpenAI).
_OVERFLOW_WORDS = (
    *("context length", "context_length", "context size", "context window", "maximum context", "too long"),
    *("max_model_len", "maximum model length", "maximum allowed length", "must have less than", "max_new_tokens` must"),
)


class RequestFailed(KvscopeError):  # noqa: N818 - it says what happened
    """A request has no answer to use; the message is one clause."""


class Refused(RequestFailed):
    """The server refuses this request (4xx): the same again would be refused again.

    Attributes:
        status: of HTTP.
        overflow: whether it says that the prompt is longer than its context.
    """

    def __init__(self, status: int, said: str, *, code: str = "") -> None:
        super().__init__(f"HTTP {status}: {said}")
        self.status = status
        told = f"{said} {code}".lower()
        self.overflow = status in (400, 413, 422) and any(word in told for word in _OVERFLOW_WORDS)


class Unanswered(RequestFailed):
    """No try got an answer to use: the server is busy or broken, too slow, or says no JSON."""


class _NoJson(Exception):  # noqa: N818 - it says what happened
    """A body cannot be read."""


class ServerGone(EnvironmentProblem):
    """Nothing listens there any more, or the server no longer lets us in."""


class Client:
    """A server under one base URL.

    A request is tried again after 408, 429, 5xx, a time-out, a connection that breaks or is refused, and an answer that
    is no JSON (cut off on the way). Pauses double from half a second on, to 30 s; ``Retry-After`` counts up to there.
    JSON is read as UTF-8, whatever the header says. No proxy stands before this host's own addresses.

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
        host = urlsplit(url).hostname or ""
        self._proxies = {"no_proxy": host} if is_loopback(host) else None

    def close(self) -> None:
        """Close the connections."""
        self._session.close()

    def get(self, path: str, *, tries: int | None = None) -> Any:
        """Return the JSON at a path below the URL, or at ``/path`` of its host.

        Args:
            tries: most times that it is asked for; None: the client's.

        Raises:
            Refused, Unanswered, ServerGone: as ``post``.
        """
        return self._send("GET", path, None, tries)[0]

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[Any, int]:
        """Return (the JSON that answers a body, how often it was sent).

        Raises:
            Refused: the server does not take this request.
            Unanswered: no try was answered in a way that can be used.
            ServerGone: nothing listens there, or the key is not (any longer) good.
        """
        return self._send("POST", path, body, None)

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
                    proxies=self._proxies,
                )
                problem = self._problem(reply, path)
                if problem is None:
                    found = self._read(reply)
                    problem = self._error_in(found)
                    if problem is None:
                        return found, count
                pause_s = max(pause_s, min(MOST_PAUSE_S, _retry_after_s(reply)))
            except requests.ConnectTimeout:
                problem = ServerGone(f"The server at {self.url} cannot be reached (no connection in time)")
            except requests.Timeout:
                problem = Unanswered(f"no answer within {self._timeout_s:g} s")
            except requests.exceptions.SSLError as error:
                problem = ServerGone(f"The server at {self.url} cannot be reached ({_tls_problem(error)})")
            except (
                requests.ConnectionError,
                requests.exceptions.ChunkedEncodingError,
                requests.exceptions.ContentDecodingError,
            ) as error:
                problem = ServerGone(f"The server at {self.url} cannot be reached ({self.redacted(_cause(error))})")
            except (_NoJson, RecursionError):
                problem = Unanswered(f"no whole JSON, but {shown(self.redacted(_text(reply)))}")
            except requests.RequestException as error:
                raise Unanswered(self.redacted(_cause(error))) from error
            except OSError as error:  # what requests says of a REQUESTS_CA_BUNDLE that is no file
                raise ServerGone(f"The server at {self.url} cannot be asked ({first_line(error)})") from error
            if count < most:
                self._sleep(pause_s)
        assert problem is not None  # there is one try at least
        raise Unanswered(f"{problem} ({most} tries)") if isinstance(problem, Unanswered) and most > 1 else problem

    def _problem(self, reply: requests.Response, path: str) -> KvscopeError | None:
        """Return why an answer cannot be used but may be at another try; None where it can.

        Raises:
            Refused, ServerGone: no other try would help.
        """
        status = reply.status_code
        if 300 <= status < 400:
            # What is to be given is a base URL, without the path that was asked for.
            where = urljoin(str(reply.url), reply.headers.get("Location", "")).rstrip("/").removesuffix(f"/{path}")
            raise Refused(status, f"it sends us to {shown(self.redacted(where))}: give that URL instead")
        if status < 400:
            return None
        said, code = self._said(reply)
        if status in (408, 429) or status >= 500:
            return Unanswered(f"HTTP {status}: {said}")
        if status in (401, 403):
            asked = "it does not take the key in" if self._key else "it asks for an API key: set"
            raise ServerGone(
                f"The server at {self.url} answers HTTP {status}: {asked} {KEY_VARIABLE} (it says: {said.rstrip('.')})"
            )
        raise Refused(status, said, code=code)

    def _error_in(self, found: Any) -> KvscopeError | None:
        """Return the error that a reply is in spite of its HTTP 200, as gateways send it; None where it is none.

        Raises:
            Refused: it has a code of HTTP that says so.
        """
        if not isinstance(found, dict) or not found.get("error") or found.get("choices"):
            return None
        said, code = error_words(found)
        said = self._short(said)
        if code.isascii() and code.isdecimal() and 400 <= int(code[:9]) < 500 and code not in ("408", "429"):
            raise Refused(int(code), said)
        return Unanswered(f"HTTP 200 with an error: {said}")

    def _said(self, reply: requests.Response) -> tuple[str, str]:
        """Return (what an error says, on one line; its code)."""
        text = _text(reply)
        try:
            text, code = error_words(json.loads(text))
        except (ValueError, RecursionError):
            code = ""
            if any(mark in text[:1000].lower() for mark in ("<html", "<!doctype")):
                text = "a page of HTML"
        return self._short(text), code

    def _short(self, text: str) -> str:
        flat = " ".join(self.redacted(text).split()) or "nothing"
        # A terminal obeys some characters, and no file takes half a surrogate pair.
        flat = "".join(character if character.isprintable() else "\ufffd" for character in flat)
        return flat if len(flat) <= _MOST_SHOWN_CHARACTERS else f"{flat[:_MOST_SHOWN_CHARACTERS]}..."

    def _read(self, reply: requests.Response) -> Any:
        text = _text(reply)
        if self._key and len(self._key) >= _SECRET_CHARACTERS:
            text = self.redacted(text)
        try:
            return json.loads(text)
        except ValueError as error:  # a number of thousands of digits is one, too
            raise _NoJson from error

    def _place(self, path: str) -> str:
        if path.startswith("/"):
            parts = urlsplit(self.url)
            return f"{parts.scheme}://{parts.netloc}{path}"
        return f"{self.url}/{path}"

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def redacted(self, text: str) -> str:
        """Return a text with the key struck out."""
        return text if not self._key else text.replace(self._key, "***")


def _text(reply: requests.Response) -> str:
    """Return a body as text: JSON is UTF-8, and an answer that was cut may end in a part of a character."""
    return reply.content.decode("utf-8-sig", errors="replace")


def _retry_after_s(reply: requests.Response) -> float:
    """Return how long a server asks us to wait: a number of seconds, or a date; 0 where it says neither."""
    text = reply.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", text):
        return float(text)
    try:
        then = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return 0.0
    then = then if then.tzinfo is not None else then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())


def _tls_problem(error: Exception) -> str:
    cause = _cause(error)
    if "CERTIFICATE_VERIFY_FAILED" in cause:
        return f"{cause}; REQUESTS_CA_BUNDLE=FILE names a certificate to trust"
    if "WRONG_VERSION_NUMBER" in cause:
        return f"{cause}; does it speak http:// alone?"
    return cause


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
    text = _ERRNO.sub("", text.rpartition(": ")[2]).rstrip(".")
    return (text.rstrip(")") if text.count(")") > text.count("(") else text) or type(inner).__name__
