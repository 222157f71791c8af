"""The footprint pass: a fresh process per (method, length), and a row whatever becomes of that process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import kvscope
from kvscope.harness.passes.deadline import Deadline
from kvscope.harness.passes.job import FootprintJob, failed_row
from kvscope.harness.passes.plan import Plan
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.rows import FailureStatus, cell_columns
from kvscope.methods.registry import is_own
from kvscope.plugins import search_path
from kvscope.results.schema import FootprintRow, OomOf, ThroughputRow
from kvscope.units import format_bytes, format_length

if TYPE_CHECKING:
    from kvscope.methods.base import CacheMethod
    from kvscope.results.store import RunStore

# -P: a file of the working directory must not stand in for a module.
WORKER_COMMAND = (sys.executable, "-P", "-m", "kvscope.harness.passes.worker")
PHASES = ("start", "load", "warm-up", "prefill", "decode", "timing")
STDERR_TAIL_CHARACTERS = 2000
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ALLOCATOR_SETTINGS = "expandable_segments:True"


def footprint_pass(plan: Plan, store: "RunStore", progress: Progress, deadline: Deadline) -> None:
    """Measure every (method, length) that has no row yet, shortest length first, until the deadline."""
    for length_tokens in plan.config.footprint_cells_tokens:
        for method in plan.methods:
            if not store.has_footprint((method.label, length_tokens)):
                deadline.check()
                store.append_footprint(measure_footprint(plan, method, length_tokens, progress))


def measure_footprint(plan: Plan, method: "CacheMethod[Any]", length_tokens: int, progress: Progress) -> FootprintRow:
    """Measure one (method, length) in a fresh process."""
    progress.begin_cell(f"footprint {method.label} {format_length(length_tokens)}", steps=1)
    job = make_job(plan, method, length_tokens)
    row = run_job(plan, job, plan.unsupported(method.label, length_tokens), progress)
    assert isinstance(row, FootprintRow)
    progress.end_cell(summary(row))
    return row


def throughput_pass(plan: Plan, store: "RunStore", progress: Progress, deadline: Deadline) -> None:
    """Find the largest batch of every (method, length) that has no row yet, and its tokens a second."""
    for length_tokens in plan.config.lengths_tokens:
        for method in plan.methods:
            if store.has_throughput((method.label, length_tokens)):
                continue
            deadline.check()
            progress.begin_cell(f"throughput {method.label} {format_length(length_tokens)}", steps=1)
            job = make_job(plan, method, length_tokens, kind="throughput")
            row = run_job(plan, job, plan.unsupported(method.label, length_tokens), progress)
            assert isinstance(row, ThroughputRow)
            store.append_throughput(row)
            progress.end_cell(throughput_summary(row))


def run_job(plan: Plan, job: FootprintJob, unsupported: str | None, progress: Progress) -> FootprintRow | ThroughputRow:
    """Run a job in a fresh process, or say why it cannot run."""
    progress.begin_step("fresh process", parts=len(PHASES))
    if unsupported is not None:
        row = failed_row(job, status="unsupported", reason=unsupported, phase=None)
    else:
        row = run_worker(job, timeout_s=plan.config.footprint_timeout_s, on_phase=progress.part)
    progress.end_step(work_tokens=plan.footprint_work_tokens(int(job.cell["length_tokens"])))
    return row


def footprint_prompt(plan: Plan, length_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (tokens to prefill, tokens fed under the method): a task's prompt, room for decode left.

    Where there is no task (presets, synthetic KV), they are random: all but the last are prefilled.
    """
    config = plan.config
    if not plan.tasks:
        ids = random_ids(plan.facts.vocab_size, length_tokens - config.footprint_decode_tokens, seed=config.seed)
        return ids[:-1], ids[-1:]
    task = plan.tasks[0]
    prompt_tokens = length_tokens - config.footprint_decode_tokens
    ids, question_start = task.fill(plan.facts.tokenizer, prompt_tokens=prompt_tokens, seed=config.seed)
    split = len(ids) - 1 if config.method_from == "last_token" else question_start
    return ids[:split], ids[split:]


def random_ids(vocab_size: int, n_tokens: int, *, seed: int) -> tuple[int, ...]:
    """Return random token ids."""
    import numpy as np

    return tuple(np.random.default_rng(seed).integers(0, vocab_size, n_tokens).tolist())


def make_job(
    plan: Plan,
    method: "CacheMethod[Any]",
    length_tokens: int,
    *,
    kind: Literal["footprint", "throughput"] = "footprint",
) -> FootprintJob:
    """Return the job of one cell; its predictions are made here, before anything is measured."""
    config, facts = plan.config, plan.facts
    synthetic = config.synthetic_kv
    context_ids: tuple[int, ...] = ()
    if synthetic:
        context_tokens = length_tokens - config.footprint_decode_tokens - 1
        forced_ids = random_ids(facts.vocab_size, 1, seed=config.seed)
    else:
        context_ids, forced_ids = footprint_prompt(plan, length_tokens)
        context_tokens = len(context_ids)
    cell = cell_columns(
        method,
        shape=facts.shape,
        model=facts.name,
        method_from=config.method_from,
        length_tokens=length_tokens,
        prompt_tokens=context_tokens,
        dtype=facts.dtype,
        device=facts.device,
        prefill="synthetic" if synthetic else "dense",
    )
    if kind == "throughput":
        cell["mirror"] = "shared" if method.saving_kind == "offloaded" else "none"
    elif not method.unsupported(facts.shape, facts.device):
        predicted = method.predict(facts.shape, context_tokens, len(forced_ids) + config.footprint_decode_tokens - 1)
        cell["predicted_kv_bytes"] = predicted.kv_bytes
        cell["predicted_metadata_bytes"] = predicted.metadata_bytes
        cell["predicted_host_bytes"] = predicted.host_bytes
    spec = plan.specs[method.label]
    return FootprintJob(
        cell=cell,
        kind=kind,
        model=config.model,
        method=spec,
        import_folders=() if is_own(spec) else search_path(),
        kv="synthetic" if synthetic else "prefill",
        context_ids=context_ids,
        context_tokens=context_tokens,
        forced_ids=forced_ids,
        decode_tokens=config.footprint_decode_tokens,
        seed=config.seed,
        device=facts.device,
        dtype=facts.dtype,
        prefill_chunk_tokens=config.prefill_chunk_tokens,
        page_tokens=config.page_tokens,
        paper_settings=config.paper_settings,
        decode_graph=config.decode_graph,
        gpu_budget_bytes=config.gpu_budget_bytes,
        max_batch=config.max_batch if kind == "throughput" else 1,
    )


