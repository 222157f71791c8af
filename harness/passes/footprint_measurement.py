"""One footprint cell: the bytes and times of one sequence.

Phases: context -> weights -> warm-up (the baseline) -> prefill (peak) -> ``empty_cache`` -> decode with the memory
sampler (peak) -> the same decode without it (times). The sampler runs during the prefill whose time is part of
``ttft_s``; at one query of 13 us every 5 ms it takes 0.3 % of one core.
"""

import statistics
from typing import TYPE_CHECKING, Any

from kvscope.harness.passes.measurement import Measurement
from kvscope.harness.passes.memory import PeakSampler, verdict
from kvscope.harness.passes.row_columns import ledger_columns
from kvscope.harness.passes.timing import host_load, spread_s
from kvscope.results.memory_rows import FootprintRow

if TYPE_CHECKING:
    from kvscope.harness.engine.loaded import LoadedModel
    from kvscope.methods.base import CacheMethod


class FootprintMeasurement(Measurement[FootprintRow]):
    """The phases of a footprint cell."""

    def measure(self) -> FootprintRow:
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
        self.columns |= host_load()
        timed = decode(loaded, method, prompt_kv, forced_ids, **arguments)
        first_steps, later_s = len(forced_ids), timed.step_s[len(forced_ids) :]
        prefill_s = 0.0 if job.kv == "synthetic" else prompt_kv.prefill_s
        self.columns["tpot_s"] = statistics.median(later_s)
        self.columns["tpot_p10_s"], self.columns["tpot_p90_s"] = spread_s(later_s)
        self.columns["tpot_steps"] = len(later_s)
        self.columns["step_backend"], self.columns["step_captures"] = timed.step_backend, timed.captures
        self.backend = "; ".join((self.backend, *timed.backends))
        self.columns["scores_s"] = prompt_kv.scores_s
        self.columns["ttft_s"] = prefill_s + timed.open_s + sum(timed.step_s[:first_steps])
        return self._row(loaded, method, prompt_kv_tokens=prompt_kv.n_tokens, result=result)

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
