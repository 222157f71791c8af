"""The decode step of DeepSeek-V4-Flash's geometry on a GPU: dense against lsa, captured and eager, against its floor.

    python benchmarks/v4_decode_step.py                    # every part; writes results/v4_decode_step.json
    python benchmarks/v4_decode_step.py --only tpot --lengths 128k,1m
    python benchmarks/v4_decode_step.py --layers 11        # for a smaller card: rows say so, and give times of 43 / 11
    python benchmarks/v4_decode_step.py --tiny             # a tiny model on the CPU: shows that the parts run, no more

Parts: ``check`` (the top-k against fp64, captured steps against eager ones), ``topk`` (the native top-k of one layer,
by the kernel and by torch), ``tpot`` against length, ``refresh`` (what one takes by itself). Weights and entries are
random, and of the 256 routed experts there are the 6 that a token goes to. A part that would begin after ``--most-s``
is left out, and said to be. Ends with 0 when every part ran and was right, 1 when one failed, 3 without a GPU.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import v4_decode_cases as cases
import v4_decode_checks as checks
from measure import RESULTS, ended, save_result, say

from kvscope.errors import UsageError
from kvscope.harness.engine.decode_graph import GRAPH
from kvscope.harness.passes.environment import capture_environment
from kvscope.methods.kernels.dispatch import unsupported_machine
from kvscope.units import parse_length

PARTS = ("check", "topk", "tpot", "refresh")


def measure(parts: list[str], scale: cases.Scale, *, most_s: float) -> tuple[list[dict[str, Any]], str]:
    """Run the parts; what one raises is a row, and the others still run. Return the rows and what attends."""
    begun_s = time.monotonic()
    loaded = cases.build(scale)
    makers: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "check": lambda: checks.check_rows(scale, loaded),
        "topk": lambda: cases.topk_rows(scale, loaded),
        "tpot": lambda: cases.tpot_rows(scale, loaded),
        "refresh": lambda: cases.refresh_rows(scale, loaded),
    }
    rows: list[dict[str, Any]] = []
    for part in parts:
        late = {"part": part, "case": "the rest", "status": "not measured", "reason": f"{most_s:.0f} s were over"}
        try:
            if time.monotonic() - begun_s > most_s:
                rows.append(late)
                continue
            for row in makers[part]():
                rows.append({"status": "ok", **row})
                say(line(rows[-1]))
                if time.monotonic() - begun_s > most_s:
                    rows.append(late)
                    break
        except Exception as error:  # noqa: BLE001 - whatever fails is the result, and the other parts still run
            reason = (str(error).strip().splitlines() or [""])[0][:300]
            rows.append({"part": part, "case": "", "status": "failed", "reason": f"{type(error).__name__}: {reason}"})
            say(line(rows[-1]))
    return rows, loaded.attention_backend


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how dense compares with lsa at each length, and captured steps with eager ones."""
    found = {(r["length_tokens"], r["case"], r["step"]): r for r in rows if r["part"] == "tpot" and r["status"] == "ok"}
    compared = []
    for length, case, step in found:
        captured, dense = found[length, case, step], found.get((length, "dense", step))
        eager = found.get((length, case, "eager"))
        if step != "graph":
            continue
        if case != "dense" and dense is not None:
            compared.append({
                "length_tokens": length, "what": f"dense over {case}", "tpot": dense["tpot_s"] / captured["tpot_s"],
                "mean_step": dense["mean_step_s"] / captured["mean_step_s"],
                "device_bytes": dense["device_bytes"] / captured["device_bytes"],
            })  # fmt: skip
        if eager is not None and captured["backend"] == GRAPH:
            ratio = eager["tpot_s"] / captured["tpot_s"]
            compared.append({"length_tokens": length, "what": f"eager over captured, {case}", "tpot": ratio})
    return compared


