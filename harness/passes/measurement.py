"""One cell, measured in the process it has to itself: what cells of every kind have in common.

Phases: context -> weights -> warm-up (the baseline), then those of the kind.
"""

import json
from abc import ABC, abstractmethod
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, TextIO

from kvscope.errors import UsageError
from kvscope.harness.passes.allocator import TorchMemory, allocator_settings
from kvscope.harness.passes.device_budget import DeviceBudget
from kvscope.harness.passes.job import WARM_UP_TOKENS, Job, RowT
from kvscope.harness.passes.memory import NvmlProcessMemory, host_rss_bytes, host_rss_peak_bytes, wait_for_quiet
from kvscope.harness.passes.row_columns import FailureStatus, failure, oom_of
from kvscope.results.schema import OomOf
from kvscope.units import format_bytes

if TYPE_CHECKING:
    from kvscope.harness.engine.loaded import LoadedModel
    from kvscope.methods.base import CacheMethod
    from kvscope.methods.store import PromptKV

WARM_UP_STEPS = 4


class Measurement(ABC, Generic[RowT]):
    """The phases of one cell; ``columns`` fills as they pass, so that a failure keeps what was read before it.

    Of a model on several devices every reading of NVML and of torch is their sum. torch's peaks are those of each,
    which may be of different moments.
    """

    def __init__(self, job: Job[RowT], *, say: TextIO) -> None:
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
        self._torch: TorchMemory | None = None
        self._weights_bytes = 0

    @property
    def on_gpu(self) -> bool:
        """Whether the device, or each of them, is a GPU."""
        return self.job.devices[0].startswith("cuda")

    @abstractmethod
    def measure(self) -> RowT:
        """Pass all phases and return the row."""

    def run(self) -> RowT:
        """Measure the cell; every failure becomes a row."""
        try:
            return self.measure()
        except Exception as error:  # noqa: BLE001 - one cell's failure is a row, never the end of the sweep
            status, reason = failure(error, phase=self.phase)
            memory = oom_of(error, budgeted=self.budget.limit_bytes is not None) if status == "oom" else None
            return self.failed(status, reason, oom_of=memory)

    def failed(self, status: FailureStatus, reason: str, *, oom_of: OomOf | None = None) -> RowT:
        """Return the row of a cell that ended here."""
        held_bytes = self._nvml_bytes()
        if held_bytes is None and self._torch is not None:
            held_bytes = self._torch.allocated_bytes()
        others, others_bytes = self.columns.get("other_processes"), self.columns.get("other_processes_nvml_bytes")
        if status == "oom" and oom_of != "host" and others:
            held = "an unknown amount" if others_bytes is None else format_bytes(others_bytes)
            reason += f" (other processes on this GPU: {others}, holding {held})"
        return self.job.failed(
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

    @property
    def samples(self) -> bool:
        """Whether a sampler has anything to read: NVML, or the resident set where the kernel keeps no peak of it."""
        return self._nvml is not None or not self._kernel_keeps_rss_peak

    def _host_peak_bytes(self) -> int:
        return max(host_rss_peak_bytes() or 0, self._rss_peak_bytes, host_rss_bytes())

    def quiet_bytes(self) -> int | None:
        """Free what is dead and return NVML's reading once it stands still."""
        assert self._torch is not None
        self._torch.free()
        return wait_for_quiet(self._nvml_bytes)

    def _create_context(self) -> None:
        """Create the CUDA contexts before anything else, and find this process in NVML's lists."""
        devices = self.job.devices
        if self.on_gpu:
            self._nvml = NvmlProcessMemory(*(int(device.partition(":")[2] or 0) for device in devices))
            import torch

            for device in devices:
                torch.zeros(1, device=device)
                torch.cuda.synchronize(torch.device(device))
            self._nvml.identify()
            self._nvml_reason = self._nvml.reason or ""
            self.columns["allocator"] = allocator_settings()
        self._torch = TorchMemory(*devices)
        self.columns["context_nvml_bytes"] = self.quiet_bytes()
        others = self._nvml.others(self.job.sweep_pid) if self._nvml else None
        if others is not None:
            self.columns["other_processes"], self.columns["other_processes_nvml_bytes"] = others
        self.budget.apply(devices[0], outside_bytes=self.columns["context_nvml_bytes"])

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
            job.warm_up_ids(self._warm_up_tokens(loaded, method)),
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
            self.budget.apply(job.devices[0], outside_bytes=baseline_bytes - self._torch.reserved_bytes())
        return loaded, method

    def _warm_up_tokens(self, loaded: "LoadedModel", method: "CacheMethod[Any]") -> int:
        """Return the length of a short prompt: one that a budget given as a share of the prompt holds a set of."""
        n_tokens = WARM_UP_TOKENS
        while n_tokens < self.job.prompt_tokens:
            try:
                method.predict(loaded.shape, n_tokens)
            except UsageError:
                n_tokens *= 2
            else:
                break
        return n_tokens

    def check_budget(self, what: str, nvml_bytes: int | None, *, ledger_bytes: int) -> None:
        """Hold NVML's reading against the budget; on a CPU the weights and the ledger."""
        self.budget.check(nvml_bytes if self.on_gpu else self._weights_bytes + ledger_bytes, what)

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
                mirror=method.recalls_raw_pages,
                collectors=collectors,
                chunk_tokens=job.prefill_chunk_tokens,
                seed=job.seed,
            )
        return prefill(
            loaded, job.context_ids, collectors=collectors, chunk_tokens=job.prefill_chunk_tokens, seed=job.seed
        )

    def _load(self) -> "tuple[LoadedModel, CacheMethod[Any]]":
        from kvscope.harness.engine.backend import form_on
        from kvscope.harness.engine.models import load_model
        from kvscope.methods.registry import create_method

        job = self.job
        method = create_method(job.method, paper_settings=job.paper_settings)
        # The sweep that sent the job has described the model.
        loaded = load_model(
            job.model, device=job.devices[0], dtype=job.dtype, page_tokens=job.page_tokens, modules=job.modules,
            described=True,
        )  # fmt: skip
        self.backend = loaded.attention_backend
        return loaded, form_on(loaded.backend, method, loaded.shape)


def measure(job: Job[RowT], *, say: TextIO) -> RowT:
    """Measure a job in this process; every failure becomes a row.

    Args:
        say: where the phases are told, a line of JSON each.
    """
    module, _, name = job.measured_by.partition(":")
    measurement: type[Measurement[RowT]] = getattr(import_module(module), name)
    return measurement(job, say=say).run()
