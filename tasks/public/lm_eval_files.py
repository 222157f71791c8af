"""Prompts that lm-eval ships are read from its installed files, never imported and never copied."""

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvscope.errors import EnvironmentProblem


def lm_eval_text(file: Path) -> str | None:
    """Return the text of a file of the installed lm-eval; None where it has no such file."""
    spec = find_spec("lm_eval")
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    path = next((path for place in places if (path := Path(place, file)).is_file()), None)
    return None if path is None else path.read_text(encoding="utf-8")


def lm_eval_constants(file: Path) -> dict[str, Any]:
    """Return name -> value of every plain constant that a Python file of lm-eval assigns; empty without the file."""
    found = dict[str, Any]()
    for statement in ast.parse(lm_eval_text(file) or "").body:
        if not (isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)):
            continue
        try:
            found[statement.targets[0].id] = ast.literal_eval(statement.value)
        except ValueError:  # an expression: no constant
            continue
    return found


def no_prompt(task: str) -> EnvironmentProblem:
    """Return the error that the installed lm-eval has no prompt of a task."""
    return EnvironmentProblem(
        f"The installed lm-eval has no prompt of its task {task}: pip install 'lm_eval>=0.4.12,<0.5'."
    )
