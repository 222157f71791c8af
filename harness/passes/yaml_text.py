"""YAML as configurations use it: mappings, lists and scalars, and every scalar is text.

YAML's own types guess (``010`` is eight, ``on`` is true, ``2001-01-01`` is a date); here the key or option that a value
is for says how to read it (see ``kvscope.values``). Only an empty value, ``null`` and ``~`` are more than text: None.
"""

from pathlib import Path
from typing import Any

import yaml

from kvscope.errors import UsageError, shown
from kvscope.paths import user_path
from kvscope.results.reading import read_regular

MOST_CHARACTERS = 1_000_000
DEEPEST = 20
_YAML = "tag:yaml.org,2002:"
_NULL, _MERGE = f"{_YAML}null", f"{_YAML}merge"
_SCALARS = {f"{_YAML}{name}" for name in ("bool", "float", "int", "null", "str", "timestamp", "value", "merge")}


class _Fault(Exception):  # noqa: N818 - it says what is wrong
    """What is wrong with a YAML text, and from which line on."""

    def __init__(self, why: str, node: yaml.Node) -> None:
        super().__init__(why)
        self.line = node.start_mark.line + 1


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        UsageError: missing, unreadable, not YAML, or not a mapping.
    """
    source = f"Configuration file {shown(str(path))}"
    data = read_regular(user_path(path, what="The configuration file"), most_bytes=4 * MOST_CHARACTERS, mend="")
    if data is None:
        raise UsageError(f"{source} does not exist.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{source} cannot be read: it is not UTF-8 text.") from None
    values = yaml_value(text, source=source)
    if values is None:
        return {}
    if not isinstance(values, dict):
        what = "list" if isinstance(values, list) else "text"
        raise UsageError(f"{source} must hold `key: value` lines, not a {what}.")
    return values


def yaml_value(text: str, *, source: str) -> Any:
    """Return what a YAML text holds: dicts, lists, text and None.

    Args:
        source: what the text is, as an error begins.

    Raises:
        UsageError: it is not YAML, too long or too deep, names a key twice, or has tags.
    """
    if len(text) > MOST_CHARACTERS:
        raise UsageError(f"{source}: more than {MOST_CHARACTERS:,} characters of YAML.")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _Reader().value(node)
    except _Fault as fault:
        raise UsageError(f"{source}: {fault} from line {fault.line} on.") from None
    except RecursionError:
        raise UsageError(f"{source}: its values are nested too deeply.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{source}{where} is not valid YAML.") from None


class _Reader:
    """Turns nodes into values. A node that several places name (an anchor) is one value."""

    def __init__(self) -> None:
        self._done: dict[int, Any] = {}
        self._open: set[int] = set()

    def value(self, node: yaml.Node) -> Any:
        if id(node) in self._done:
            return self._done[id(node)]
        if id(node) in self._open:
            raise _Fault("a value holds itself", node)
        if len(self._open) > DEEPEST:
            raise _Fault("values are nested too deeply", node)
        self._open.add(id(node))
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_YAML}map":
            found: Any = self._mapping(node)
        elif isinstance(node, yaml.SequenceNode) and node.tag == f"{_YAML}seq":
            found = [self.value(each) for each in node.value]
        elif isinstance(node, yaml.ScalarNode) and node.tag in _SCALARS:
            found = None if node.tag == _NULL else node.value
        else:
            raise _Fault(f"the tag {shown(node.tag)} has no meaning here", node)
        self._open.remove(id(node))
        self._done[id(node)] = found
        return found

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _Fault("a key is not one word", node)
            if key.tag == _MERGE:
                merged = {**self._merged(value), **merged}
                continue
            if key.value in own:
                raise _Fault(f"key {shown(key.value)} is given twice", node)
            own[key.value] = self.value(value)
        return {**merged, **own}

    def _merged(self, node: yaml.Node) -> dict[str, Any]:
        found = self.value(node)
        sources = found if isinstance(found, list) else [found]
        if not all(isinstance(each, dict) for each in sources):
            raise _Fault("'<<' merges mappings only", node)
        return {key: value for each in reversed(sources) for key, value in each.items()}
