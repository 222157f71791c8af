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
from typing import IO, TYPE_CHECKING, Any

import kvscope
from kvscope.harness.config import format_length
from kvscope.harness.plan import Plan
from kvscope.harness.progress import Progress, format_bytes
from kvscope.harness.rows import FailureStatus, cell_columns, failed_footprint_row
from kvscope.harness.worker import FootprintJob
from kvscope.results.schema import FootprintRow

if TYPE_CHECKING:
    from kvscope.methods.base import CacheMethod
    from kvscope.results.store import RunStore

WORKER_COMMAND = (sys.executable, "-m", "kvscope.harness.worker")
PHASES = ("start", "load", "warm-up", "prefill", "decode", "timing")
STDERR_TAIL_CHARACTERS = 2000


def footprint_pass(plan: Plan, store: "RunStore", progress: Progress) -> None:
    """Measure every (method, length) that has no row yet, shortest length first."""
    for length_tokens in plan.config.footprint_cells_tokens:
        pending = [method for method in plan.methods if not store.has_footprint((method.label, length_tokens))]
        if not pending:
            continue
        context_ids, forced_ids = footprint_prompt(plan, length_tokens)
        for method in pending:
            progress.begin_cell(f"footprint {method.label} {format_length(length_tokens)}", steps=1)
            progress.begin_step("fresh process", parts=len(PHASES))
            job = make_job(plan, method, length_tokens, context_ids=context_ids, forced_ids=forced_ids)
            why = plan.unsupported(method.label, length_tokens)
            if why is not None:
                row = failed_footprint_row(job.cell, status="unsupported", reason=why)
            else:
                row = run_worker(job, timeout_s=plan.config.footprint_timeout_s, on_phase=progress.part)
            store.append_footprint(row)
            progress.end_step(work_tokens=plan.footprint_work_tokens(length_tokens))
            progress.end_cell(summary(row))


def footprint_prompt(plan: Plan, length_tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (tokens to prefill, tokens fed under the method): the first task's prompt, room for decode left."""
    config, task = plan.config, plan.tasks[0]
    built_tokens = length_tokens - config.footprint_decode_tokens + task.max_new_tokens
    sample = task.build(plan.facts.tokenizer, length_tokens=built_tokens, sample=0, seed=config.seed)
    split = len(sample.ids) - 1 if config.method_from == "last_token" else sample.question_start
    return sample.ids[:split], sample.ids[split:]


def make_job(
    plan: Plan,
    method: "CacheMethod[Any]",
    length_tokens: int,
    *,
    context_ids: tuple[int, ...],
    forced_ids: tuple[int, ...],
) -> FootprintJob:
    """Return the job of one cell; its predictions are made here, before anything is measured."""
    config, facts = plan.config, plan.facts
    cell = cell_columns(
        method,
        shape=facts.shape,
        model=facts.name,
        method_from=config.method_from,
        length_tokens=length_tokens,
        prompt_tokens=len(context_ids),
        dtype=facts.dtype,
        device=facts.device,
    )
    if plan.unsupported(method.label, length_tokens) is None:
        predicted = method.predict(facts.shape, len(context_ids), len(forced_ids) + config.footprint_decode_tokens - 1)
        cell["predicted_kv_bytes"] = predicted.kv_bytes
        cell["predicted_metadata_bytes"] = predicted.metadata_bytes
        cell["predicted_host_bytes"] = predicted.host_bytes
    spec = plan.config.methods[plan.methods.index(method)]
    return FootprintJob(
        cell=cell,
        model=config.model,
        method=spec,
        context_ids=context_ids,
        forced_ids=forced_ids,
        decode_tokens=config.footprint_decode_tokens,
        seed=config.seed,
        device=facts.device,
        dtype=facts.dtype,
        prefill_chunk_tokens=config.prefill_chunk_tokens,
        page_tokens=config.page_tokens,
        paper_settings=config.paper_settings,
        decode_graph=config.decode_graph,
    )


def run_worker(
    job: FootprintJob,
    *,
    timeout_s: float,
    on_phase: Callable[[str], None] = lambda phase: None,
    command: tuple[str, ...] = WORKER_COMMAND,
) -> FootprintRow:
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
        return failed_footprint_row(job.cell, status=status, reason=reason, failure_phase=failure_phase(phase))


def failure_phase(phase: str) -> str:
    """Return the phase as the schema counts it: warm-up belongs to load, timing to decode."""
    return {"warm-up": "load", "timing": "decode"}.get(phase, phase)


def _converse(
    process: "subprocess.Popen[str]", job: FootprintJob, on_phase: Callable[[str], None]
) -> tuple[FootprintRow | None, str]:
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
            return FootprintRow.model_validate(message["row"]), phase
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
    """Return this process's environment, with this very kvscope importable and quiet libraries."""
    here = str(Path(kvscope.__file__).parent.parent)
    paths = [here, *(path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != here)]
    return {
        **os.environ,
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