def line(r: dict[str, Any]) -> str:
    """Return one row of the table."""
    length = f"{r['length_tokens'] / 1024:g}K" if "length_tokens" in r else ""
    head = f"{r['part']:<9}{r['case']:<24}{length:>7} "
    if r["status"] != "ok":
        return f"{head}{r['status']}: {r['reason']}"
    if r["part"] == "check":
        off = next(r[name] for name in ("wrong", "unequal_logits", "largest_difference") if name in r)
        return f"{head}right: {off:.3g} off"
    if r["part"] == "topk":
        return f"{head}{1e6 * r['time_s']:8.1f} us, {r['times_floor']:5.1f} x the copy of {r['entries']:,} keys"
    if r["part"] == "refresh":
        return f"{head}{1e3 * r['refresh_s']:8.2f} ms for {r['recalled_bytes'] / 1e6:.1f} MB, hit rate {r['hit_rate']}"
    whole = f", {1e3 * r['tpot_s_times_layers']:.1f} ms by layers" if "tpot_s_times_layers" in r else ""
    return (
        f"{head}{r['step']:<6}{1e3 * r['tpot_s']:8.2f} ms (mean {1e3 * r['mean_step_s']:.2f}, floor "
        f"{1e3 * r['floor_s']:.2f}), {r['device_bytes'] / 2**30:6.2f} GiB, {r['backend']}{whole}"
    )


def asked() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="one part (repeatable); default: all")
    parser.add_argument("--lengths", help="prompt and steps, e.g. 128k,1m; default: 64K to 4,000K as the card holds")
    parser.add_argument("--layers", type=int, help="the first layers alone, 3 to 43; default: all 43")
    parser.add_argument("--most-s", type=float, default=300.0, help="begin nothing after this many seconds")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "v4_decode_step.json", help="where the result goes")
    return parser.parse_args()


def scale_of(arguments: argparse.Namespace) -> cases.Scale:
    """Return how large everything is to be.

    Raises:
        UsageError: a length or a number of layers that there cannot be.
    """
    scale = cases.TINY if arguments.tiny else cases.FULL
    if arguments.layers is not None:
        if arguments.tiny or not 3 <= arguments.layers <= cases.FULL.whole_layers:
            raise UsageError(
                f"--layers takes 3 to {cases.FULL.whole_layers}, and not with --tiny, got {arguments.layers}."
            )
        scale = cases.with_layers(scale, arguments.layers)
    if arguments.lengths is not None:
        lengths = tuple(parse_length(each) for each in arguments.lengths.split(","))
        least = 4 * scale.n_steps
        if min(lengths) < least:
            raise UsageError(f"--lengths takes {least} tokens and more, got {min(lengths)}.")
        scale = replace(scale, lengths_tokens=lengths)
    return scale


def command(arguments: argparse.Namespace) -> str:
    """Return what was asked for, but for the place of the result."""
    words = ["python", "benchmarks/v4_decode_step.py"]
    words += [word for part in arguments.only or () for word in ("--only", part)]
    for name in ("lengths", "layers"):
        value = getattr(arguments, name)
        words += [] if value is None else [f"--{name}", str(value)]
    return " ".join([*words, *(["--tiny"] if arguments.tiny else [])])


def main() -> int:
    """Run, write JSON, print the table last."""
    arguments = asked()
    scale = scale_of(arguments)
    if not arguments.tiny:
        reasons = unsupported_machine("cuda" if torch.cuda.is_available() else "cpu")
        if reasons:
            print(f"The decode step cannot be measured here: {'; '.join(reasons)}.", file=sys.stderr)
            return 3
    started_s = time.monotonic()
    parts = [part for part in PARTS if part in (arguments.only or PARTS)]
    rows, backend = measure(parts, scale, most_s=arguments.most_s)
    comparisons = compare(rows)
    device = "cpu" if arguments.tiny else "cuda:0"
    result = {
        "benchmark": "v4_decode_step",
        "command": command(arguments),
        "tiny": arguments.tiny,
        "geometry": cases.NAME,
        "experts": f"{scale.values['n_routed_experts']} routed experts a layer stand for all",
        "environment": capture_environment(device=device, attention_backend=backend),
        "took_s": round(time.monotonic() - started_s, 1),
        "comparisons": comparisons,
        "rows": rows,
    }
    save_result(arguments.out, result)
    print()
    for row in rows:
        print(line(row))
    for each in comparisons:
        more = "".join(f", {name} {each[name]:.2f}" for name in ("mean_step", "device_bytes") if name in each)
        print(f"{each['length_tokens'] // 1024}K, {each['what']}: TPOT {each['tpot']:.2f}{more}")
    print(f"{result['took_s']} s, written to {arguments.out}")
    return 1 if any(row["status"] == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(ended(main))