def run_worker(
    job: FootprintJob,
    *,
    timeout_s: float,
    on_phase: Callable[[str], None] = lambda phase: None,
    command: tuple[str, ...] = WORKER_COMMAND,
) -> FootprintRow | ThroughputRow:
    """Run one job in a fresh process and return its row.

    A worker that raises, runs out of memory, is killed or takes longer than ``timeout_s`` gives a row with the status,
    the reason and the phase it was in.
    """
    kills_before = kernel_oom_kills()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
        # A session of its own: Ctrl-C reaches the sweep alone, which then ends the worker.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env=worker_environment(),
            start_new_session=True,
        )
        timed_out = threading.Event()

        def stop() -> None:
            timed_out.set()
            process.kill()

        timer = threading.Timer(timeout_s, stop)
        timer.daemon = True
        timer.start()
        try:
            row, phase = _converse(process, job, on_phase)
        except BaseException:
            process.kill()
            raise
        finally:
            timer.cancel()
            _end(process)
        if row is not None:
            return row
        status, reason = _death(process.returncode, phase, stderr, oom_kills=kernel_oom_kills() - kills_before)
        if timed_out.is_set():
            status, reason = "failed", f"{phase}: stopped after {timeout_s:g} s (footprint_timeout_s)"
        memory: OomOf | None = "host" if status == "oom" else None
        return failed_row(job, status=status, reason=reason, phase=phase, oom_of=memory)


def _converse(
    process: "subprocess.Popen[str]", job: FootprintJob, on_phase: Callable[[str], None]
) -> tuple[FootprintRow | ThroughputRow | None, str]:
    """Send the job, follow the phases, return (row or None, last phase). stdin stays open: it tells that we live."""
    assert process.stdin is not None
    assert process.stdout is not None
    phase = "start"
    on_phase(phase)
    try:
        process.stdin.write(job.model_dump_json() + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return None, phase
    for line in process.stdout:
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError:
            break  # cut short by a kill: the exit status tells the rest
        if "row" in message:
            kind = ThroughputRow if job.kind == "throughput" else FootprintRow
            return kind.model_validate(message["row"]), phase
        phase = str(message["phase"])
        on_phase(phase)
    return None, phase


def _end(process: "subprocess.Popen[str]") -> None:
    """Close the pipes and make sure that the process is gone."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            # It may have died with our job unread; closing is all that is wanted.
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _death(return_code: int, phase: str, stderr: IO[str], *, oom_kills: int) -> tuple[FailureStatus, str]:
    """Say why a worker ended without a row."""
    if return_code < 0:
        name = signal.Signals(-return_code).name
        if -return_code == signal.SIGKILL and oom_kills > 0:
            return "oom", f"{phase}: the kernel killed the worker for want of host memory ({name})"
        return "failed", f"{phase}: the worker was killed by {name}"
    stderr.seek(0, os.SEEK_END)
    stderr.seek(max(0, stderr.tell() - STDERR_TAIL_CHARACTERS))
    lines = [line.strip() for line in stderr.read().splitlines() if line.strip()]
    return "failed", f"{phase}: the worker exited with {return_code}: {lines[-1] if lines else 'it said nothing'}"


def kernel_oom_kills() -> int:
    """Return how many processes the kernel has killed for want of memory since boot; 0 where it does not tell."""
    try:
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def worker_environment() -> dict[str, str]:
    """Return this process's environment, with this very kvscope importable and quiet libraries.

    torch's allocator gets expandable segments unless the user has settings of their own: what is freed inside a segment
    then goes back to the driver, so that NVML sees it.
    """
    here = str(Path(kvscope.__file__).parent.parent)
    paths = [here, *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != here)]
    own_settings = any(os.environ.get(name) for name in ALLOCATOR_VARIABLES)
    return {
        **os.environ,
        **({} if own_settings else {ALLOCATOR_VARIABLES[0]: ALLOCATOR_SETTINGS}),
        "PYTHONPATH": os.pathsep.join(paths),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


def summary(row: FootprintRow) -> str:
    """Return a row in a few words."""
    if row.status != "ok":
        return f"{row.status}: {row.reason}"
    kept_bytes = (row.resident_kv_bytes or 0) + (row.metadata_bytes or 0)
    share = kept_bytes / row.dense_kv_bytes if row.dense_kv_bytes else 1.0
    text = f"{format_bytes(kept_bytes)} on the device, {share:.1%} of dense"
    return f"{text}, {(row.tpot_s or 0) * 1e3:.2f} ms a token, {row.verdict}"


def throughput_summary(row: ThroughputRow) -> str:
    """Return a row in a few words."""
    if row.status != "ok" or row.tokens_per_s is None:
        return f"{row.status}: {row.reason}"
    return f"batch {row.largest_batch} ({row.batch_bound}), {row.tokens_per_s:.0f} tokens/s"
