"""The Triton kernels on a GPU: first against references in fp64, then timed against the card's own copy bandwidth.

    python benchmarks/kernels.py                 # checks, times, targets; writes results/kernels.json
    python benchmarks/kernels.py --sweep         # and the constants of paged decode and of the indexer
    python benchmarks/kernels.py --only packed_decode    # decode over packed pages against bf16
    python benchmarks/kernels.py --only uneven_decode    # 31 sequences of uneven lengths against flashinfer

Times are medians on the GPU; inputs take turns so that no cache holds them. A kernel that fails its check is not timed.
Ends with 0 when every check passes and every target is met, else with 1.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, save_result, say

from kvscope.harness.passes.environment import capture_environment
from kvscope.methods.kernels.dispatch import unsupported_machine

OPS = ("paged_decode", "uneven_decode", "packed_decode", "indexer_score", "select", "host_gather", "block_scores")
SDPA_TARGET, FLASHINFER_TARGET = 0.95, 1.0


def run_checks(names: Iterable[str]) -> dict[str, Any]:
    """Run the checks of some kernels; what one raises is its result."""
    from kernel_checks import CHECKS

    found: dict[str, Any] = {}
    for name in names:
        torch.manual_seed(0)
        try:
            found[name] = {"status": "ok", "largest_error": CHECKS[name]()}
        except Exception as error:  # noqa: BLE001 - whatever fails is the result, and the others still run
            found[name] = {"status": "failed", "reason": _first_line(error)}
        say(f"check {name}: {found[name]['status']} {found[name].get('reason', '')}")
    return found


def collect(rows: list[dict[str, Any]], make: Callable[[], Iterable[dict[str, Any]]], op: str) -> None:
    """Add the rows of one group; an error ends that group, and is a row."""
    started_s = time.monotonic()
    try:
        for found in make():
            rows.append(found)
            say(_line(found))
    except Exception as error:  # noqa: BLE001 - as above
        reason = f"{type(error).__name__}: {_first_line(error)}"
        rows.append({"op": op, "case": "", "status": "failed", "reason": reason})
        say(f"{op} failed: {reason}")
    torch.cuda.empty_cache()
    say(f"  ({op}: {time.monotonic() - started_s:.0f} s)")


def measure(ops: list[str], checks: dict[str, Any], *, sweep: bool) -> list[dict[str, Any]]:
    """Time the kernels that passed, and their peers."""
    import indexer_cases
    import kernel_cases as cases

    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    collect(rows, cases.copy_rows, "copy")
    good = [op for op in ops if checks[op]["status"] == "ok"]
    if "paged_decode" in good:
        inputs = cases.DecodeInputs()
        collect(rows, lambda: cases.decode_rows(inputs), "paged_decode")
        collect(rows, lambda: [cases.gather_decode_row(inputs)], "paged_decode")
        collect(rows, lambda: cases.sdpa_rows(inputs), "torch sdpa")
        if has_flashinfer(rows):
            collect(rows, lambda: cases.flashinfer_rows(inputs), "flashinfer")
        if sweep:
            collect(rows, lambda: cases.sweep_rows(inputs), "sweep")
        del inputs
    if "uneven_decode" in good:
        import uneven_cases

        beside = has_flashinfer(rows)
        collect(rows, lambda: uneven_cases.uneven_rows(flashinfer=beside), "uneven_decode")
    if "packed_decode" in good:
        import packed_cases

        collect(rows, packed_cases.packed_rows, "packed_decode")
    groups = {
        "indexer_score": indexer_cases.indexer_rows,
        "select": cases.select_rows,
        "host_gather": cases.gather_rows,
        "block_scores": cases.block_score_rows,
    }
    for op, make in groups.items():
        if op in good:
            collect(rows, make, op)
    if "indexer_score" in good and sweep:
        collect(rows, indexer_cases.sweep_rows, "indexer_score sweep")
    return rows


def has_flashinfer(rows: list[dict[str, Any]]) -> bool:
    """Return whether flashinfer is installed; add a row that says so where it is not."""
    try:
        import flashinfer  # noqa: F401
    except ImportError as error:
        rows.append({"op": "flashinfer", "case": "", "status": "not measured", "reason": _first_line(error)})
        return False
    return True


def judge(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to each row its share of the copy bandwidth and whether it meets its target; return the comparisons."""
    copy = max((r["gb_per_s"] for r in rows if r["op"] == "copy" and "gb_per_s" in r), default=None)
    for r in rows:
        if "time_s" not in r:
            continue
        if copy is not None and r["op"] not in ("host_gather", "select"):
            r["share_of_copy"] = r["gb_per_s"] / copy
        if r.get("target_share") is not None:
            r["target_met"] = r.get("share_of_copy", 0.0) >= r["target_share"]
        if r.get("target_gb_per_s") is not None:
            r["target_met"] = r["gb_per_s"] >= r["target_gb_per_s"]
    comparisons = []
    ours = {r["case"]: r["time_s"] for r in rows if r["op"] in ("paged_decode", "uneven_decode") and "time_s" in r}
    sdpa = [r["time_s"] for r in rows if r["op"] == "torch sdpa" and "time_s" in r]
    if sdpa and "1 x 128K" in ours:
        comparisons.append(_comparison("torch sdpa, the faster way", "1 x 128K", min(sdpa), ours, SDPA_TARGET))
    for r in rows:
        if r["op"] in ("flashinfer", "flashinfer uneven") and r["case"] in ours and "time_s" in r:
            comparisons.append(_comparison("flashinfer", r["case"], r["time_s"], ours, FLASHINFER_TARGET))
    for r in rows:
        if r.get("target_over_bf16") is not None:
            ratio, target = r["speed_over_bf16"], r["target_over_bf16"]
            comparisons.append(
                {
                    "peer": "paged_decode in bf16",
                    "case": r["case"],
                    "speed_over_peer": ratio,
                    "target": target,
                    "target_met": ratio >= target,
                }
            )
    return comparisons


