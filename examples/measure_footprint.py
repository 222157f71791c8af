"""Measure one method's memory and time at one length, in a fresh process as `kvscope run` does.

    python examples/measure_footprint.py --method lsa --length 1k --out runs/footprint

On a GPU the row has NVML's bytes and a verdict. On a CPU it has the ledger's bytes and says why NVML is missing.
"""

import argparse

import kvscope

MIB = 1024**2


def main() -> None:
    """Measure one footprint cell, after one answer of a single token, and print its row in words."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="recency", help="a method, as name or name:key=value")
    parser.add_argument("--model", default="reference", help="reference, a folder, an id or preset:NAME")
    parser.add_argument("--length", default="1k", help="tokens of prompt and answer")
    parser.add_argument("--out", default="runs/footprint", help="folder of the run; the same again resumes")
    options = parser.parse_args()
    config = {
        "model": options.model,
        "methods": [options.method],
        "lengths_tokens": [options.length],
        "footprint_decode_tokens": 4,
        "out": options.out,
    }
    if not options.model.startswith("preset:"):  # a preset has random weights and answers nothing
        config |= {"tasks": ["niah_single_1"], "samples": 1, "max_new_tokens": 1}
    run = kvscope.run(config, progress=False)
    row = run.footprint.iloc[0]
    if row.status != "ok":
        raise SystemExit(f"{row.method_label}: {row.status}, {row.reason}")
    held_bytes = row.resident_kv_bytes + row.metadata_bytes
    print(f"{row.method_label}: {held_bytes / MIB:.2f} MiB by the ledger, {row.dense_kv_bytes / MIB:.2f} MiB for dense")
    print(f"time per output token: {1000 * row.tpot_s:.1f} ms")
    print(f"verdict: {row.verdict}" + (f" ({row.nvml_reason})" if row.verdict == "not_measured" else ""))


if __name__ == "__main__":
    main()
