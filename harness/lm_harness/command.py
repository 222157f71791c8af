"""``kvscope lm-eval``: lm-eval's own command line, with a model under a cache method."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryFile
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

from kvscope.errors import EnvironmentProblem, KvscopeError, UsageError, shown_path
from kvscope.files import first_line
from kvscope.harness.engine.names import resolve_model
from kvscope.harness.lm_harness.register import NAME, register_lm_eval
from kvscope.methods.registry import create_method
from kvscope.paths import user_path
from kvscope.specs import parse_spec
from kvscope.tasks.lm_harness import FOLDER
from kvscope.terminal import tell

if TYPE_CHECKING:
    from kvscope.harness.lm_harness.model import KvscopeLM

_OURS = ("--model", "-M", "--model_args", "-a")


def run_lm_eval(model: str, method: str, rest: Sequence[str], *, more: dict[str, Any]) -> None:
    """Run lm-eval on a model under a method.

    Args:
        model: as ``kvscope run --model``.
        method: as ``kvscope run -m``.
        rest: arguments of ``lm-eval run``.
        more: further arguments of :class:`~kvscope.harness.lm_harness.model.KvscopeLM`; None is not given.

    Raises:
        UsageError: bad input, in lm-eval's words where it is lm-eval that refuses it.
        EnvironmentProblem: the data of a task are out of reach.
        SystemExit: lm-eval's argument parser ends so.
    """
    for argument in rest:
        if argument.partition("=")[0] in _OURS[1:]:
            raise UsageError(f"{argument.partition('=')[0]} is for kvscope to give: say --model and -m.")
    if not any(argument.partition("=")[0] in ("--tasks", "-t", "--config", "-C") for argument in rest):
        raise UsageError("Say which tasks: --tasks NAME,NAME (`lm-eval ls tasks` lists them).")
    create_method(parse_spec(method, kind="method"))  # lm-eval takes seconds to say that there is none
    where, _ = resolve_model(model)
    # RULER's tasks build prompts with the tokenizer that the arguments name.
    arguments = {"pretrained": model, "tokenizer": where, "method": method}
    arguments |= {key: value for key, value in more.items() if value is not None}
    command = ["lm-eval", "run", "--model", NAME, "--model_args", json.dumps(arguments)]
    for option, value in (("--include_path", str(FOLDER)), ("--device", "auto")):
        if not any(argument.partition("=")[0] == option for argument in rest):
            command += [option, value]
    _check_output(rest)
    register_lm_eval()
    from lm_eval.__main__ import cli_evaluate

    from kvscope.harness.lm_harness.model import KvscopeLM

    with _command_line([*command, *rest]):
        try:
            cli_evaluate()
        except KvscopeError:
            raise
        except ValueError as error:  # what lm-eval raises over its own arguments and unknown tasks
            raise UsageError(f"lm-eval: {first_line(error)}") from error
        except ConnectionError as error:  # what data sets raise that are neither here nor within reach
            raise EnvironmentProblem(
                f"lm-eval: {first_line(error)}. Bring the task's data here first, or choose a task whose data are here."
            ) from error
        except ImportError as error:  # a task whose extra is not installed
            raise EnvironmentProblem(f"lm-eval: {first_line(error)}.") from error
        except (AssertionError, AttributeError, KeyError, TypeError, OSError) as error:
            if _is_ours(error):
                raise
            raise UsageError(f"lm-eval: {first_line(error) or type(error).__name__}") from error
    _tell_summary(KvscopeLM.latest)


def _is_ours(error: BaseException) -> bool:
    """Whether an error came out of kvscope, not out of what lm-eval does with its arguments and tasks."""
    here = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    return any(name.startswith("kvscope.") and name != __name__ for name in here)


def _check_output(rest: Sequence[str]) -> None:
    """Refuse a place of results that cannot be written; lm-eval would say so in a warning, after the last answer."""
    given = None
    for at, argument in enumerate(rest):
        option, equals, value = argument.partition("=")
        if option in ("--output_path", "-o"):
            given = value if equals else next(iter(rest[at + 1 :]), None)
    if given is None:
        return
    path = user_path(given, what="--output_path")
    folder = path.parent if path.suffix in (".json", ".jsonl") else path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(
            f"--output_path: nothing can be written to {shown_path(folder)} ({error.strerror}): give another place."
        ) from error


def _tell_summary(model: "KvscopeLM | None") -> None:
    if model is not None and model.summary:
        tell(model.summary)


@contextmanager
def _command_line(arguments: list[str]) -> Iterator[None]:
    """Stand in for the process's arguments, which lm-eval reads."""
    before = sys.argv
    sys.argv = arguments
    try:
        yield
    finally:
        sys.argv = before
