"""Task names and how to make them; modules load when a task is first used."""

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from kvscope.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from kvscope.tasks.base import Task

_NEEDLE = "kvscope.tasks.needle:NeedleTask"
_LONG_QA = "kvscope.tasks.long_qa.task:LongQATask"
TASKS: dict[str, str] = {
    "niah_single_1": _NEEDLE,
    "niah_single_2": _NEEDLE,
    "niah_single_3": _NEEDLE,
    "niah_multikey_1": _NEEDLE,
    "niah_multikey_2": _NEEDLE,
    "niah_multikey_3": _NEEDLE,
    "niah_multivalue": _NEEDLE,
    "niah_multiquery": _NEEDLE,
    "long_qa": _LONG_QA,
    "long_qa_no_context": _LONG_QA,
    "long_qa_mrcr": _LONG_QA,
    "vt": "kvscope.tasks.ruler_chains:VariableTrackingTask",
    "cwe": "kvscope.tasks.ruler_words:CommonWordsTask",
    "fwe": "kvscope.tasks.ruler_words:FrequentWordsTask",
}
DESCRIPTIONS: dict[str, str] = {
    "niah_single_1": "one number in repeated noise sentences",
    "niah_single_2": "one number in essays (needs data=PATH)",
    "niah_single_3": "one UUID in essays (needs data=PATH)",
    "niah_multikey_1": "one number among four keys in essays (needs data=PATH)",
    "niah_multikey_2": "one number in a haystack made of other needles",
    "niah_multikey_3": "one UUID, looked up by UUID, in a haystack made of other needles",
    "niah_multivalue": "four numbers of one key in prose",
    "niah_multiquery": "the numbers of four keys in prose",
    "long_qa": "nine types of questions about a story of dated sessions (types=a+b picks some)",
    "long_qa_no_context": "questions that state their own fact: the sessions before them are not needed",
    "long_qa_mrcr": "the i-th of 2, 4 or 8 near-identical replies, word for word",
    "vt": "the five names on one chain of assignments, among three other chains in noise",
    "cwe": "the ten words repeated most in a numbered list",
    "fwe": "the three most frequent coded words of a text",
}
_OPTIONS: dict[str, frozenset[str]] = {
    name: frozenset({"data"} if target == _NEEDLE else {"types"} if name == "long_qa" else ())
    for name, target in TASKS.items()
}


def task_names() -> list[str]:
    """Return every registered task name."""
    return list(TASKS)


def task_options(name: str) -> list[str]:
    """Return the option names a task takes."""
    return sorted(_OPTIONS[name])


def create_task(name: str, **options: str) -> "Task":
    """Make a task.

    Raises:
        UsageError: unknown name or option, or options the task refuses.
    """
    if name not in TASKS:
        raise UsageError(f"Unknown task '{name}'.{did_you_mean(name, TASKS)}")
    for option in options:
        if option not in _OPTIONS[name]:
            raise UsageError(f"Task {name} has no option '{option}'.{did_you_mean(option, _OPTIONS[name])}")
    module, _, attribute = TASKS[name].partition(":")
    made: Task = partial(getattr(import_module(module), attribute), name)(**options)
    return made
