"""One footprint cell: the bytes and times of one sequence, or of several alike that decode together.

Phases: context -> weights -> warm-up (the baseline) -> prefill (peak) -> ``empty_cache`` -> decode with the memory
sampler (peak) -> the same decode without it (times). The sampler runs during the prefill whose time is part of
``ttft_s``; at one query of 13 us every 5 ms it takes 0.3 % of one core. Where it has nothing to read, as on a CPU whose
kernel keeps the peak, one decode is both.
"""

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvscope.harness.passes.job import FootprintJob
from kvscope.harness.passes.measurement import Measurement
from kvscope.harness.passes.memory import PeakSampler
from kvscope.harness.passes.row_columns import ledger_columns
from kvscope.harness.passes.timing import host_load, spread_s
from kvscope.harness.passes.verdict import verdict
from kvscope.methods.shape import Footprint
from kvscope.results.memory_rows import FootprintRow

if TYPE_CHECKING:
    from kvscope.harness.engine.decoding import DecodeResult
    from kvscope.harness.engine.loaded import LoadedModel
    from kvscope.methods.base import CacheMethod
    from kvscope.methods.store import PromptKV


class FootprintMeasurement(Measurement[FootprintRow]):
    """The phases of a footprint cell."""

    job: FootprintJob

    def measure(self) -> FootprintRow:
        """Pass all phases."""
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
        result = None
        if self.samples:
            result = self._sampled_decode(loaded, method, prompt_kv)
            self.enter("timing")
        self._torch.free()
        self.columns |= host_load()
        timed = self._decode(loaded, method, prompt_kv)
        if result is None:
            result = timed
            self._held(result, peak_nvml_bytes=None)
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

    def _sampled_decode(
        self, loaded: "LoadedModel", method: "CacheMethod[Any]", prompt_kv: "PromptKV"
    ) -> "DecodeResult":
        """Decode while memory is sampled."""
        assert self._torch is not None
        self._torch.free()
        self._torch.reset()
        with PeakSampler(self._read) as sampler:
            result = self._decode(loaded, method, prompt_kv)
        peaks_bytes = self._torch.peaks_bytes()
        self.columns["decode_peak_torch_bytes"], self.columns["decode_peak_torch_reserved_bytes"] = peaks_bytes
        self._held(result, peak_nvml_bytes=sampler.peak_bytes)
        return result

    def _held(self, result: "DecodeResult", *, peak_nvml_bytes: int | None) -> None:
        """Note what a decode held, and hold it against the budget."""
        self.columns["decode_peak_nvml_bytes"] = peak_nvml_bytes
        self.columns["decode_tokens"] = len(result.ids)
        held_bytes = self.job.sequences * result.footprint_peak.device_bytes
        self.check_budget("The decode", peak_nvml_bytes, ledger_bytes=held_bytes)

    def _decode(self, loaded: "LoadedModel", method: "CacheMethod[Any]", prompt_kv: "PromptKV") -> "DecodeResult":
        """Decode the job's sequences together; return the first's result, with bytes that are the mean of all.

        All are of one prompt, and none ends before the others. ``open_s`` is that of all.
        """
        from kvscope.harness.engine.batch_decode import BatchDecode
        from kvscope.harness.engine.decoding import Request

        job = self.job
        request = Request(
            method=method,
            prompt=prompt_kv,
            forced_ids=job.forced_ids,
            max_new_tokens=job.decode_tokens,
            stop_at_eos=False,
        )
        with BatchDecode(loaded, decode_graph=job.decode_graph) as batch:
            rows = [batch.add(request) for _ in range(job.sequences)]
            while batch.under_way:
                batch.step()
        results = []
        for row in rows:
            if row.error is not None:
                raise row.error
            assert row.result is not None
            results.append(row.result)
        if job.sequences == 1:
            return results[0]

        def mean(footprints: list[Footprint]) -> Footprint:
            return sum(footprints, Footprint()).divided_by(job.sequences)

        return replace(
            results[0],
            open_s=sum(result.open_s for result in results),
            footprint_mean=mean([result.footprint_mean for result in results]),
            footprint_peak=mean([result.footprint_peak for result in results]),
            bytes_recalled=sum(result.bytes_recalled for result in results) // job.sequences,
        )

    def _row(
        self, loaded: "LoadedModel", method: "CacheMethod[Any]", *, prompt_kv_tokens: int, result: Any
    ) -> FootprintRow:
        columns, n = self.columns, self.job.sequences
        baseline_bytes, peak_bytes = columns["baseline_nvml_bytes"], columns["decode_peak_nvml_bytes"]
        known = baseline_bytes is not None and peak_bytes is not None
        dense_kv_bytes = loaded.shape.dense_kv_bytes(prompt_kv_tokens, len(result.step_s))
        ledger = ledger_columns(result, dense_kv_bytes=dense_kv_bytes)
        peak = result.footprint_peak  # NVML reads a peak, and a set that is chosen anew may have been larger before
        judged, why = verdict(
            saving_kind=method.saving_kind,
            dense_kv_bytes=n * dense_kv_bytes,
            ledger_bytes=n * peak.device_bytes,
            baseline_nvml_bytes=baseline_bytes,
            decode_peak_nvml_bytes=peak_bytes,
        )
        return FootprintRow(
            **self.job.cell,
            **ledger,
            **columns,
            status="ok",
            backend=self.backend,
            sequences=n if n > 1 else None,
            kv_nvml_bytes=(peak_bytes - baseline_bytes) // n if known else None,
            nvml_reason=None if known else self._nvml_reason or "NVML stopped listing this process",
            torch_reason=self._torch.reason if self._torch else None,
            host_rss_peak_bytes=self._host_peak_bytes(),
            gpu_budget_bytes=self.job.gpu_budget_bytes,
            verdict=judged,
            verdict_reason=why,
        )
