"""Task names and how to make them; modules load when a task is first used."""

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from kvscope import plugins
from kvscope.errors import UsageError
from kvscope.specs import Spec, parse_spec
from kvscope.values import read_options

if TYPE_CHECKING:
    from kvscope.tasks.base import Task

_NEEDLE = "kvscope.tasks.needle:NeedleTask"
_LONG_QA = "kvscope.tasks.long_qa.task:LongQATask"
_RULER_QA = "kvscope.tasks.public.ruler_qa:RulerQATask"
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
    "jsonl": "kvscope.tasks.jsonl:JsonlTask",
    "longbench_v2": "kvscope.tasks.public.longbench_v2:LongBenchV2Task",
    "longmemeval_s": "kvscope.tasks.public.longmemeval:LongMemEvalTask",
    "longmemeval_m": "kvscope.tasks.public.longmemeval:LongMemEvalTask",
    "mrcr": "kvscope.tasks.public.mrcr:MrcrTask",
    "ruler_qa_squad": _RULER_QA,
    "ruler_qa_hotpot": _RULER_QA,
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
    "jsonl": "prompts of your own, a line of JSON each, at the length they have (jsonl:FILE)",
    "longbench_v2": "LongBench v2: four-way choice about long texts, as fetched or data=FILE; cut in the middle",
    "longmemeval_s": "LongMemEval S: questions about dated chats, as fetched or data=FILE; scored without its judge",
    "longmemeval_m": "LongMemEval M: the same in ten times as many chats",
    "mrcr": "MRCR of OpenAI: repeat the i-th of 2, 4 or 8 alike replies, as fetched or data=FILE",
    "ruler_qa_squad": "RULER's QA over SQuAD's paragraphs, as fetched or data=FILE; lm-eval's prompt, best wording",
    "ruler_qa_hotpot": "the same over HotpotQA's documents, ten of them the question's own",
}
_NO_OPTIONS = frozenset({"long_qa_no_context", "long_qa_mrcr"})
"""Tasks of one question type: there is nothing to pick with ``types``."""


def task_names() -> list[str]:
    """Return every name: kvscope's own, then those of installed packages."""
    return plugins.names("task", TASKS)


def task_class(name: str) -> "type[Task]":
    """Return the class behind a name or ``package.module:Class``.

    Raises:
        UsageError: no task has that name, two have it, or what it leads to cannot be used as a task.
    """
    place = plugins.find("task", name, TASKS)
    found = plugins.load(place)
    if not place.is_own:
        _check_class(place, found)
    return cast("type[Task]", found)


def _check_class(place: plugins.Place, found: object) -> None:
    """Check that a class from outside keeps the contract of ``tasks/base.py``, as far as a class shows.

    Raises:
        UsageError: naming the first thing it lacks.
    """
    from kvscope.tasks.base import Task

    plugins.check_class(place, found, base=Task, own=TASKS)
    types = getattr(found, "question_types", None)
    if not (isinstance(types, tuple) and types and all(isinstance(each, str) and each for each in types)):
        raise plugins.broken(place, "its class attribute 'question_types' must be a tuple of one name or more")
    new_tokens = getattr(found, "max_new_tokens", None)
    if not isinstance(new_tokens, int) or new_tokens < 1:
        raise plugins.broken(place, "its class attribute 'max_new_tokens' must be a whole number, at least 1")
    assert isinstance(found, type)
    with plugins.asking("task", place.name, found, "reading the types of its options"):
        _options_of(found)


def task_options(name: str) -> dict[str, inspect.Parameter]:
    """Return option -> parameter, with its type as annotation: the keyword arguments of the task's class."""
    if name in _NO_OPTIONS:
        return {}
    return _options_of(task_class(name))


def _options_of(cls: type) -> dict[str, inspect.Parameter]:
    init = cls.__init__  # type: ignore[misc]
    hints = typing.get_type_hints(init, include_extras=True)
    return {
        key: parameter.replace(annotation=hints.get(key, str))
        for key, parameter in inspect.signature(init).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def create_task(given: str | Mapping[str, Any] | Spec, **options: object) -> "Task":
    """Make a task.

    Args:
        given: a spec, or any of its forms (see ``kvscope.specs``).
        options: further options; they win.

    Raises:
        UsageError: unknown name or option, a value of another type, or options the task refuses.
    """
    spec = parse_spec(given, kind="task")
    cls = task_class(spec.name)
    with plugins.asking("task", spec.name, cls, "making it"):
        return _made(cls, spec.name, {**dict(spec.options), **options})


def _made(cls: "type[Task]", name: str, options: Mapping[str, object]) -> "Task":
    known = task_options(name)
    declared = {key: parameter.annotation for key, parameter in known.items()}
    values = read_options(f"Task {name}", declared, options)
    missing = [key for key, parameter in known.items() if parameter.default is parameter.empty and key not in values]
    if missing:
        raise UsageError(f"Task {name} needs {missing[0]}: write {name}:{missing[0]}=...")
    # One class of ours makes several tasks, so it takes the name; a class from outside is one task.
    make: Callable[..., Task] = cls
    try:
        return make(name, **values) if name in TASKS else make(**values)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"Task {name}: {error}") from error


def create_tasks(given: Sequence[str], *, samples: int) -> "list[Task]":
    """Make tasks of which so many samples are asked.

    Raises:
        UsageError: as ``create_task``, or one has fewer.
    """
    tasks = [create_task(spec) for spec in given]
    for task in tasks:
        check_samples(task, samples)
    return tasks


def check_samples(task: "Task", samples: int) -> None:
    """Refuse more samples than a task has.

    Raises:
        UsageError: naming the task and how many there are.
    """
    if task.n_samples is not None and samples > task.n_samples:
        raise UsageError(
            f"Task {task.name!r} has {task.n_samples:,} prompts, and {samples:,} samples are asked for: use "
            f"--samples {task.n_samples} or fewer."
        )