def _comparison(peer: str, case: str, peer_s: float, ours: dict[str, float], target: float) -> dict[str, Any]:
    ratio = peer_s / ours[case]
    return {"peer": peer, "case": case, "speed_over_peer": ratio, "target": target, "target_met": ratio >= target}


def _line(r: dict[str, Any]) -> str:
    if "time_s" not in r:
        return f"{r['op']:<20} {r['case']:<58} {r['status']}: {r['reason']}"
    share = f"{100 * r['share_of_copy']:5.1f} % of copy" if "share_of_copy" in r else ""
    met = {True: "met", False: "MISSED"}.get(r.get("target_met"), "")  # type: ignore[call-overload]
    over = f"{r['speed_over_bf16']:.2f} x bf16" if "speed_over_bf16" in r else ""
    return f"{r['op']:<20} {r['case']:<58} {1e6 * r['time_s']:9.1f} us {r['gb_per_s']:8.1f} GB/s {share} {over} {met}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def main() -> int:
    """Run, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=OPS, help="one kernel (repeatable); default: all")
    parser.add_argument("--sweep", action="store_true", help="also the constants of paged decode and of the indexer")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.json", help="where the result goes")
    arguments = parser.parse_args()
    reasons = unsupported_machine("cuda" if torch.cuda.is_available() else "cpu")
    if reasons:
        print(f"The kernels cannot be measured here: {'; '.join(reasons)}.", file=sys.stderr)
        return 3
    started_s = time.monotonic()
    ops = arguments.only or list(OPS)
    checks = run_checks(ops)
    rows = measure(ops, checks, sweep=arguments.sweep)
    comparisons = judge(rows)
    result = {
        "benchmark": "kernels",
        "environment": capture_environment(device="cuda:0"),
        "took_s": round(time.monotonic() - started_s, 1),
        "checks": checks,
        "comparisons": comparisons,
        "rows": rows,
    }
    save_result(arguments.out, result)
    print()
    for r in rows:
        print(_line(r))
    for c in comparisons:
        met = "met" if c["target_met"] else "MISSED"
        print(f"speed over {c['peer']}, {c['case']}: {c['speed_over_peer']:.3f} (target {c['target']}) {met}")
    print("checks: " + ", ".join(f"{name} {check['status']}" for name, check in checks.items()))
    print(f"{result['took_s']} s, written to {arguments.out}")
    failed = any(check["status"] != "ok" for check in checks.values())
    missed = any(r.get("status") == "failed" or r.get("target_met") is False for r in [*rows, *comparisons])
    return 1 if failed or missed else 0


if __name__ == "__main__":
    sys.exit(main())
