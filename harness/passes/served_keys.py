"""The keys of a configuration that are about a server, and those that make no sense of one."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from kvscope.errors import UsageError
from kvscope.harness.served.address import checked_url, is_url
from kvscope.specs import Spec, parse_spec
from kvscope.values import BadValue, read_value

SERVED_METHOD = "served"
"""What rows call the one method of a server: its own."""
SERVED_KEYS = (
    "served_model",
    "tokenizer",
    "api",
    "server_context_tokens",
    "concurrency",
    "request_timeout_s",
    "request_tries",
    "server_pid",
)
_ANY_MODEL = (
    *("model", "methods", "tasks", "lengths_tokens", "samples", "seed", "out", "max_new_tokens", "chat_template"),
    *("time_limit_s", "retry", "footprint"),
)
"""Keys that are about any model; all others are about one that kvscope runs itself."""


def served_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration with the method that a server has, and without a footprint.

    Raises:
        UsageError: other methods, or a footprint, are asked for; the URL is none.
    """
    model = values.get("model")
    if not isinstance(model, str) or not is_url(model):
        return values
    given = values.get("methods")
    several = given if isinstance(given, list | tuple) else [given] if given else []
    if [parse_spec(each, kind="method") for each in several] not in ([], [Spec(SERVED_METHOD)]):
        raise UsageError(
            "methods: a server has one method, its own, which rows call 'served': leave -m out with the URL of one."
        )
    if "footprint" in values and _is_true(values["footprint"]):
        raise UsageError(
            "footprint: kvscope cannot measure the cache of a server: leave --footprint out with the URL of a server "
            "(--server-pid adds what NVML says of its processes)."
        )
    return {**values, "model": checked_url(model), "methods": (Spec(SERVED_METHOD),), "footprint": False}


def check_served(model: str, methods: Sequence[Spec], tokenizer: str | None, *, changed: AbstractSet[str]) -> None:
    """Refuse keys that mean nothing of a server, and keys of a server without one.

    Args:
        model, methods, tokenizer: of the configuration.
        changed: keys whose values are not the defaults.

    Raises:
        UsageError: naming the first.
    """
    if not is_url(model):
        if extra := [key for key in SERVED_KEYS if key in changed]:
            raise UsageError(f"{extra[0]}: it is about a server: give --model its URL, or leave it out.")
        if any(spec.name == SERVED_METHOD for spec in methods):
            raise UsageError("methods: 'served' is what a server does: give --model its URL.")
        return
    if extra := sorted(changed - {*SERVED_KEYS, *_ANY_MODEL}):
        raise UsageError(
            f"{extra[0]}: it is about a model that kvscope runs itself: leave it out with the URL of a server."
        )
    if tokenizer is None:
        raise UsageError(
            "tokenizer: prompts of an exact length need the tokenizer of the server's model: give --tokenizer a "
            "folder, reference or a Hugging Face id."
        )


def _is_true(value: object) -> bool:
    try:
        return bool(read_value(bool, value))
    except BadValue:
        return False  # its own validator says what is wrong with it
