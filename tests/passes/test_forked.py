"""Workers that a server forks: they share its imports and nothing else, and none outlives the sweep."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import MakeConfig

from kvscope.harness.passes import forked, process
from kvscope.harness.passes.footprint import FootprintPass
from kvscope.harness.passes.job import FootprintJob
from kvscope.harness.passes.plan import make_plan
from kvscope.harness.passes.process import run_worker, start_ahead, worker_environment

pytestmark = pytest.mark.skipif(not forked.CAN_FORK, reason="no process that has loaded torch is forked here")

NEVER_S = 24 * 3600.0


@pytest.fixture
def job(small: MakeConfig) -> FootprintJob:
    plan = make_plan(small(methods=["recency:recency_tokens=128"], footprint=True, footprint_decode_tokens=8))
    return FootprintPass().job(plan, plan.methods[0], 512)


def server_id() -> int:
    """Return the process id of the server in force."""
    assert forked._server is not None
    return forked._server.process.pid


def gone(process_id: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has, too."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_workers_share_a_server_and_nothing_else(job: FootprintJob) -> None:
    bad = job.model_copy(update={"model": "/nowhere/at/all"})
    assert run_worker(job, timeout_s=NEVER_S).status == "ok"
    first = server_id()
    assert run_worker(bad, timeout_s=NEVER_S).failure_phase == "load"
    assert run_worker(job, timeout_s=NEVER_S).status == "ok"
    assert server_id() == first


@pytest.mark.usefixtures("server_set_aside")
def test_another_environment_gets_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that wait stand in for servers: which one is asked is settled before it has imported anything."""
    monkeypatch.setattr(forked, "SERVER_COMMAND", (sys.executable, "-c", "import signal; signal.pause()"))
    found = []
    with open(os.devnull, "w") as nowhere:
        for commit in ("one", "one", "another"):
            monkeypatch.setenv("KVSCOPE_COMMIT", commit)
            found.append(forked.worker_server(worker_environment(), stderr=nowhere).process.pid)
    assert found[0] == found[1] != found[2]
    assert gone(found[0])


@pytest.mark.slow
@pytest.mark.parametrize("end", [KeyboardInterrupt, "worker", "server"])
def test_a_worker_that_ends_early(
    job: FootprintJob, end: type[BaseException] | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it ends there is a row or the interrupt, no process is left, and the next job is measured."""
    workers: list[forked.ForkedWorker] = []
    started = forked.ForkedWorker.started

    def noting(worker: forked.ForkedWorker) -> None:
        started(worker)
        workers.append(worker)

    monkeypatch.setattr(forked.ForkedWorker, "started", noting)

    def stop(phase: str) -> None:
        if phase != "load":
            return
        if isinstance(end, type):
            raise end
        os.kill(workers[0]._process_id if end == "worker" else server_id(), signal.SIGTERM)  # type: ignore[arg-type]

    if isinstance(end, type):
        with pytest.raises(end):
            run_worker(job, timeout_s=NEVER_S, on_phase=stop)
    else:
        row = run_worker(job, timeout_s=NEVER_S, on_phase=stop)
        # Without its server the worker may finish its row all the same.
        assert row.status == "ok" if end == "server" else row.reason == "load: the worker was killed by SIGTERM"
    assert workers[0]._process_id is not None
    assert end == "server" or gone(workers[0]._process_id)
    assert run_worker(job, timeout_s=NEVER_S).status == "ok"


@pytest.mark.usefixtures("server_set_aside")
def test_a_server_that_cannot_start_says_why(job: FootprintJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "SERVER_COMMAND", (sys.executable, "-c", "raise SystemExit('no torch here')"))
    row = run_worker(job, timeout_s=NEVER_S)
    assert row.reason == "start: the worker exited with 1: no torch here"


@pytest.mark.usefixtures("server_set_aside")
def test_a_server_started_ahead_says_why_it_ended(job: FootprintJob, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was alive when it was asked, and ended without a worker."""
    dies = "import socket; asked = socket.socket(fileno=0); asked.recv(1); raise SystemExit('no room for torch')"
    monkeypatch.setattr(forked, "SERVER_COMMAND", (sys.executable, "-c", dies))
    start_ahead()
    row = run_worker(job, timeout_s=NEVER_S)
    assert row.reason == "start: the worker exited with 1: no room for torch"


@pytest.mark.usefixtures("server_set_aside")
@pytest.mark.parametrize("cores", [1, 2])
def test_a_head_start_where_there_is_a_core_for_it(cores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "SERVER_COMMAND", (sys.executable, "-c", "import signal; signal.pause()"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    start_ahead()
    assert (forked._server is not None) == (cores > 1)


@pytest.mark.usefixtures("server_set_aside")
@pytest.mark.parametrize("name", ["TORCHINDUCTOR_CACHE_DIR", "CUDA_MODULE_LOADING"])
def test_what_torch_sets_asks_for_no_other_server(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "SERVER_COMMAND", (sys.executable, "-c", "import signal; signal.pause()"))
    monkeypatch.delenv(name, raising=False)
    start_ahead()
    first = server_id()
    monkeypatch.setenv(name, "/somewhere")
    assert forked.worker_server(process.worker_environment()).process.pid == first


@pytest.mark.usefixtures("server_set_aside")
def test_a_worker_that_takes_too_long_to_start_is_stopped(job: FootprintJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forked, "SERVER_COMMAND", (sys.executable, "-c", "import signal; signal.pause()"))
    row = run_worker(job, timeout_s=0.5)
    assert row.reason == "start: stopped after 0.5 s (footprint_timeout_s)"


@pytest.mark.usefixtures("server_set_aside")
def test_where_a_fork_can_make_no_context_a_worker_is_a_program_of_its_own(
    job: FootprintJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind a library that asks CUDA for devices when it is imported."""
    server = (
        "import sys\nfrom kvscope.harness.passes import worker_server\n"
        "worker_server.import_libraries = lambda: None\n"  # no worker of its would have them
        "worker_server.context_is_impossible = lambda: True\n"
        "worker_server.worker.main = lambda: sys.exit('forked')\nraise SystemExit(worker_server.main())"
    )
    monkeypatch.setattr(forked, "SERVER_COMMAND", (sys.executable, "-P", "-c", server))
    row = run_worker(job, timeout_s=NEVER_S)
    assert (row.status, row.reason) == ("ok", None)


def test_the_server_ends_with_the_process_that_started_it() -> None:
    """The server proper, without the libraries, which it would import first."""
    server = (
        "from kvscope.harness.passes import worker_server\n"
        "worker_server.import_libraries = lambda: None\nraise SystemExit(worker_server.main())"
    )
    code = (
        "import os, signal, sys\nfrom kvscope.harness.passes import forked\n"
        "from kvscope.harness.passes.process import worker_environment\n"
        f"forked.SERVER_COMMAND = (sys.executable, '-P', '-c', {server!r})\n"
        "forked.worker_server(worker_environment(), stderr=sys.stderr)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        env=worker_environment(),
        text=True,
    ) as running:
        assert running.stderr is not None
        assert running.stderr.read() == "", "the server holds the other end until it ends"
