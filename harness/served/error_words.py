"""What an error body says, in the dialects of servers."""

from typing import Any

_HOLDERS = ("error", "message", "detail", "msg")
_MOST_DEPTH = 6


def error_words(found: Any) -> tuple[str, str]:
    """Return (what an error says, its code or type; empty for none).

    Known are ``{"error": {"message", "code", "type"}}`` (OpenAI, vLLM, llama.cpp), a text under ``error`` or
    ``message`` (TGI, SGLang), FastAPI's ``detail`` with a list of fields, and lists and nestings of these.
    """
    codes = list[str]()
    for _ in range(_MOST_DEPTH):
        if isinstance(found, list) and found:
            found = found[0]
            continue
        if not isinstance(found, dict):
            break
        codes += [str(found[key]) for key in ("code", "type") if isinstance(found.get(key), str | int)]
        inner = next((found[key] for key in _HOLDERS if found.get(key)), None)
        if inner is None:
            break
        place = found.get("loc")  # FastAPI's: where in the request
        if isinstance(inner, str) and isinstance(place, list | tuple):
            return f"{'.'.join(map(str, place))}: {inner}", codes[0] if codes else ""
        found = inner
    return str(found), " ".join(codes)
