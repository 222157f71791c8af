"""One prompt on its way through every method: what is asked of the engine, and the row of what came of it."""

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvscope.harness.engine.oom import is_oom
from kvscope.harness.passes.batch_plan import step_rows
from kvscope.harness.passes.contract import score_of
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.prompt import split_prompt
from kvscope.harness.passes.prompt_check import build
from kvscope.harness.passes.row_columns import FailureStatus, cell_columns, failed_sample_row, failure, sample_row
from kvscope.harness.passes.run_plan import Plan
from kvscope.results.schema import DecodeGraph, SampleRow
from kvscope.tasks.answers import answer_of
from kvscope.units import format_length

if TYPE_CHECKING:
    from kvscope.harness.engine.batch_noise import BatchNoise
    from kvscope.harness.engine.decoding import DecodeResult, Request
    from kvscope.harness.engine.loaded import LoadedModel
    from kvscope.methods.base import CacheMethod
    from kvscope.methods.store import PromptKV
    from kvscope.tasks.base import Sample, Task

#: Tokens of each task's first prompt that noise is measured on.
_PROBE_TOKENS = 512


def load(plan: Plan) -> "LoadedModel":
    """Load the planned model's weights, and check that the engine computes what the model does.

    Raises:
        UsageError: it does not, or the weights cannot be loaded.
    """
    from kvscope.harness.engine.models import load_model
    from kvscope.harness.engine.self_check import self_check

    config, facts = plan.config, plan.facts
    loaded = load_model(
        config.model,
        device=facts.device,
        dtype=facts.dtype,
        page_tokens=config.page_tokens,
        described=True,
        tokenizer=facts.plain_tokenizer,
        modules=None if facts.device_map is None else facts.device_map.modules,
    )
    if config.self_check:
        self_check(loaded)
        if loaded.device.type == "cuda":  # what it left on a host is little, and a collection takes a quarter second
            release_memory()
    return loaded


def shared_graph(plan: Plan) -> DecodeGraph:
    """Return whether steps that answers share are captured: on a GPU always where that can be done.

    Launched one by one, the kernels of many sequences take several times as long as they run.
    """
    return "auto" if plan.config.accuracy_graph or plan.facts.device.startswith("cuda") else "off"


def measured_noise(plan: Plan, loaded: "LoadedModel", progress: Progress) -> "BatchNoise | None":
    """Return how far logits differ between steps of one sequence and of as many as planned; None where all are of one.

    Where memory does not hold as many, of fewer. A probe that fails is told: then each answer has steps of its own.
    """
    from kvscope.harness.engine.batch_noise import batch_noise

    rows = plan.most_batch_rows
    graph, text = shared_graph(plan), beginnings(plan)
    while rows > 1:
        try:
            found = batch_noise(loaded, rows=rows, text=text, decode_graph=graph, step_rows=step_rows(plan.facts))
        except Exception as error:  # noqa: BLE001 - a model that fails the probe fails its rows, too, and they say how
            if not is_oom(error):
                why = failure(error, phase="the probe of shared steps")[1]
                progress.note(f"{why}: each answer is decoded in steps of its own.")
                return None
        else:
            if found.is_rounding:
                return found
            progress.note(
                f"In steps of several sequences the logits of model '{loaded.name}' differ by {found.share:.2g} of "
                f"their size, and rounding explains {found.tolerance:.2g}: each answer is decoded in steps of its own."
            )
            return None
        rows //= 2
        release_memory()
    return None


def beginnings(plan: Plan) -> list[int]:
    """Return what the first prompts of all tasks begin with, one behind the other: what answers are steps behind."""
    length_tokens = min(plan.config.lengths_tokens)
    found: list[int] = []
    for task, name in zip(plan.tasks, plan.task_names, strict=True):
        found += build(plan, task, name, length_tokens, 0).ids[:_PROBE_TOKENS]
    return found


