"""One footprint cell, measured in the process it has to itself.

Phases: context -> weights -> warm-up (the baseline) -> prefill (peak) -> ``empty_cache`` -> decode with the memory
sampler (peak) -> the same decode without it (times). The sampler runs during the prefill whose time is part of
``ttft_s``; at one query of 13 us every 5 ms it takes 0.3 % of one core.
"""

import gc
import json
import os
import statistics
from typing import TYPE_CHECKING, Any, TextIO

from kvscope.harness.passes.device_budget import DeviceBudget
from kvscope.harness.passes.job import FootprintJob, failed_row
from kvscope.harness.passes.memory import (
    NvmlProcessMemory,
    PeakSampler,
    host_rss_bytes,
    host_rss_peak_bytes,
    verdict,
    wait_for_quiet,
)
from kvscope.harness.passes.rows import FailureStatus, failure, ledger_columns, oom_of
from kvscope.results.schema import FootprintRow, OomOf, ThroughputRow
from kvscope.units import format_bytes

if TYPE_CHECKING:
    from kvscope.harness.engine.loaded import LoadedModel
    from kvscope.methods.base import CacheMethod
    from kvscope.methods.store import PromptKV

WARM_UP_STEPS = 4


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

    def reserved_bytes(self) -> int:
        """Return what the allocator holds, blocks it has free included."""
        return int(self._cuda.memory_reserved(self._device)) if self._cuda else 0

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
        self.budget = DeviceBudget(job.gpu_budget_bytes)
        self._say = say
        self._rss_peak_bytes = 0
        self._kernel_keeps_rss_peak = host_rss_peak_bytes() is not None
        self._nvml: NvmlProcessMemory | None = None
        self._nvml_reason = "the run computes on the CPU: there is no GPU memory to read"
        self._torch: _Torch | None = None
        self._weights_bytes = 0

    def run(self) -> FootprintRow | ThroughputRow:
        """Measure the cell; every failure becomes a row."""
        try:
            return self.measure()
        except Exception as error:  # noqa: BLE001 - one cell's failure is a row, never the end of the sweep
            status, reason = failure(error, phase=self.phase)
            memory = oom_of(error, budgeted=self.budget.limit_bytes is not None) if status == "oom" else None
            return self.failed(status, reason, oom_of=memory)

    def failed(
        self, status: FailureStatus, reason: str, *, oom_of: OomOf | None = None
    ) -> FootprintRow | ThroughputRow:
        """Return the row of a cell that ended here."""
        held_bytes = self._nvml_bytes()
        if held_bytes is None and self._torch is not None:
            held_bytes = self._torch.allocated_bytes()
        others, others_bytes = self.columns.get("other_processes"), self.columns.get("other_processes_nvml_bytes")
        if status == "oom" and oom_of != "host" and others:
            held = "an unknown amount" if others_bytes is None else format_bytes(others_bytes)
            reason += f" (other processes on this GPU: {others}, holding {held})"
        return failed_row(
            self.job,
            status=status,
            reason=reason,
            phase=self.phase,
            backend=self.backend,
            failure_device_bytes=held_bytes,
            oom_of=oom_of,
            columns={**self.columns, "host_rss_peak_bytes": self._host_peak_bytes()},
        )

    def enter(self, phase: str) -> None:
        """Begin a phase, and tell the parent."""
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

    def quiet_bytes(self) -> int | None:
        """Free what is dead and return NVML's reading once it stands still."""
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
            self.columns["allocator"] = allocator_settings()
        self._torch = _Torch(device)
        self.columns["context_nvml_bytes"] = self.quiet_bytes()
        others = self._nvml.others() if self._nvml else None
        if others is not None:
            self.columns["other_processes"], self.columns["other_processes_nvml_bytes"] = others
        self.budget.apply(device, outside_bytes=self.columns["context_nvml_bytes"])

    def prepare(self) -> "tuple[LoadedModel, CacheMethod[Any]] | list[str]":
        """Pass the phases start, load and warm-up; return model and method, or why the method cannot run here."""
        from kvscope.harness.engine.decode import decode
        from kvscope.harness.engine.prefill import prefill
        from kvscope.methods.base import union_collectors

        job = self.job
        self._create_context()
        assert self._torch is not None
        self.enter("load")
        loaded, method = self._load()
        reasons = method.unsupported(loaded.shape, loaded.device)
        if reasons:
            return reasons
        self.columns["weights_nvml_bytes"] = self.quiet_bytes()
        self.columns["weights_torch_bytes"] = self._torch.allocated_bytes()
        self._weights_bytes = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
        self.check_budget("The model", self.columns["weights_nvml_bytes"], ledger_bytes=0)

        self.enter("warm-up")
        warm_kv = prefill(
            loaded,
            job.warm_up_ids,
            collectors=union_collectors([method], loaded.shape.layers),
            chunk_tokens=job.prefill_chunk_tokens,
            seed=job.seed,
        )
        decode(
            loaded,
            method,
            warm_kv,
            job.forced_ids[-1:],
            max_new_tokens=WARM_UP_STEPS,
            stop_at_eos=False,
            decode_graph=job.decode_graph,
        )
        del warm_kv
        baseline_bytes = self.columns["baseline_nvml_bytes"] = self.quiet_bytes()
        if baseline_bytes is not None:
            # Kernels that loaded with the first steps are memory torch does not see: it may have that much less.
            self.budget.apply(job.device, outside_bytes=baseline_bytes - self._torch.reserved_bytes())
        return loaded, method

    def check_budget(self, what: str, nvml_bytes: int | None, *, ledger_bytes: int) -> None:
        """Hold NVML's reading against the budget; on a CPU the weights and the ledger."""
        on_gpu = self.job.device.startswith("cuda")
        self.budget.check(nvml_bytes if on_gpu else self._weights_bytes + ledger_bytes, what)

    def prompt(self, loaded: "LoadedModel", method: "CacheMethod[Any]") -> "PromptKV":
        """Prefill the prompt, or fill its pages with random values."""
        from kvscope.harness.engine.prefill import prefill
        from kvscope.harness.engine.synthetic import synthetic_prompt
        from kvscope.methods.base import union_collectors

        job = self.job
        collectors = union_collectors([method], loaded.shape.layers)
        if job.kv == "synthetic":
            return synthetic_prompt(
                loaded,
                job.context_tokens,
                mirror=method.saving_kind == "offloaded",
                collectors=collectors,
                chunk_tokens=job.prefill_chunk_tokens,
                seed=job.seed,
            )
        return prefill(
            loaded, job.context_ids, collectors=collectors, chunk_tokens=job.prefill_chunk_tokens, seed=job.seed
        )

    def measure(self) -> FootprintRow | ThroughputRow:
        """Pass all phases."""
        from kvscope.harness.engine.decode import decode

        job = self.job
        ready = self.prepare()
        if isinstance(ready, list):
            return self.failed("unsupported", "; ".join(ready))
        loaded, method = ready
        assert self._torch is not None
        self.enter("prefill")
        self._torch.reset()
        with PeakSampler(self._read) as sampler:
            prompt_kv = self.prompt(loaded, method)
        self.columns["prefill_peak_nvml_bytes"] = sampler.peak_bytes
        peaks_bytes = self._torch.peaks_bytes()
        self.columns["prefill_peak_torch_bytes"], self.columns["prefill_peak_torch_reserved_bytes"] = peaks_bytes
        self.check_budget("The prefill", sampler.peak_bytes, ledger_bytes=prompt_kv.peak_device_kv_bytes)

        self.enter("decode")
        forced_ids = job.forced_ids
        self._torch.free()
        self._torch.reset()
        arguments: dict[str, Any] = {
            "max_new_tokens": job.decode_tokens,
            "stop_at_eos": False,
            "decode_graph": job.decode_graph,
        }
        with PeakSampler(self._read) as sampler:
            result = decode(loaded, method, prompt_kv, forced_ids, **arguments)
        self.columns["decode_peak_nvml_bytes"] = sampler.peak_bytes
        peaks_bytes = self._torch.peaks_bytes()
        self.columns["decode_peak_torch_bytes"], self.columns["decode_peak_torch_reserved_bytes"] = peaks_bytes
        self.columns["decode_tokens"] = len(result.ids)
        self.check_budget("The decode", sampler.peak_bytes, ledger_bytes=result.footprint_peak.device_bytes)

        self.enter("timing")
        self._torch.free()
        timed = decode(loaded, method, prompt_kv, forced_ids, **arguments)
        first_steps, later_s = len(forced_ids), timed.step_s[len(forced_ids) :]
        prefill_s = 0.0 if job.kv == "synthetic" else prompt_kv.prefill_s
        self.columns["tpot_s"] = statistics.median(later_s)
        self.columns["tpot_steps"] = len(later_s)
        self.columns["step_backend"], self.columns["step_captures"] = timed.step_backend, timed.captures
        self.backend = "; ".join((self.backend, *timed.backends))
        self.columns["ttft_s"] = prefill_s + timed.open_s + sum(timed.step_s[:first_steps])
        return self._row(loaded, method, prompt_kv_tokens=prompt_kv.n_tokens, result=result)

    def _load(self) -> "tuple[LoadedModel, CacheMethod[Any]]":
        from kvscope.harness.engine.models import load_model
        from kvscope.methods.registry import create_method

        job = self.job
        method = create_method(job.method, paper_settings=job.paper_settings)
        loaded = load_model(job.model, device=job.device, dtype=job.dtype, page_tokens=job.page_tokens)
        self.backend = loaded.attention_backend
        return loaded, loaded.backend.form_of(method, loaded.shape)

    def _row(
        self, loaded: "LoadedModel", method: "CacheMethod[Any]", *, prompt_kv_tokens: int, result: Any
    ) -> FootprintRow:
        columns = self.columns
        baseline_bytes, peak_bytes = columns["baseline_nvml_bytes"], columns["decode_peak_nvml_bytes"]
        known = baseline_bytes is not None and peak_bytes is not None
        dense_kv_bytes = loaded.shape.dense_kv_bytes(prompt_kv_tokens, len(result.step_s))
        ledger = ledger_columns(result, dense_kv_bytes=dense_kv_bytes)
        peak = result.footprint_peak  # NVML reads a peak, and a set that is chosen anew may have been larger before
        judged, why = verdict(
            saving_kind=method.saving_kind,
            dense_kv_bytes=dense_kv_bytes,
            ledger_bytes=peak.device_bytes,
            baseline_nvml_bytes=baseline_bytes,
            decode_peak_nvml_bytes=peak_bytes,
        )
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
            gpu_budget_bytes=self.job.gpu_budget_bytes,
            verdict=judged,
            verdict_reason=why,
        )


def allocator_settings() -> str | None:
    """Return the settings asked of torch's CUDA allocator, and whether the one that matters here is in force."""
    import torch

    asked = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or None
    if asked is None or "expandable_segments:True" not in asked:
        return asked
    try:
        in_force = torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]
    except (AttributeError, KeyError, RuntimeError, TypeError):  # not a public call: no cell should fail for it
        return f"{asked} (not confirmed)"
    return asked if in_force else f"{asked} (not in force)"
