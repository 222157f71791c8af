"""What a server says of itself before it is asked anything: its models, and how long a prompt may be."""

from dataclasses import dataclass
from typing import Any

from kvscope.errors import UsageError, did_you_mean, shown
from kvscope.harness.served.address import KEY_VARIABLE
from kvscope.harness.served.client import Client, Refused, RequestFailed, ServerGone, Unanswered

_MOST_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that is there.

    Attributes:
        url: base URL of its API.
        model: the name it knows the model by.
        software: what it is, where it says so: ``owned_by`` of its model, or ``llama.cpp``.
        context_tokens: longest prompt plus answer, as it says; None where it does not.
        context_from: where it says that.
        listed: whether it lists its models; else its name is what was asked for.
    """

    url: str
    model: str
    software: str | None
    context_tokens: int | None
    context_from: str | None
    listed: bool = True


def describe_server(client: Client, *, model: str | None) -> Server:
    """Ask a server which models it has.

    Args:
        model: the name asked for; None for the only one there is.

    Raises:
        UsageError: no server of this API is there, it does not let us in, or it has no such model.
    """
    try:
        listed = client.get("models", tries=1)
    except ServerGone as error:
        mend = "" if KEY_VARIABLE in str(error) else ": start it, or check --model"
        raise UsageError(f"{error}{mend}.") from error
    except Refused as error:
        if model is not None and error.status in (404, 405):  # some gateways have no list: the probe asks the model
            return Server(
                url=client.url, model=model, software=None, context_tokens=None, context_from=None, listed=False
            )
        raise UsageError(
            f"{client.url}/models is no path of an OpenAI-compatible server ({error}): the URL of most ends in /v1."
        ) from error
    except Unanswered as error:
        raise UsageError(f"The server at {client.url} does not list its models: {error}.") from error
    entries = listed.get("data") if isinstance(listed, dict) else listed  # a bare list is Together's
    if isinstance(listed, dict) and "data" in listed and entries is None:  # Ollama's way to say that there is none
        entries = []
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise UsageError(f"{client.url}/models answers {shown(listed)}, which is no list of models: check --model.")
    entry = _entry(client.url, entries, model)
    context_tokens, source = _context(client, entry)
    return Server(
        url=client.url,
        model=str(entry["id"]),
        software=_software(entry),
        context_tokens=context_tokens,
        context_from=source,
    )


def _entry(url: str, entries: list[dict[str, Any]], model: str | None) -> dict[str, Any]:
    ids = (each.get("id") for each in entries)
    names = list(dict.fromkeys(each for each in ids if isinstance(each, str) and each and each.isprintable()))
    if model is not None:
        for each in entries:
            aliases = each.get("aliases")
            if model == each.get("id") or (isinstance(aliases, list) and model in aliases):
                return {**each, "id": model}
        raise UsageError(f"The server at {url} has no model {shown(model)}.{did_you_mean(model, names)}")
    if not names:
        raise UsageError(f"The server at {url} lists no model: load one, or say which with --served-model.")
    if len(names) > 1:
        more = f", and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        raise UsageError(
            f"The server at {url} has {len(names)} models: say which with --served-model "
            f"({', '.join(names[:_MOST_NAMED])}{more})."
        )
    return next(each for each in entries if each.get("id") == names[0])


def _software(entry: dict[str, Any]) -> str | None:
    owner = entry.get("owned_by")
    return "llama.cpp" if owner == "llamacpp" else owner if isinstance(owner, str) and owner else None


def _context(client: Client, entry: dict[str, Any]) -> tuple[int | None, str | None]:
    """Return (longest prompt plus answer, where the server says so).

    llama.cpp's ``n_ctx_train`` is the model's, not the server's, so ``/props`` is asked, which has that of a slot.
    """
    meta = entry.get("meta")
    for place, found in (("max_model_len", entry.get("max_model_len")), ("context_length", entry.get("context_length")),
                         ("meta.n_ctx", meta.get("n_ctx") if isinstance(meta, dict) else None)):  # fmt: skip
        if _is_length(found):
            return found, f"{place} of /models"
    if entry.get("owned_by") != "llamacpp":
        return None, None
    try:
        props = client.get("/props", tries=1)
    except (RequestFailed, ServerGone):
        return None, None
    settings = props.get("default_generation_settings") if isinstance(props, dict) else None
    found = settings.get("n_ctx") if isinstance(settings, dict) else None
    return (found, "n_ctx of /props") if _is_length(found) else (None, None)


def _is_length(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and found > 0
