"""What a column of a row model holds."""

import types
import typing
from typing import Any


def plain_kinds(annotation: Any) -> set[Any]:
    """Return the types an annotation stands for, None left out and literals by their type."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return {kind for part in typing.get_args(annotation) if part is not type(None) for kind in plain_kinds(part)}
    if origin is typing.Annotated:
        return plain_kinds(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return {type(value) for value in typing.get_args(annotation)}
    return {origin or annotation}
