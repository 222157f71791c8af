"""Prompts built ahead, in a thread and in processes."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest

from kvscope.errors import UsageError
from kvscope.harness.passes.builders import PromptBuilders, builder_processes
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.forked import CAN_FORK
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.prompt_check import build

forks = pytest.mark.skipif(not CAN_FORK, reason="processes are forked on Linux alone")
ASKED = [("niah_single_1", 512, 0), ("vt", 600, 3), ("niah_single_1", 512, 1)]


@pytest.fixture(scope="module")
def plan():
    return make_plan(
        make_config(
            {
                "model": "reference", "methods": ["dense"], "tasks": ["niah_single_1", "vt"], "lengths_tokens": [512],
                "footprint": False, "device": "cpu",
            }
        )
    )  # fmt: skip


@pytest.mark.parametrize("processes", [0, pytest.param(2, marks=forks)])
def test_prompts_are_those_built_here(plan, processes):
    tasks = dict(zip(plan.task_names, plan.tasks, strict=True))
    with PromptBuilders(plan, processes=processes) as builders:
        waiting = [builders.begin(*asked) for asked in ASKED]
        found = [wait() for wait in waiting]
    assert found == [build(plan, tasks[name], name, *rest) for name, *rest in ASKED]


@forks
def test_an_error_of_the_build_comes_back(plan):
    with PromptBuilders(plan, processes=1) as builders, pytest.raises(UsageError, match="too small"):
        builders.begin("niah_single_1", 10, 0)()


@forks
def test_a_killed_process_costs_no_prompt(plan):
    before = set(psutil.Process().children())
    with PromptBuilders(plan, processes=2) as builders:
        first, *_ = set(psutil.Process().children()) - before
        os.kill(first.pid, signal.SIGKILL)
        found = [builders.begin(*asked)() for asked in ASKED]
        found += [builders.begin(*asked)() for asked in ASKED]
    assert [sample.sample for sample in found] == [0, 3, 1, 0, 3, 1]


class NotSent(str):
    """A text that no other process can send."""

    def __reduce__(self):
        raise TypeError("cannot be sent")


class OwnTask:
    """A task of one's own, whose samples or whose error stay where they were made."""

    name, own_lengths = "own", False

    def __init__(self, sample, error=None):
        self.sample, self.error = sample, error
        self.question_types = (sample.question_type,)

    def build(self, tokenizer, **asked):
        if self.error is not None:
            raise self.error
        return replace(self.sample, targets=(NotSent("kept"),))


@forks
def test_what_cannot_be_sent_is_made_here(plan):
    made = build(plan, plan.tasks[0], *ASKED[0])
    error = ValueError("of its own")
    error.held = lambda: None
    for task in (OwnTask(made), OwnTask(made, error)):
        own = replace(plan, tasks=(task,), task_names=("own",))
        with PromptBuilders(own, processes=1) as builders:
            wait = builders.begin("own", 512, 0)
            if task.error is None:
                assert wait().targets == ("kept",)
            else:
                with pytest.raises(ValueError, match="of its own"):
                    wait()


FORKS_AND_WAITS = """
import sys, time
import psutil
from kvscope.harness.passes.builders import PromptBuilders
class Plan: task_names, tasks = (), ()
builders = PromptBuilders(Plan(), processes=2)
print(*(child.pid for child in psutil.Process().children()), flush=True)
time.sleep(600)
"""


@forks
def test_processes_die_with_a_parent_that_is_killed():
    """They hold its folder's lock, and a worker's pipes."""
    with subprocess.Popen([sys.executable, "-c", FORKS_AND_WAITS], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(children) == 2
        parent.kill()
        parent.wait()
        while any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children):
            time.sleep(0.02)


def test_a_cpu_has_no_cores_to_spare():
    assert builder_processes(1, device="cpu") == 0
    assert builder_processes(1, device="cuda:0") >= 1
