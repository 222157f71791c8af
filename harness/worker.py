"""One footprint cell in a process of its own: ``python -m kvscope.harness.worker``.

The job comes as one JSON line on stdin; JSON lines go out on stdout: ``{"phase": ...}`` as the work proceeds and at the
end ``{"row": ...}``, a FootprintRow. Whatever libraries print goes to stderr. When stdin closes, the parent is gone and
the worker ends: a killed sweep leaves no process behind on the GPU.

Phases: context -> weights -> warm-up (the baseline) -> prefill (peak) -> ``empty_cache`` -> decode with the memory
sampler (peak) -> the same decode without it (times). The sampler runs during the prefill whose time is part of
``ttft_s``; at one query of 13 us every 5 ms it takes 0.3 % of one core.
"""

import gc
import json
import os
import statistics
import sys
import threading
from typing import TYPE_CHECKING, Any, Literal, TextIO

from pydantic import BaseModel, ConfigDict

from kvscope.harness.memory import (
    NvmlProcessMemory,
    PeakSampler,
    host_rss_bytes,
    host_rss_peak_bytes,
    verdict,
    wait_for_quiet,
)
from kvscope.harness.rows import (
    FailureStatus,
    failed_footprint_row,
    failure,
    ledger_columns,
)
from kvscope.results.schema import FootprintRow

if TYPE_CHECKING:
    from kvscope.harness.models import LoadedModel
    from kvscope.methods.base import CacheMethod

WARM_UP_TOKENS = 256
WARM_UP_STEPS = 4


