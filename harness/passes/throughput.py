"""The largest batch that fits, and its tokens a second: one (method, length) in a worker process of its own.

Sequences are opened one by one until memory ends, then decoded together (``engine.session``). If a step does
not fit, one sequence fewer is tried. The KV is synthetic: throughput does not depend on its values, and one prompt
serves every sequence.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from kvscope.harness.engine.finite import finite_tokens
from kvscope.harness.engine.oom import is_oom
from kvscope.harness.engine.session import Session
from kvscope.harness.passes.floor import bus_bytes_per_s, copy_bytes_per_s, floor_s, weights_read_bytes
from kvscope.harness.passes.job import ThroughputJob
from kvscope.harness.passes.measurement import Measurement
from kvscope.harness.passes.memory import PeakSampler
from kvscope.harness.passes.timing import host_load, spread_s
from kvscope.methods.base import Footprint
from kvscope.results.schema import BatchBound, ThroughputRow

if TYPE_CHECKING:
    from kvscope.harness.engine.loaded import LoadedModel
    from kvscope.methods.base import CacheMethod
    from kvscope.methods.store import PromptKV


class ThroughputMeasurement(Measurement[ThroughputRow]):
    """The phases of a throughput cell: start, load, warm-up, prefill (synthetic), decode."""

    job: ThroughputJob

    def measure(self) -> ThroughputRow:
        """Pass all phases."""
        job = self.job
        ready = self.prepare()
        if isinstance(ready, list):
            return self.failed("unsupported", "; ".join(ready))
        loaded, method = ready
        self.enter("prefill")
        prompt_kv = self.prompt(loaded, method)
        self.enter("decode")
        load = host_load()
        bandwidths = {
            "copy_bytes_per_s": copy_bytes_per_s(loaded.device),
            "bus_bytes_per_s": bus_bytes_per_s(loaded.device),
        }
        self.quiet_bytes()
        open_session = partial(Session, loaded, decode_graph=job.decode_graph)
        for _ in range(2):  # twice: kernels of a refresh compile when it first comes, which no warm-up reaches
            with open_session() as session:
                session.add(method, prompt_kv, reserve_tokens=job.decode_tokens)
                alone_s, _ = self._decode(session)
        batch = job.max_batch
        bound: BatchBound = "max_batch"
        while True:
            with open_session() as session:
                opened = self._open(session, batch, method=method, prompt_kv=prompt_kv)
                if opened < batch:
                    batch, bound = opened, self._device_bound()
                filled_bytes = session.bytes_recalled()
                try:
                    step_s, peak_nvml_bytes = self._decode(session)
                    footprint = session.footprint()
                    recalled_bytes, step_backend = session.bytes_recalled(), session.step_backend
                    one_launch = session.attends_together
                except Exception as error:
                    if not is_oom(error) or batch <= 1:
                        raise
                    batch, bound = batch - 1, self._device_bound()
                    del error
                else:
                    break
            self.quiet_bytes()
        return self._throughput_row(
            loaded,
            prompt_kv,
            batch=batch,
            bound=bound,
            step_s=step_s,
            alone_s=alone_s,
            footprint=footprint,
            recalled_bytes=recalled_bytes,
            recalled_bytes_per_step=(recalled_bytes - filled_bytes) // job.decode_tokens,
            bandwidths=bandwidths,
            recalls_behind=getattr(method.config, "refresh", None) == "stale1",
            batching="one_launch" if one_launch else "batched_step",
            step_backend=step_backend,
            peak_nvml_bytes=peak_nvml_bytes,
            load=load,
        )

    def _device_bound(self) -> BatchBound:
        return "device" if self.budget.limit_bytes is None else "device_budget"

    def _open(self, session: Session, batch: int, *, method: CacheMethod[Any], prompt_kv: PromptKV) -> int:
        """Open sequences up to ``batch``, fewer where memory ends; return how many. At least one, or it raises."""
        each = method.predict(prompt_kv.shape, prompt_kv.n_tokens, self.job.decode_tokens)
        for n_open in range(batch):
            try:
                self.check_budget(
                    f"A batch of {n_open + 1}", self._nvml_bytes(), ledger_bytes=(n_open + 1) * each.device_bytes
                )
                session.add(method, prompt_kv, reserve_tokens=self.job.decode_tokens)
            except Exception as error:
                if not is_oom(error) or n_open == 0:
                    raise
                return n_open
        return batch

    def _decode(self, session: Session) -> tuple[list[float], int | None]:
        """Decode; return the seconds of each step behind the first, and NVML's peak."""
        device = session.members[0].cache.device
        tokens_n = torch.full((len(session.members),), self.job.forced_ids[-1], device=device)
        step_s = []
        with PeakSampler(self._nvml_bytes, interval_s=0.05) as sampler:
            for step in range(self.job.decode_tokens):
                started_s = time.perf_counter()
                tokens_n, _ = finite_tokens(session, session.step(tokens_n), step=step)  # waits for the device
                if step:
                    step_s.append(time.perf_counter() - started_s)
        self.check_budget("The batch", sampler.peak_bytes, ledger_bytes=session.footprint().device_bytes)
        return step_s, sampler.peak_bytes

    def _throughput_row(
        self,
        loaded: LoadedModel,
        prompt_kv: PromptKV,
        *,
        batch: int,
        bound: BatchBound,
        step_s: list[float],
        alone_s: list[float],
        footprint: Footprint,
        recalled_bytes: int,
        recalled_bytes_per_step: int,
        bandwidths: dict[str, Any],
        recalls_behind: bool,
        batching: Literal["batched_step", "one_launch"],
        step_backend: str,
        peak_nvml_bytes: int | None,
        load: dict[str, Any],
    ) -> ThroughputRow:
        job, mean_s = self.job, statistics.fmean(step_s)
        step_p10_s, step_p90_s = spread_s(step_s)
        weights_bytes = weights_read_bytes(loaded)
        return ThroughputRow(
            **job.cell,
            **load,
            **bandwidths,
            batching=batching,
            floor_s=floor_s(
                weights_bytes + footprint.bytes_read_per_step,
                recalled_bytes_per_step,
                recalls_behind=recalls_behind,
                **bandwidths,
            ),
            weights_read_bytes=weights_bytes,
            recalled_bytes_per_step=recalled_bytes_per_step,
            status="ok",
            backend=self.backend,
            largest_batch=batch,
            batch_bound=bound,
            tokens_per_s=batch / mean_s,
            step_s=mean_s,
            step_p10_s=step_p10_s,
            step_p90_s=step_p90_s,
            tokens_per_s_at_1=1.0 / statistics.fmean(alone_s),
            steps=len(step_s),
            other_processes=self.columns.get("other_processes"),
            step_backend=step_backend,
            gpu_budget_bytes=job.gpu_budget_bytes,
            batch_peak_nvml_bytes=peak_nvml_bytes,
            resident_kv_bytes=footprint.kv_bytes,
            metadata_bytes=footprint.metadata_bytes,
            host_kv_bytes=footprint.host_bytes,
            dense_kv_bytes=batch * loaded.shape.dense_kv_bytes(prompt_kv.n_tokens, job.decode_tokens),
            bytes_read_per_step=footprint.bytes_read_per_step,
            attention_flops_per_step=footprint.attention_flops_per_step,
            bytes_recalled=recalled_bytes,
        )
