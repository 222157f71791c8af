"""Prompts are built a little ahead of their turn, beside what computes.

On a GPU that takes processes: tokenising a prompt of 16K tokens takes a core 55 to 140 ms, more than the card takes to
answer it under nine methods, and a thread would hold up the one that launches kernels. On a CPU the cores are busy, and
one thread does it.
"""

from __future__ import annotations

import copy
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from kvscope.errors import KvscopeError
from kvscope.harness.engine.host_threads import threads_a_process
from kvscope.harness.passes.forked import CAN_FORK
from kvscope.harness.passes.prompt_check import build

if TYPE_CHECKING:
    from kvscope.harness.passes.run_plan import RunPlan
    from kvscope.tasks.base import Sample

_PR_SET_PDEATHSIG = 1


def builder_processes(n_processes: int, *, device: str) -> int:
    """Return how many processes build prompts for each of so many that answer them on this machine."""
    return 0 if device == "cpu" else threads_a_process(n_processes, device=device)


class PromptBuilders:
    """Builds prompts of a plan in other processes, or in a thread. Use as a context manager.

    Attributes:
        ahead: prompts that are worth asking for before their turn.
    """

    def __init__(self, plan: RunPlan, *, processes: int = 0) -> None:
        """Start them.

        Args:
            processes: how many; 0: one thread. They are forked here, so make this before there is a model on a GPU,
                and before there are threads.
        """
        self._plan = plan
        self._names = list(plan.task_names)
        self._pool: Executor
        if processes and CAN_FORK:
            self.ahead = 2 * processes
            self._pool = ProcessPoolExecutor(
                processes, multiprocessing.get_context("fork"), initializer=_begin, initargs=(plan, os.getpid())
            )
            self._pool.submit(os.getpid).result()  # all of them are forked with the first
            self._tokenizer = None
        else:
            self.ahead = 2
            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompts")
            # A tokenizer of its own: others use the plan's meanwhile.
            self._tokenizer = copy.deepcopy(plan.facts.tokenizer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def begin(self, name: str, length_tokens: int, index: int) -> Callable[[], Sample]:
        """Begin to build a prompt; what is returned waits for it.

        Args:
            name: what rows call its task.
        """
        at = self._names.index(name)
        build_here = partial(build, self._plan, self._plan.tasks[at], name, length_tokens, index)
        if self._tokenizer is not None:
            return self._pool.submit(build_here, tokenizer=self._tokenizer).result
        try:
            asked = self._pool.submit(_build_there, at, length_tokens, index)
        except BrokenExecutor:
            return build_here
        return partial(_result, asked, build_here)


def _result(asked: Future[Sample], build_here: Callable[[], Sample]) -> Sample:
    try:
        return asked.result()
    except KvscopeError:
        raise
    except Exception:  # noqa: BLE001 - here it is the prompt, or the error, that one process would have had
        # A process was killed, and the others with it. Or what a task of one's own made, or raised, cannot be sent.
        return build_here()


_plan: Any = None
"""In a process that builds: the plan it was forked with."""


def _begin(plan: RunPlan, parent: int) -> None:
    global _plan
    _plan = plan
    # Ctrl-C is for the sweep to answer. And where that is killed, nothing of it may hold its folder's lock.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads were not forked


def _build_there(at: int, length_tokens: int, index: int) -> Sample:
    return build(_plan, _plan.tasks[at], _plan.task_names[at], length_tokens, index)