class FootprintJob(BaseModel):
    """What one worker measures.

    Attributes:
        cell: the columns every row of this cell shares (``rows.cell_columns`` and the predictions), so that a failure
            in any phase still becomes a whole row.
        context_ids: tokens to prefill. Every method of a length gets the same ones.
        forced_ids: tokens fed under the method before it decodes on its own: at least one.
        decode_tokens: decode steps; nothing stops them early.
        decode_graph: whether steps are replays of a CUDA graph. The warm-up captures one too, whose memory is then part
            of the baseline.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cell: dict[str, Any]
    model: str
    method: str | dict[str, Any]
    context_ids: tuple[int, ...]
    forced_ids: tuple[int, ...]
    decode_tokens: int
    seed: int
    device: str
    dtype: str
    prefill_chunk_tokens: int
    page_tokens: int
    paper_settings: bool
    decode_graph: Literal["auto", "on", "off"] = "auto"


class _Torch:
    """torch's allocator and the device's clock; on a CPU the allocator has no counters."""

    def __init__(self, device: str) -> None:
        import torch

        self._cuda = torch.cuda if device.startswith("cuda") else None
        self._device = torch.device(device)

    @property
    def reason(self) -> str | None:
        return None if self._cuda else "torch keeps no memory counters on the CPU"

    def free(self) -> None:
        gc.collect()
        if self._cuda:
            self._cuda.synchronize(self._device)
            self._cuda.empty_cache()

    def reset(self) -> None:
        if self._cuda:
            self._cuda.reset_peak_memory_stats(self._device)

    def allocated_bytes(self) -> int | None:
        return int(self._cuda.memory_allocated(self._device)) if self._cuda else None

    def peaks_bytes(self) -> tuple[int | None, int | None]:
        """Return (peak allocated, peak reserved) since the last reset."""
        if not self._cuda:
            return None, None
        return int(self._cuda.max_memory_allocated(self._device)), int(self._cuda.max_memory_reserved(self._device))


class Measurement:
    """The phases of one cell; ``columns`` fills as they pass, so that a failure keeps what was read before it."""

    def __init__(self, job: FootprintJob, *, say: TextIO) -> None:
        self.job = job
        self.phase = "start"
        self.columns: dict[str, Any] = {}
        self.backend = "none"
        self._say = say
        self._rss_peak_bytes = 0
        self._kernel_keeps_rss_peak = host_rss_peak_bytes() is not None
        self._nvml: NvmlProcessMemory | None = None
        self._nvml_reason = "the run computes on the CPU: there is no GPU memory to read"
        self._torch: _Torch | None = None

    def run(self) -> FootprintRow:
        """Measure the cell; every failure becomes a row."""
        try:
            return self._measure()
        except Exception as error:  # noqa: BLE001 - one cell's failure is a row, never the end of the sweep
            status, reason = failure(error, phase=self.phase)
            return self._failed(status, reason)

    def _failed(self, status: FailureStatus, reason: str) -> FootprintRow:
        held_bytes = self._nvml_bytes()
        if held_bytes is None and self._torch is not None:
            held_bytes = self._torch.allocated_bytes()
        phase = {"warm-up": "load", "timing": "decode"}.get(self.phase, self.phase)
        return failed_footprint_row(
            self.job.cell,
            status=status,
            reason=reason,
            backend=self.backend,
            failure_phase=phase,
            failure_device_bytes=held_bytes,
            host_rss_peak_bytes=self._host_peak_bytes(),
            **self.columns,
        )

    def _enter(self, phase: str) -> None:
        self.phase = phase
        self._say.write(json.dumps({"phase": phase}) + "\n")
        self._say.flush()

    def _nvml_bytes(self) -> int | None:
        return self._nvml.read_bytes() if self._nvml else None

    def _read(self) -> int | None:
        """One reading of the sampler: NVML, and the host's resident set where the kernel keeps no peak of it."""
        if not self._kernel_keeps_rss_peak:
            self._rss_peak_bytes = max(self._rss_peak_bytes, host_rss_bytes())
        return self._nvml_bytes()

    def _host_peak_bytes(self) -> int:
        return max(host_rss_peak_bytes() or 0, self._rss_peak_bytes, host_rss_bytes())

    def _quiet_bytes(self) -> int | None:
        assert self._torch is not None
        self._torch.free()
        return wait_for_quiet(self._nvml_bytes)

    def _create_context(self) -> None:
        """Create the CUDA context before anything else, and find this process in NVML's list."""
        device = self.job.device
        if device.startswith("cuda"):
            self._nvml = NvmlProcessMemory(int(device.partition(":")[2] or 0))
            import torch

            torch.zeros(1, device=device)
            torch.cuda.synchronize(torch.device(device))
            self._nvml.identify()
            self._nvml_reason = self._nvml.reason or ""
        self._torch = _Torch(device)
        self.columns["context_nvml_bytes"] = self._quiet_bytes()

    def _measure(self) -> FootprintRow:
        from kvscope.harness.decode import decode
        from kvscope.harness.prefill import prefill
        from kvscope.methods.base import union_collectors

        job = self.job
        self._create_context()
        assert self._torch is not None
        self._enter("load")
        loaded, method = self._load()
        reasons = method.unsupported(loaded.shape, loaded.device)
        if reasons:
            return self._failed("unsupported", "; ".join(reasons))
        context_ids, forced_ids = job.context_ids, job.forced_ids
        self.columns["weights_nvml_bytes"] = self._quiet_bytes()
        self.columns["weights_torch_bytes"] = self._torch.allocated_bytes()

        self._enter("warm-up")
        warm_kv = prefill(
            loaded,
            context_ids[:WARM_UP_TOKENS],
            collectors=union_collectors([method], loaded.shape.layers),
            chunk_tokens=job.prefill_chunk_tokens,
            seed=job.seed,
        )
        arguments: dict[str, Any] = {"stop_at_eos": False, "decode_graph": job.decode_graph}
        decode(loaded, method, warm_kv, forced_ids[-1:], max_new_tokens=WARM_UP_STEPS, **arguments)
        del warm_kv
        self.columns["baseline_nvml_bytes"] = self._quiet_bytes()

        self._enter("prefill")
        self._torch.reset()
        with PeakSampler(self._read) as sampler:
            prompt_kv = prefill(
                loaded,
                context_ids,
                collectors=union_collectors([method], loaded.shape.layers),
                chunk_tokens=job.prefill_chunk_tokens,
                seed=job.seed,
            )
        self.columns["prefill_peak_nvml_bytes"] = sampler.peak_bytes
        peaks_bytes = self._torch.peaks_bytes()
        self.columns["prefill_peak_torch_bytes"], self.columns["prefill_peak_torch_reserved_bytes"] = peaks_bytes

        self._enter("decode")
        self._torch.free()
        self._torch.reset()
        arguments["max_new_tokens"] = job.decode_tokens
        with PeakSampler(self._read) as sampler:
            result = decode(loaded, method, prompt_kv, forced_ids, **arguments)
        self.columns["decode_peak_nvml_bytes"] = sampler.peak_bytes
        peaks_bytes = self._torch.peaks_bytes()
        self.columns["decode_peak_torch_bytes"], self.columns["decode_peak_torch_reserved_bytes"] = peaks_bytes
        self.columns["decode_tokens"] = len(result.ids)

        self._enter("timing")
        self._torch.free()
        timed = decode(loaded, method, prompt_kv, forced_ids, **arguments)
        first_steps, later_s = len(forced_ids), timed.step_s[len(forced_ids) :]
        self.columns["tpot_s"] = statistics.median(later_s)
        self.columns["tpot_steps"] = len(later_s)
        self.columns["step_backend"], self.columns["step_captures"] = timed.step_backend, timed.captures
        self.backend = "; ".join((self.backend, *timed.backends))
        self.columns["ttft_s"] = prompt_kv.prefill_s + timed.open_s + sum(timed.step_s[:first_steps])
        return self._row(loaded, method, prompt_kv_tokens=len(context_ids), result=result)

    def _load(self) -> "tuple[LoadedModel, CacheMethod[Any]]":
        from kvscope.harness.deepseek_v4.shape import fitted
        from kvscope.harness.models import load_model
        from kvscope.methods.registry import create_method, parse_method

        job = self.job
        method = create_method(parse_method(job.method), paper_settings=job.paper_settings)
        loaded = load_model(job.model, device=job.device, dtype=job.dtype, page_tokens=job.page_tokens)
        self.backend = loaded.attention_backend
        return loaded, fitted(method, loaded.shape)

    def _row(
        self, loaded: "LoadedModel", method: "CacheMethod[Any]", *, prompt_kv_tokens: int, result: Any
    ) -> FootprintRow:
        columns = self.columns
        baseline_bytes, peak_bytes = columns["baseline_nvml_bytes"], columns["decode_peak_nvml_bytes"]
        known = baseline_bytes is not None and peak_bytes is not None
        steps = len(result.step_s)
        dense_kv_bytes = loaded.shape.dense_kv_bytes(prompt_kv_tokens, steps)
        ledger = ledger_columns(result, dense_kv_bytes=dense_kv_bytes)
        peak = result.footprint_peak  # NVML reads a peak, and a set that is chosen anew may have been larger before
        return FootprintRow(
            **self.job.cell,
            **ledger,
            **columns,
            status="ok",
            backend=self.backend,
            kv_nvml_bytes=peak_bytes - baseline_bytes if known else None,
            nvml_reason=None if known else self._nvml_reason or "NVML stopped listing this process",
            torch_reason=self._torch.reason if self._torch else None,
            host_rss_peak_bytes=self._host_peak_bytes(),
            verdict=verdict(
                saving_kind=method.saving_kind,
                dense_kv_bytes=dense_kv_bytes,
                ledger_bytes=peak.device_bytes,
                baseline_nvml_bytes=baseline_bytes,
                decode_peak_nvml_bytes=peak_bytes,
            ),
        )


def _end_with_parent() -> None:
    """Leave as soon as stdin closes: whoever asked for the row is gone."""
    sys.stdin.read()
    os._exit(1)


def main() -> int:
    """Read the job, measure, write the row."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = FootprintJob.model_validate_json(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, name="kvscope-parent-watch", daemon=True).start()
    row = Measurement(job, say=answers).run()
    answers.write(json.dumps({"row": row.model_dump(mode="json")}) + "\n")
    answers.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
