"""Python programs in processes of their own that need not import torch and transformers anew.

``start(["-m", "kvscope.cli", "run"])`` is ``subprocess.Popen([sys.executable, "-P", "-m", "kvscope.cli", "run"])`` but
for its start: it is forked from a process that did nothing but import what :data:`IMPORTED` names, which is most of the
time of a small run. One such process serves all tests of a test process (Python's own fork server). A test of imports,
of Python's own options or of the environment that libraries read as they are imported starts a process of its own.

``instead_of_run`` stands in for ``subprocess.run`` in what a test calls, :data:`context` for multiprocessing's "spawn".
"""

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

IMPORTED = ["kvscope.harness.engine.decode", "kvscope.harness.engine.models", "kvscope.harness.engine.prefill"]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(IMPORTED)


class Started:
    """A program that runs."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self._arguments = list(arguments)
        self._texts = tempfile.TemporaryDirectory()
        self._process = context.Process(
            target=_become, args=(self._arguments, dict(environment), str(folder), self._texts.name)
        )
        self._process.start()

    def wait(self) -> "subprocess.CompletedProcess[str]":
        """Wait for its end; return exit code and what it said."""
        self._process.join()
        code = self._process.exitcode
        assert code is not None
        with self._texts as texts:
            # A program that never began has said nothing.
            said = [path.read_text("utf-8") if path.exists() else "" for path in _texts(texts)]
        return subprocess.CompletedProcess(self._arguments, code, *said)


class Talking:
    """A program that runs, whose standard input and output the test holds.

    Attributes:
        stdin: what is written there it reads.
        stdout: what it says.
    """

    def __init__(self, arguments: Sequence[str], *, env: Mapping[str, str]) -> None:
        its_stdin, stdin = context.Pipe(duplex=False)
        stdout, its_stdout = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_become, args=(list(arguments), dict(env), os.getcwd(), (its_stdin, its_stdout))
        )
        self._process.start()
        self.stdin = open(os.dup(stdin.fileno()), "w", encoding="utf-8")  # noqa: SIM115 - close does
        self.stdout = open(os.dup(stdout.fileno()), encoding="utf-8")  # noqa: SIM115
        for end in (its_stdin, stdin, stdout, its_stdout):
            end.close()

    def close(self) -> None:
        """Tell it that nothing more comes, and wait for its end."""
        self.stdin.close()
        self.stdout.close()
        self._process.join()


def instead_of_run(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | Path | None = None, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Do what ``subprocess.run`` does with this Python's command; what it says is captured, and no code raises."""
    assert command[0] == sys.executable, command
    assert not options.keys() - {"capture_output", "text", "check"}, options
    assert not options.get("check"), options
    return run(list(command[1:]), env=env, cwd=cwd)


def start(arguments: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | Path | None = None) -> Started:
    """Start what ``python -P`` does with these arguments: ``-c CODE``, ``-m MODULE`` or a script, and their own.

    Args:
        env: its whole environment; this process's when left out. ``PYTHONPATH`` goes before the path of the imports.
    """
    return Started(arguments, os.environ if env is None else env, Path(cwd or Path.cwd()))


def run(
    arguments: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Start it and wait for its end, as ``subprocess.run(..., capture_output=True, text=True)`` does."""
    return start(arguments, env=env, cwd=cwd).wait()


def _texts(folder: str) -> tuple[Path, Path]:
    """The files of stdout and stderr."""
    return Path(folder, "stdout"), Path(folder, "stderr")


def _become(
    arguments: list[str], environment: dict[str, str], folder: str, talks: str | tuple[Connection, Connection]
) -> None:
    """In the forked process: be the program; what it says goes to files of a folder, or it talks over two pipes."""
    gc.freeze()  # a collector that looks through all modules would write to every page that is shared
    if isinstance(talks, str):
        for standard, path in zip((1, 2), _texts(talks), strict=True):
            file = os.open(path, os.O_WRONLY | os.O_CREAT)
            os.dup2(file, standard)
            os.close(file)
    else:
        for standard, pipe in zip((0, 1), talks, strict=True):
            os.dup2(pipe.fileno(), standard)
            pipe.close()
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - multiprocessing had closed it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # Forking hands on the path of the test process; what the program's environment names comes before it.
    own = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*own, *(path for path in sys.path if path not in own)]
    what, *rest = arguments
    if what == "-c":
        code, *rest = rest
        sys.argv = ["-c", *rest]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif what == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [what, *rest]
        sys.path.insert(0, str(Path(what).parent))
        runpy.run_path(what, run_name="__main__")
