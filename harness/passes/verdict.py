"""The verdict on a claimed saving: what the ledger of live tensors says, against what NVML saw."""

from kvscope.harness.passes.memory import MIB
from kvscope.results.schema import SavingKind, Verdict

#: Claims below this many bytes drown in NVML's own granularity (2 MiB blocks, workspaces): no verdict is given.
RESOLUTION_BYTES = 256 * MIB
#: Share of the claimed bytes that NVML must confirm.
CONFIRMED_SHARE = 0.9
#: How far NVML may be from the ledger: a share of the ledger, and what blocks and workspaces add at any size.
AGREEMENT_SHARE, AGREEMENT_BYTES = 0.03, 64 * MIB


def verdict(
    *,
    saving_kind: SavingKind,
    dense_kv_bytes: int,
    ledger_bytes: int,
    baseline_nvml_bytes: int | None,
    decode_peak_nvml_bytes: int | None,
) -> tuple[Verdict, str | None]:
    """Compare what a method says it keeps on the GPU with what the driver saw.

    ``kv = decode peak - baseline``. Ledger and driver must agree, within 3 % of the ledger and 64 MiB, whatever the
    size. Then a method that frees or offloads claims ``dense - ledger`` bytes; NVML confirms it when ``dense - kv`` is
    at least 90 % of that. A method that keeps everything resident claims ``ledger`` bytes on the GPU; NVML confirms it
    when ``kv`` is at least 90 % of them.

    Args:
        saving_kind: what the method says becomes of the bytes it does not keep.
        dense_kv_bytes: KV cache of dense attention at the same number of tokens.
        ledger_bytes: device bytes of the method's live tensors, metadata included.
        baseline_nvml_bytes: NVML after warm-up, before the prompt; None where NVML was not read.
        decode_peak_nvml_bytes: NVML peak during decode; None where NVML was not read.

    Returns:
        The verdict, and for ``mismatch`` the readings that disagree in one clause.
    """
    if baseline_nvml_bytes is None or decode_peak_nvml_bytes is None:
        return "not_measured", None
    kv_bytes = decode_peak_nvml_bytes - baseline_nvml_bytes
    off_bytes, allowed_bytes = abs(kv_bytes - ledger_bytes), int(AGREEMENT_SHARE * ledger_bytes) + AGREEMENT_BYTES
    if off_bytes > allowed_bytes:
        return "mismatch", (
            f"NVML reads {kv_bytes:,} bytes where the ledger counts {ledger_bytes:,}: {off_bytes:,} apart, "
            f"{allowed_bytes:,} allowed (3 % and 64 MiB)"
        )
    if saving_kind == "resident":
        claim_bytes, seen_bytes = ledger_bytes, kv_bytes
    else:
        claim_bytes, seen_bytes = dense_kv_bytes - ledger_bytes, dense_kv_bytes - kv_bytes
    if claim_bytes < RESOLUTION_BYTES:
        return "below_resolution", None
    if seen_bytes >= CONFIRMED_SHARE * claim_bytes:
        return saving_kind, None
    return "mismatch", f"NVML confirms {seen_bytes:,} of {claim_bytes:,} bytes claimed, less than 90 %"
