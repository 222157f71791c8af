"""scipy's assignment problem, imported when it is solved: a tenth of all that a start imports.

transformers brings the losses of all its models along. Those of object detection match boxes by it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

_NAME = "scipy.optimize"


@contextmanager
def assignment_imported_late() -> Iterator[None]:
    """Within it, the ``linear_sum_assignment`` that is imported is one that imports scipy's as it is called.

    Whatever else is asked of ``scipy.optimize`` imports it; and so does everything afterwards.
    """
    if _NAME in sys.modules:
        yield
        return
    stand_in = ModuleType(_NAME)

    def its_own(name: str) -> Any:
        if name.startswith("__"):  # ``inspect`` asks every module for its file
            raise AttributeError(name)
        _forget(stand_in)
        return getattr(import_module(_NAME), name)

    def linear_sum_assignment(*arguments: Any, **options: Any) -> Any:
        return its_own("linear_sum_assignment")(*arguments, **options)

    stand_in.__dict__.update(linear_sum_assignment=linear_sum_assignment, __getattr__=its_own)
    sys.modules[_NAME] = stand_in
    try:
        yield
    finally:
        _forget(stand_in)


def _forget(stand_in: ModuleType) -> None:
    if sys.modules.get(_NAME) is stand_in:
        del sys.modules[_NAME]
