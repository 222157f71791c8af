"""Where a server is, and the key that it asks for."""

import os
from ipaddress import ip_address
from urllib.parse import urlsplit

from kvscope.errors import UsageError, shown

KEY_VARIABLE = "KVSCOPE_API_KEY"
"""Environment variable of the server's API key: the one place it is read from."""


def is_url(spec: str) -> bool:
    """Whether a model is asked for by the URL of a server."""
    return spec.lower().startswith(("http://", "https://"))


def is_loopback(host: str) -> bool:
    """Whether a host is this one, by its name or address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def checked_url(given: str) -> str:
    """Return the base URL of an API without a slash at its end.

    Raises:
        UsageError: it has no host that could be one, or holds what would be written down with it: a password, a query.
    """
    try:
        parts = urlsplit(given)
        host, port = parts.hostname, parts.port
        (host or "").encode("idna")  # labels that are empty or too long
    except ValueError:
        host = port = None
    else:
        if parts.username is not None or parts.password is not None or "?" in given or "#" in given:
            raise UsageError(
                "The URL of a server holds a user, a password, a query or a fragment, which run.json would keep: give "
                f"http://HOST:PORT/v1 alone, and a key in {KEY_VARIABLE}."
            )
    if not host or any(character.isspace() for character in given):
        raise UsageError(f"{shown(given)} is not the URL of a server: write http://HOST:PORT/v1.")
    del port  # read, so that one that is none is refused
    return given.rstrip("/")


def key_from_environment() -> str | None:
    """Return the API key; None where none is set.

    Raises:
        UsageError: it holds what no header can.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if key and not (key.isascii() and key.isprintable()):
        raise UsageError(f"{KEY_VARIABLE} holds characters that no header can: set it again.")
    return key or None
