"""The decode step and the prefill of a Llama-3.1-8B shape on a GPU: eager and as a CUDA graph, dense and lsa.

    python benchmarks/decode_step.py                      # every part; writes results/decode_step.json
    python benchmarks/decode_step.py --only tpot --only refresh
    python benchmarks/decode_step.py --smoke              # a tiny model on the CPU: shows that the parts run, no more

Parts: ``tpot`` against length, ``refresh`` (its time and the stall it causes), ``attention`` of dense against lsa,
``prefill_attention`` and ``prefill``. Weights, KV and the indexer are random: times and bytes mean something, answers
do not. A part that would begin after ``--most-s`` is left out, and said to be. Ends with 0 when every target is met, 1
when one is missed or a part failed, 3 without a GPU.
"""

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, save_result, say

from kvscope.harness.passes.environment import capture_environment
from kvscope.methods.kernels.dispatch import unsupported_machine

PARTS = ("attention", "prefill_attention", "prefill", "tpot", "refresh")
GROWTH_TARGET, STALL_TARGET, ATTENTION_TARGET, PREFILL_TARGET = 1.25, 0.05, 4.0, 400.0
#: Dense bf16 of the data sheets, without sparsity.
PEAK_FLOP_PER_S = {"H100 PCIe": 756e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}


def peak_flop_per_s() -> float | None:
    """Return the card's peak in bf16 where it is known."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for card, peak in PEAK_FLOP_PER_S.items() if all(word in name for word in card.split())), None)


def measure(parts: list[str], *, smoke: bool, most_s: float) -> list[dict[str, Any]]:
    """Run the parts; what one raises is a row, and the others still run."""
    import decode_step_cases as cases
    import prefill_cases

    scale = cases.SMOKE if smoke else cases.FULL
    makers = {
        "attention": lambda: cases.attention_rows(scale),
        "prefill_attention": lambda: prefill_cases.prefill_attention_rows(scale),
        "prefill": lambda: prefill_cases.prefill_rows(scale, peak_flop_per_s=peak_flop_per_s()),
        "tpot": lambda: cases.tpot_rows(scale),
        "refresh": lambda: cases.refresh_rows(scale),
    }
    rows: list[dict[str, Any]] = []
    begun_s = time.monotonic()
    for part in parts:
        started_s = time.monotonic()
        if started_s - begun_s > most_s:
            rows.append({"part": part, "case": "", "status": "not measured", "reason": f"{most_s:.0f} s were over"})
            continue
        try:
            for row in makers[part]():
                rows.append({"status": "ok", **row})
                say(line(rows[-1]))
                if time.monotonic() - begun_s > most_s:
                    rows.append({"part": part, "case": "the rest", "status": "not measured",
                                 "reason": f"{most_s:.0f} s were over"})  # fmt: skip
                    break
        except Exception as error:  # noqa: BLE001 - whatever fails is the result, and the other parts still run
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            rows.append({"part": part, "case": "", "status": "failed", "reason": f"{type(error).__name__}: {reason}"})
            say(line(rows[-1]))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        say(f"  ({part}: {time.monotonic() - started_s:.0f} s)")
    return rows


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the comparisons the targets are about, where their rows are there."""
    good = [r for r in rows if r["status"] == "ok"]
    found = []

    def add(what: str, value: float, target: float, *, at_most: bool) -> None:
        met = value <= target if at_most else value >= target
        found.append({"what": what, "value": value, "target": target, "at_most": at_most, "target_met": met})

    curve = {
        r["length_tokens"]: r["tpot_s"]
        for r in good
        if r["part"] == "tpot" and r["step"] == "graph" and r["case"].endswith("tokens")
    }
    if curve and {32 * 1024, 512 * 1024} <= set(curve):
        add("TPOT of lsa at a budget, 512K over 32K", curve[512 * 1024] / curve[32 * 1024], GROWTH_TARGET, at_most=True)
    for r in good:
        if r["part"] == "refresh" and r["case"] == "stale1":
            what = f"stall of a refresh over its interval, stale1, {r['length_tokens'] // 1024}K"
            add(what, r["stall_share"], STALL_TARGET, at_most=True)
    attention = {r["case"].split()[0]: r["one_layer_s"] for r in good if r["part"] == "attention"}
    if {"dense", "lsa"} <= set(attention):
        ratio = attention["dense"] / attention["lsa"]
        add("attention time of dense over lsa, longest context", ratio, ATTENTION_TARGET, at_most=False)
    prefill = [r["tflop_per_s"] for r in good if r["part"] == "prefill_attention"]
    if prefill:
        add("prefill attention, TFLOP/s, best chunk size", max(prefill), PREFILL_TARGET, at_most=False)
    return found


