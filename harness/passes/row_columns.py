"""Rows from measurements: what every row of one (method, length) shares, and how a failure becomes a row."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from kvscope.errors import DeviceBudgetExceeded
from kvscope.harness.engine.oom import is_oom, is_torch_oom
from kvscope.harness.passes.environment import package_version
from kvscope.harness.passes.timing import host_load, spread_s
from kvscope.results.schema import OomOf, ResidencyRecord, SampleRow, SelfCheckState

if TYPE_CHECKING:
    from kvscope.harness.engine.decoding import DecodeResult
    from kvscope.methods.base import CacheMethod, ModelShape
    from kvscope.tasks.base import Sample

FailureStatus = Literal["unsupported", "failed", "oom"]
MAX_REASON_CHARACTERS = 600


def failure(error: BaseException, *, phase: str) -> tuple[FailureStatus, str]:
    """Return (status, reason) of a cell that ended in ``error``; the reason is one line."""
    status: FailureStatus = "oom" if is_oom(error) else "failed"
    return status, one_line(f"{phase}: {type(error).__name__}: {error}")


def oom_of(error: BaseException, *, budgeted: bool) -> OomOf:
    """Return which memory an out-of-memory error is about.

    Args:
        budgeted: whether the process was held to a device budget: then that is what the device ran out of.
    """
    if isinstance(error, DeviceBudgetExceeded):
        return "device_budget"
    if is_torch_oom(error) or "CUDA" in str(error):
        return "device_budget" if budgeted else "device"
    return "host"


def one_line(text: str) -> str:
    """Return text on one line, cut to a length a table can hold; what UTF-8 cannot hold is written as an escape."""
    flat = " ".join(text.split()).encode("utf-8", "backslashreplace").decode("utf-8")
    return flat if len(flat) <= MAX_REASON_CHARACTERS else flat[: MAX_REASON_CHARACTERS - 4] + " ..."


def cell_columns(
    method: "CacheMethod[Any]",
    *,
    shape: "ModelShape",
    model: str,
    method_from: str,
    length_tokens: int,
    context_tokens: int,
    dtype: str,
    device: str,
    self_check: SelfCheckState,
    chat_template: str | None,
    prefill: Literal["dense", "synthetic"] = "dense",
) -> dict[str, Any]:
    """Columns that sample rows and footprint rows of one (method, length) have in common.

    Args:
        context_tokens: tokens that are prefilled, which options given as a share are a share of.
        self_check: what is known of the model's.
        chat_template: hash of the template that its prompts have; None for none.
    """
    return {
        "model": model,
        "method": method.name,
        "method_label": method.label,
        "config": method.effective_config(context_tokens, method.stored(shape)) | method.kv_values(),
        "length_tokens": length_tokens,
        "saving_kind": method.saving_kind,
        "noop": method.is_noop(context_tokens, shape),
        "prefill": prefill,
        "method_from": method_from,
        "selection": getattr(method, "selection", "free"),
        "dtype": dtype,
        "device": device,
        "transformers_version": package_version("transformers"),
        "torch_version": package_version("torch"),
        "self_check": self_check,
        "chat_template": chat_template,
    }


def ledger_columns(result: "DecodeResult", *, dense_kv_bytes: int) -> dict[str, Any]:
    """The ledger of live cache tensors over one decode, as both kinds of row hold it."""
    footprint = result.footprint_mean
    return {
        "resident_kv_bytes": footprint.kv_bytes,
        "metadata_bytes": footprint.metadata_bytes,
        "host_kv_bytes": footprint.host_bytes,
        "dense_kv_bytes": dense_kv_bytes,
        "bytes_read_per_step": footprint.bytes_read_per_step,
        "attention_flops_per_step": footprint.attention_flops_per_step,
        "bytes_recalled": result.bytes_recalled,
        "kv_bytes_by_kind": result.bytes_by_kind,
        "residency": None if result.residency is None else ResidencyRecord(**asdict(result.residency)),
    }


def prompt_columns(sample: "Sample") -> dict[str, Any]:
    """Columns of a sample row that come from its prompt."""
    return {
        "task": sample.task,
        "question_type": sample.question_type,
        "sample": sample.sample,
        "seed": sample.seed,
        "depth": sample.depth,
        "prompt_sha256": sample.prompt_sha256,
        "prompt_tokens": len(sample.ids),
        "truncated_tokens": sample.truncated_tokens,
        "targets": sample.targets,
    }


def sample_row(
    cell: dict[str, Any],
    sample: "Sample",
    result: "DecodeResult",
    *,
    score: float,
    prefill_s: float,
    dense_kv_bytes: int,
    step_backend: str,
    answer_nll: float | None,
    answer_nll_reason: str | None,
    logit_noise: float | None,
) -> SampleRow:
    """Return the row of one answered prompt.

    Args:
        logit_noise: how far logits were measured to differ between batch sizes; None where that was not measured.
    """
    gap = result.least_logit_gap
    step_p10_s, step_p90_s = spread_s(result.step_s)
    return SampleRow(
        **cell,
        **prompt_columns(sample),
        **ledger_columns(result, dense_kv_bytes=dense_kv_bytes),
        status="ok",
        output=result.text,
        score=score,
        stop_reason=result.stop_reason,
        answer_nll=answer_nll,
        answer_nll_reason=answer_nll_reason,
        prefill_s=prefill_s,
        decode_s=result.decode_s,
        decode_tokens=len(result.ids),
        step_p10_s=step_p10_s,
        step_p90_s=step_p90_s,
        **host_load(),
        step_backend=step_backend,
        batch=result.batch,
        least_logit_gap=gap,
        logit_noise=None if result.batch == 1 else logit_noise,
        # Each of the two logits may be off by the noise. Without noise equal logits are equal in any step.
        tie=None if result.batch == 1 or logit_noise is None else logit_noise > 0 and gap <= 2 * logit_noise,
    )


def failed_sample_row(cell: dict[str, Any], sample: "Sample", *, status: FailureStatus, reason: str) -> SampleRow:
    """Return the row of a prompt that could not be answered under a method."""
    return SampleRow(**cell, **prompt_columns(sample), status=status, reason=one_line(reason))
