"""The footprint pass: real workers on a tiny model, and workers that die in every way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import stand_ins
from tiny import MakeConfig

from kvscope.harness.passes import footprint, process, process_pass
from kvscope.harness.passes.footprint import FootprintPass, footprint_prompt
from kvscope.harness.passes.job import FootprintJob
from kvscope.harness.passes.plan import Plan, make_plan
from kvscope.harness.passes.process import run_worker, worker_environment
from kvscope.harness.passes.sweep import failures, run
from kvscope.harness.passes.timing import usable_cores
from kvscope.methods import registry

# A worker that hangs is told by pytest's own limit; how long a loaded machine takes is no matter here.
NEVER_S = 24 * 3600.0


@pytest.fixture
def plan(small: MakeConfig) -> Plan:
    return make_plan(small(methods=["recency:recency_tokens=128"], footprint=True, footprint_decode_tokens=8))


@pytest.fixture
def job(plan: Plan) -> FootprintJob:
    return FootprintPass().job(plan, plan.methods[0], 512)


def script(text: str) -> tuple[str, ...]:
    """Return a stand-in worker: it reads the job, then does what ``text`` says."""
    say = "import json, os, signal, sys, time\nsay = lambda **m: print(json.dumps(m), flush=True)\n"
    return (sys.executable, "-c", say + "job = json.loads(sys.stdin.readline())\n" + text)


def test_prompt_and_decode_steps_fill_the_length(plan: Plan) -> None:
    context_ids, forced_ids = footprint_prompt(plan, 512)
    assert len(context_ids) + len(forced_ids) + 8 == 512
    assert len(forced_ids) == 1


def test_methods_of_a_length_share_a_prompt_that_is_built_once(
    small: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"methods": ["dense", "recency:recency_tokens=128"], "footprint": True, "footprint_decode_tokens": 8}
    plans = [make_plan(small(seed=seed, **options)) for seed in (0, 1)]
    built: list[int] = []

    def noting(plan: Plan, length_tokens: int) -> object:
        built.append(length_tokens)
        return footprint_prompt(plan, length_tokens)

    monkeypatch.setattr(footprint, "footprint_prompt", noting)
    measuring = FootprintPass()
    asked = [(plans[0], 512), (plans[0], 512), (plans[0], 640), (plans[1], 640), (plans[0], 512)]
    jobs = [measuring.job(plan, plan.methods[k % 2], length) for k, (plan, length) in enumerate(asked)]
    assert built == [512, 640, 640, 512]
    for job, (plan, length) in zip(jobs, asked, strict=True):
        assert (job.context_ids, job.forced_ids) == footprint_prompt(plan, length)


def test_a_pass_measures_every_cell_once_and_resumes(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    # A share of the warm-up's 256 tokens would not hold snapkv's window.
    methods = ["dense", "recency:recency_tokens=128", "snapkv:budget_fraction=0.11"]
    config = small(
        methods=methods, samples=1, footprint=True, footprint_decode_tokens=8, footprint_lengths_tokens=[640]
    )
    phases: list[str] = []
    real = process_pass.run_worker

    def spying(job: FootprintJob, **options: object) -> object:
        return real(job, timeout_s=NEVER_S, on_phase=phases.append)

    monkeypatch.setattr(process_pass, "run_worker", spying)
    result = run(config, progress=False)
    frame = result.footprint.set_index("method_label")
    # On a CPU one decode tells both bytes and times.
    assert phases == ["start", "load", "warm-up", "prefill", "decode"] * 3
    for label, pages in zip(methods, (10, 3, 2), strict=True):
        row = frame.loc[label]
        assert row["status"] == "ok"
        assert row["resident_kv_bytes"] == row["predicted_kv_bytes"] == pages * 64 * 256
        assert row["dense_kv_bytes"] == 10 * 64 * 256
        assert row["verdict"] == "not_measured"
        assert "CPU" in row["nvml_reason"]
        assert "CPU" in row["torch_reason"]
        assert row["tpot_steps"] == 7
        assert min(row["tpot_s"], row["ttft_s"]) > 0
        assert (0 < row["scores_s"] < row["ttft_s"]) == label.startswith("snapkv")
        assert 0 < row["tpot_p10_s"] <= row["tpot_s"] <= row["tpot_p90_s"]
        assert row["cpu_cores"] == usable_cores()
        assert row["load_1min"] >= 0
        assert (row["step_backend"], row["step_captures"]) == ("eager: the device is cpu", 0)
        assert row["host_rss_peak_bytes"] > 10 * 2**20
        assert row["prompt_tokens"] == 631
    # The plan said the same before anything ran.
    assert {c.predicted_kv_bytes for c in result.info.plan if c.length_tokens == 640} == {
        pages * 64 * 256 for pages in (10, 3, 2)
    }
    assert failures(result) == []
    run(config, progress=False)
    assert len(phases) == 15


def test_a_failure_in_the_worker_is_a_row_with_its_phase(job: FootprintJob) -> None:
    row = run_worker(job.model_copy(update={"model": "/nowhere/at/all"}), timeout_s=NEVER_S)
    assert (row.status, row.failure_phase) == ("failed", "load")
    assert row.reason is not None
    assert "There is no model folder '/nowhere/at/all'" in row.reason
    assert row.predicted_kv_bytes == job.cell["predicted_kv_bytes"]


def test_an_unsupported_cell_starts_no_process(small: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METHODS, "picky", stand_ins.METHODS["picky"])
    monkeypatch.setattr(process_pass, "run_worker", None)
    result = run(small(methods=["picky"], samples=1, footprint=True), progress=False)
    assert list(result.footprint["status"]) == ["unsupported"]
    assert result.footprint["reason"].iloc[0] == "it needs a moon; and a sun"


def test_a_killed_worker_is_a_row(job: FootprintJob) -> None:
    row = run_worker(
        job, timeout_s=NEVER_S, command=script("say(phase='prefill'); os.kill(os.getpid(), signal.SIGSEGV)")
    )
    assert (row.status, row.failure_phase) == ("failed", "prefill")
    assert row.reason == "prefill: the worker was killed by SIGSEGV"


def test_the_kernels_oom_kill_is_told_from_another_kill(job: FootprintJob, monkeypatch: pytest.MonkeyPatch) -> None:
    kill = script("say(phase='decode'); os.kill(os.getpid(), signal.SIGKILL)")
    assert run_worker(job, timeout_s=NEVER_S, command=kill).status == "failed"
    counts = iter([3, 4])
    monkeypatch.setattr(process, "kernel_oom_kills", lambda: next(counts))
    row = run_worker(job, timeout_s=NEVER_S, command=kill)
    assert (row.status, row.oom_of) == ("oom", "host")
    assert row.reason == "decode: the kernel killed the worker for want of host memory (SIGKILL)"


def test_a_worker_that_exits_says_its_last_words(job: FootprintJob) -> None:
    row = run_worker(
        job, timeout_s=NEVER_S, command=script("print('the library is missing', file=sys.stderr); sys.exit(5)")
    )
    assert row.reason == "start: the worker exited with 5: the library is missing"


@pytest.mark.parametrize(
    "words",
    [
        "ImportError: libtorch_cpu.so: failed to map segment from shared object",
        "MemoryError",
        "RuntimeError: can't start new thread",
        "terminate called after throwing an instance of 'std::bad_alloc'",
    ],
)
@pytest.mark.parametrize("end", ["sys.exit(1)", "os.kill(os.getpid(), signal.SIGABRT)"])
def test_a_worker_that_dies_for_want_of_memory_is_out_of_memory(job: FootprintJob, words: str, end: str) -> None:
    told = script(f"print({words!r}, file=sys.stderr, flush=True); {end}")
    row = run_worker(job, timeout_s=NEVER_S, command=told)
    assert (row.status, row.oom_of, row.failure_phase) == ("oom", "host", "start")
    assert words in str(row.reason)


def test_a_worker_too_small_to_load_torch_is_out_of_memory(job: FootprintJob) -> None:
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_AS, (150 << 20,) * 2)"
    small = (sys.executable, "-c", f"{limit}; os.execv(sys.argv[1], sys.argv[1:])", *process.WORKER_COMMAND)
    row = run_worker(job, timeout_s=NEVER_S, command=small)
    assert (row.status, row.oom_of) == ("oom", "host")


def test_a_worker_that_does_not_even_read_its_job_is_a_row(job: FootprintJob) -> None:
    big = job.model_copy(update={"context_ids": tuple(range(100_000))})
    row = run_worker(big, timeout_s=NEVER_S, command=(sys.executable, "-c", "import sys; sys.exit(9)"))
    assert row.reason == "start: the worker exited with 9: it said nothing"


def test_an_answer_cut_short_is_a_row(job: FootprintJob) -> None:
    cut = "sys.stdout.write('{\"row\": {'); sys.stdout.flush(); os.kill(os.getpid(), signal.SIGTERM)"
    assert run_worker(job, timeout_s=NEVER_S, command=script(cut)).reason == "start: the worker was killed by SIGTERM"


def test_a_worker_that_hangs_is_stopped(job: FootprintJob) -> None:
    row = run_worker(job, timeout_s=0.5, command=script("say(phase='decode'); signal.pause()"))
    assert row.status == "failed"
    assert row.reason is not None
    assert row.reason.endswith("stopped after 0.5 s (footprint_timeout_s)")


def test_a_worker_imports_nothing_from_the_folder_one_stands_in(
    job: FootprintJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``python -m`` alone would put that folder before the standard library."""
    for name in ("statistics", "torch", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("open('executed', 'w').close()\nraise SystemExit(7)\n")
    monkeypatch.chdir(tmp_path)
    row = run_worker(job, timeout_s=NEVER_S)
    assert (row.status, row.reason) == ("ok", None)
    assert not (tmp_path / "executed").exists()


def test_a_worker_ends_when_its_parent_is_gone(job: FootprintJob, tmp_path: Path) -> None:
    """kill -9 of the sweep must not leave a process behind that holds the GPU."""
    hang = job.model_copy(update={"model": "slow"})
    code = (
        "import signal, sys\nfrom kvscope.harness.passes import worker\n"
        "def measure(job, say):\n    print('measuring', file=sys.stderr, flush=True)\n    signal.pause()\n"
        "worker.measure = measure\nworker.main()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, env=worker_environment(), text=True
    ) as running:
        assert running.stdin is not None
        assert running.stderr is not None
        running.stdin.write(hang.model_dump_json() + "\n")
        running.stdin.flush()
        assert "measuring\n" in iter(running.stderr.readline, "")
        assert running.poll() is None
        running.stdin.close()
        assert running.wait() == 1


def test_an_interrupt_takes_the_worker_with_it(job: FootprintJob, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"

    def interrupt(phase: str) -> None:
        if phase == "decode":
            raise KeyboardInterrupt

    hang = script(f"open({str(pid_file)!r}, 'w').write(str(os.getpid())); say(phase='decode'); signal.pause()")
    with pytest.raises(KeyboardInterrupt):
        run_worker(job, timeout_s=NEVER_S, on_phase=interrupt, command=hang)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_the_worker_finds_this_kvscope_and_leaves_the_rest_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/elsewhere", "/more"]))
    monkeypatch.setenv("HF_HOME", "/models")
    environment = worker_environment()
    first, *rest = environment["PYTHONPATH"].split(os.pathsep)
    assert (Path(first) / "kvscope" / "harness").is_dir()
    assert rest == ["/elsewhere", "/more"]
    assert environment["HF_HOME"] == "/models"


def test_the_worker_gives_freed_memory_back_unless_the_user_has_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert worker_environment()["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    environment = worker_environment()
    assert environment["PYTORCH_CUDA_ALLOC_CONF"] == "backend:cudaMallocAsync"
    assert "PYTORCH_ALLOC_CONF" not in environment


def test_the_summary_says_the_outcome(job: FootprintJob) -> None:
    row = run_worker(job, timeout_s=NEVER_S, command=script("sys.exit(1)"))
    assert FootprintPass().summary(row) == "failed: start: the worker exited with 1: it said nothing"
    assert json.loads(row.model_dump_json())["verdict"] == "not_measured"
