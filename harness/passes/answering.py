"""One prompt on its way through every method: prefilled once, a row of each method as soon as it exists."""

import gc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kvscope.harness.passes.base import Plan
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.prompt import split_prompt
from kvscope.harness.passes.row_columns import FailureStatus, cell_columns, failed_sample_row, failure, sample_row
from kvscope.results.schema import DecodeGraph, SampleRow
from kvscope.tasks.answers import answer_of
from kvscope.units import format_length

if TYPE_CHECKING:
    from kvscope.harness.engine.loaded import LoadedModel
    from kvscope.methods.base import CacheMethod
    from kvscope.methods.store import PromptKV
    from kvscope.results.store import RunStore
    from kvscope.tasks.base import Sample, Task


def load(plan: Plan) -> "LoadedModel":
    """Load the planned model's weights, and check that the engine computes what the model does.

    Raises:
        UsageError: it does not, or the weights cannot be loaded.
    """
    from kvscope.harness.engine.models import load_model
    from kvscope.harness.engine.self_check import self_check

    config, facts = plan.config, plan.facts
    loaded = load_model(config.model, device=facts.device, dtype=facts.dtype, page_tokens=config.page_tokens)
    if config.self_check:
        self_check(loaded)
        release_memory()
    return loaded


class Prompt:
    """One prompt on its way through every method."""

    def __init__(self, plan: Plan, loaded: "LoadedModel", task: "Task", sample: "Sample", progress: Progress) -> None:
        self.plan = plan
        self.loaded = loaded
        self.task = task
        self.sample = sample
        self.progress = progress
        self.context_ids, self.forced_ids = split_prompt(sample, plan.config.method_from)

    def answer(self, methods: "Sequence[CacheMethod[Any]]", store: "RunStore") -> None:
        """Prefill once, decode under each method, append each row at once. A failure is a row too."""
        length_tokens = self.sample.length_tokens
        reasons = {method.label: self._unsupported(method, length_tokens) for method in methods}
        for method in methods:
            why = reasons[method.label]
            if why is not None:
                store.append_sample(self._failed(method, "unsupported", why))
        able = [method for method in methods if reasons[method.label] is None]
        if not able:
            return
        self.progress.part("prefill")
        try:
            prompt_kv = self._prefill(able)
        except Exception as error:  # noqa: BLE001 - becomes a row of every method; the sweep goes on
            status, reason = failure(error, phase="prefill")
            self._complain(reason)
            for method in able:
                store.append_sample(self._failed(method, status, reason))
            del error
            release_memory()
            return
        for method in able:
            self.progress.part(method.label)
            try:
                row = self._decode(method, prompt_kv)
            except Exception as error:  # noqa: BLE001 - becomes this method's row; the others go on
                status, reason = failure(error, phase="decode")
                self._complain(f"{method.label}: {reason}")
                row = self._failed(method, status, reason)
                del error
                release_memory()
            store.append_sample(row)

    def _unsupported(self, method: "CacheMethod[Any]", length_tokens: int) -> str | None:
        """Return why a method cannot run: the plan's reasons, or what only the loaded model shows."""
        planned = self.plan.unsupported(method.label, length_tokens)
        return planned or "; ".join(method.unsupported(self.loaded.shape, self.loaded.device)) or None

    def _prefill(self, methods: "Sequence[CacheMethod[Any]]") -> "PromptKV":
        from kvscope.harness.engine.prefill import prefill
        from kvscope.methods.base import union_collectors

        config = self.plan.config
        return prefill(
            self.loaded,
            self.context_ids,
            collectors=union_collectors(methods, self.loaded.shape.layers),
            chunk_tokens=config.prefill_chunk_tokens,
            seed=config.seed,
        )

    def _decode(self, method: "CacheMethod[Any]", prompt_kv: "PromptKV") -> SampleRow:
        from kvscope.harness.engine.decode import answer_nll, decode
        from kvscope.harness.engine.decode_graph import EAGER

        config, sample = self.plan.config, self.sample
        n_forced = len(self.forced_ids)
        # By the longest answer, not by the likely one: rows of a task hold and time the same kind of step.
        graph, why_eager = self._graph(n_forced + sample.max_new_tokens - 1)
        result = decode(
            self.loaded,
            method,
            prompt_kv,
            self.forced_ids,
            max_new_tokens=sample.max_new_tokens,
            stop_strings=sample.stop,
            decode_graph=graph,
        )
        nll: float | None = None
        nll_reason: str | None = "not requested"
        if config.answer_nll:
            target = " " + ", ".join(sample.targets)
            answer_ids = tuple(self.loaded.tokenizer(target, add_special_tokens=False)["input_ids"])
            graph, _ = self._graph(n_forced + len(answer_ids) - 1)
            nll = answer_nll(self.loaded, method, prompt_kv, self.forced_ids, answer_ids, decode_graph=graph)
            nll_reason = None
        return sample_row(
            self._cell(method),
            sample,
            result,
            score=self.task.score(sample, answer_of(result.text, sample.stop)),
            prefill_s=prompt_kv.prefill_s,
            # Room for every step is reserved at opening, whether or not the answer ends early.
            dense_kv_bytes=self.loaded.shape.dense_kv_bytes(
                len(self.context_ids), len(self.forced_ids) + sample.max_new_tokens - 1
            ),
            step_backend=f"{EAGER}: {why_eager}" if why_eager else result.step_backend,
            answer_nll=nll,
            answer_nll_reason=nll_reason,
        )

    def _graph(self, n_steps: int) -> tuple[DecodeGraph, str | None]:
        """Return whether to capture the step, and why not where that was asked for.

        Every prompt and method has addresses of its own, so each captures anew.

        Args:
            n_steps: steps there may be.
        """
        from kvscope.harness.engine.decode_graph import PAYS_FROM_STEPS

        if not self.plan.config.accuracy_graph:
            return "off", None
        if n_steps < PAYS_FROM_STEPS:
            return "off", f"{n_steps} steps at most, and a capture pays from {PAYS_FROM_STEPS}"
        return "auto", None

    def _cell(self, method: "CacheMethod[Any]") -> dict[str, Any]:
        return cell_columns(
            method,
            shape=self.plan.facts.shape,
            model=self.plan.facts.name,
            method_from=self.plan.config.method_from,
            length_tokens=self.sample.length_tokens,
            context_tokens=len(self.context_ids),
            dtype=self.plan.facts.dtype,
            device=self.plan.facts.device,
            self_check="passed" if self.plan.config.self_check else "skipped",
        )

    def _failed(self, method: "CacheMethod[Any]", status: FailureStatus, reason: str) -> SampleRow:
        return failed_sample_row(self._cell(method), self.sample, status=status, reason=reason)

    def _complain(self, reason: str) -> None:
        where = f"{self.sample.task} {format_length(self.sample.length_tokens)} sample {self.sample.sample}"
        self.progress.note(f"{where}: {reason}")


def release_memory() -> None:
    """Drop dead tensors and give the allocator's cache back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