def line(r: dict[str, Any]) -> str:
    """Return one row of the table."""
    length = f"{r['length_tokens'] / 1024:g}K" if "length_tokens" in r else ""
    head = f"{r['part']:<18}{r['case']:<24}{length:>7} "
    if r["status"] != "ok":
        return f"{head}{r['status']}: {r['reason']}"
    if r["part"] == "tpot":
        captured = f"captured {r['captures']}x in {r['capture_s']:.1f} s" if r["step"] == "graph" else ""
        return f"{head}{r['step']:<6} {1e3 * r['tpot_s']:8.2f} ms, {r['device_bytes'] / 2**30:6.2f} GiB {captured}"
    if r["part"] == "refresh":
        return (
            f"{head}{1e3 * r['refresh_s']:7.2f} ms for {r['recalled_bytes'] / 1e6:.0f} MB; the interval is longer by "
            f"{1e3 * r['stall_s']:.2f} ms = {100 * r['stall_share']:.1f} %; hit rate {r['hit_rate']}"
        )
    if r["part"] == "attention":
        return f"{head}{1e6 * r['one_layer_s']:8.1f} us a layer, {1e3 * r['all_layers_s']:.2f} ms in all"
    used = f", {100 * r['model_flop_utilisation']:.1f} % of peak" if r.get("model_flop_utilisation") else ""
    speed = f", {r['tokens_per_s_of_all_layers']:,.0f} tokens/s" if "tokens_per_s_of_all_layers" in r else ""
    return f"{head}{r['time_s']:7.3f} s {r['tflop_per_s']:7.1f} TFLOP/s{used}{speed}"


def main() -> int:
    """Run, write JSON, print the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="one part (repeatable); default: all")
    parser.add_argument("--most-s", type=float, default=180.0, help="begin nothing after this many seconds")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "decode_step.json", help="where the result goes")
    arguments = parser.parse_args()
    if not arguments.smoke:
        reasons = unsupported_machine("cuda" if torch.cuda.is_available() else "cpu")
        if reasons:
            print(f"The decode step cannot be measured here: {'; '.join(reasons)}.", file=sys.stderr)
            return 3
    started_s = time.monotonic()
    parts = [part for part in PARTS if part in (arguments.only or PARTS)]
    rows = measure(parts, smoke=arguments.smoke, most_s=arguments.most_s)
    comparisons = judge(rows)
    result = {
        "benchmark": "decode_step",
        "smoke": arguments.smoke,
        "environment": capture_environment(device="cpu" if arguments.smoke else "cuda:0"),
        "took_s": round(time.monotonic() - started_s, 1),
        "comparisons": comparisons,
        "rows": rows,
    }
    save_result(arguments.out, result)
    print()
    for r in rows:
        print(line(r))
    for c in comparisons:
        met = "met" if c["target_met"] else "MISSED"
        bound = "at most" if c["at_most"] else "at least"
        print(f"{c['what']}: {c['value']:.3f} ({bound} {c['target']}) {met}")
    print(f"{result['took_s']} s, written to {arguments.out}")
    if arguments.smoke:
        return 1 if any(r["status"] == "failed" for r in rows) else 0
    return 1 if any(r["status"] == "failed" for r in rows) or not all(c["target_met"] for c in comparisons) else 0


if __name__ == "__main__":
    sys.exit(main())
