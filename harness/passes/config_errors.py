"""What pydantic finds wrong with a configuration, in one sentence that names key, source and value."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from pydantic import ValidationError

from kvscope.errors import UsageError, shown
from kvscope.values import BadValue, expected_text

SOURCE: ContextVar[str] = ContextVar("source", default="RunConfig")
"""Where the values being read came from, as an error names it."""
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "dict_type": "a mapping",
}


@contextmanager
def told() -> Iterator[None]:
    """Turn what pydantic raises inside into its sentence.

    Raises:
        UsageError: with that sentence.
    """
    try:
        yield
    except ValidationError as error:
        raise UsageError(sentence(error, source=SOURCE.get())) from None


def sentence(error: ValidationError, *, source: str) -> str:
    """Return the first problem of a pydantic error: key, value, what was expected."""
    problem = error.errors()[0]
    inner = problem.get("ctx", {}).get("error")
    if not problem["loc"] and not isinstance(inner, UsageError):
        return f"{source[0].upper()}{source[1:]} is {shown(problem['input'])}, expected a mapping of keys."
    key = str(problem["loc"][0]) if problem["loc"] else ""
    if isinstance(inner, UsageError):
        text = str(inner)
        whole = not key or key in ("methods", "tasks") or text.startswith(f"{key}:")
        return text if whole else f"{key}: {text}"
    expected, hint = _EXPECTED.get(problem["type"]) or expected_text(problem), ""
    given = problem["input"]
    if isinstance(inner, BadValue):
        expected, hint = inner.expected, inner.hint
        given = given if inner.item is None else inner.item
    if key in ("methods", "tasks"):
        expected = f"a list of names such as {'dense' if key == 'methods' else 'niah_single_1'}"
    return f"{key} in {source} is {shown(given)}, expected {expected}{hint}."