class Prompt:
    """One prompt on its way through every method.

    Attributes:
        sample: the prompt.
        kv: what its prefill left; None before, and when no method needs it any more.
    """

    def __init__(self, plan: Plan, loaded: "LoadedModel", task: "Task", sample: "Sample", progress: Progress) -> None:
        self.plan = plan
        self.loaded = loaded
        self.task = task
        self.sample = sample
        self.progress = progress
        self.kv: PromptKV | None = None
        self.context_ids, self.forced_ids = split_prompt(sample, plan.config.method_from)

    def unsupported(self, method: "CacheMethod[Any]") -> str | None:
        """Return why a method cannot run: the plan's reasons, or what only the loaded model shows."""
        planned = self.plan.unsupported(method.label, self.sample.length_tokens)
        return planned or "; ".join(method.unsupported(self.loaded.shape, self.loaded.device)) or None

    def prefill(self, methods: "Sequence[CacheMethod[Any]]") -> None:
        """Prefill it for some methods."""
        from kvscope.harness.engine.prefill import prefill
        from kvscope.methods.base import union_collectors

        config = self.plan.config
        self.kv = prefill(
            self.loaded,
            self.context_ids,
            collectors=union_collectors(methods, self.loaded.shape.layers),
            chunk_tokens=self.plan.chunk_tokens,
            seed=config.seed,
        )

    def request(self, method: "CacheMethod[Any]") -> "Request":
        """Return what is to be decoded; a method with a rehearsal has it here.

        Raises:
            Exception: as the rehearsal raises it.
        """
        from kvscope.harness.engine.decoding import Request
        from kvscope.harness.engine.rehearsal import rehearsed

        assert self.kv is not None
        return rehearsed(
            self.loaded,
            Request(
                method=method,
                prompt=self.kv,
                forced_ids=self.forced_ids,
                max_new_tokens=self.sample.max_new_tokens,
                stop_strings=tuple(self.sample.stop),
            ),
        )

    def row(self, method: "CacheMethod[Any]", result: "DecodeResult", *, logit_noise: float | None) -> SampleRow:
        """Return the row of an answer; its likelihood is measured here, where that is asked for.

        Args:
            logit_noise: how far logits were measured to differ between batch sizes; None where that was not measured.
        """
        from kvscope.harness.engine.decode import answer_nll
        from kvscope.harness.engine.decode_graph import EAGER

        assert self.kv is not None
        config, sample = self.plan.config, self.sample
        n_forced = len(self.forced_ids)
        _, why_eager = self.graph()
        nll: float | None = None
        nll_reason: str | None = "not requested"
        if config.answer_nll:
            target = " " + ", ".join(sample.targets)
            answer_ids = tuple(self.loaded.tokenizer(target, add_special_tokens=False)["input_ids"])
            graph, _ = self._graph_of(n_forced + len(answer_ids) - 1)
            nll = answer_nll(self.loaded, method, self.kv, self.forced_ids, answer_ids, decode_graph=graph)
            nll_reason = None
        return sample_row(
            self._cell(method),
            sample,
            result,
            score=score_of(self.task, sample, answer_of(result.text, sample.stop)),
            prefill_s=self.kv.prefill_s,
            # Room for every step is reserved at opening, whether or not the answer ends early.
            dense_kv_bytes=self.loaded.shape.dense_kv_bytes(
                len(self.context_ids), n_forced + sample.max_new_tokens - 1
            ),
            step_backend=f"{EAGER}: {why_eager}" if why_eager and result.step_backend == EAGER else result.step_backend,
            answer_nll=nll,
            answer_nll_reason=nll_reason,
            logit_noise=logit_noise,
        )

    def failed(self, method: "CacheMethod[Any]", error: BaseException, *, phase: str) -> SampleRow:
        """Return the row of a failure, and tell the user, of a decode with the method's name."""
        status, reason = failure(error, phase=phase)
        if phase == "decode":
            self.complain(f"{method.label}: {reason}")
        return self._failed(method, status, reason)

    def complain(self, reason: str) -> None:
        """Tell the user of a problem with this prompt."""
        where = f"{self.sample.task} {format_length(self.sample.length_tokens)} sample {self.sample.sample}"
        self.progress.note(f"{where}: {reason}")

    def unsupported_row(self, method: "CacheMethod[Any]", reason: str) -> SampleRow:
        """Return the row of a method that cannot run."""
        return self._failed(method, "unsupported", reason)

    def graph(self) -> tuple[DecodeGraph, str | None]:
        """Return whether to capture the steps of this prompt alone, and why not where that was asked for.

        By the longest answer, not by the likely one: rows of a task hold and time the same kind of step.
        """
        return self._graph_of(len(self.forced_ids) + self.sample.max_new_tokens - 1)

    def _graph_of(self, n_steps: int) -> tuple[DecodeGraph, str | None]:
        """Return the same of ``n_steps`` steps: every prompt and method has addresses of its own to capture."""
        from kvscope.harness.engine.decode_graph import PAYS_FROM_STEPS

        if not self.plan.config.accuracy_graph:
            return "off", None
        if n_steps < PAYS_FROM_STEPS:
            return "off", f"{n_steps} steps at most, and a capture pays from {PAYS_FROM_STEPS}"
        return "auto", None

    def _cell(self, method: "CacheMethod[Any]") -> dict[str, Any]:
        return sample_cell(self.plan, method, self.sample)

    def _failed(self, method: "CacheMethod[Any]", status: FailureStatus, reason: str) -> SampleRow:
        return failed_sample_row(self._cell(method), self.sample, status=status, reason=reason)


def sample_cell(plan: Plan, method: "CacheMethod[Any]", sample: "Sample") -> dict[str, Any]:
    """Return the columns that the row of a prompt under a method has, whatever comes of it."""
    config, facts = plan.config, plan.facts
    context_ids, _ = split_prompt(sample, config.method_from)
    return cell_columns(
        method,
        shape=facts.shape,
        model=facts.name,
        method_from=config.method_from,
        length_tokens=sample.length_tokens,
        context_tokens=len(context_ids),
        dtype=facts.dtype,
        device=facts.where,
        self_check="passed" if config.self_check else "skipped",
        chat_template=facts.chat_template,
    )


def release_memory() -> None:
    """Drop dead tensors and give the allocator's cache back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
