"""Compare two methods on the same prompts: accuracy, bytes held, and the paired difference.

    python examples/compare_methods.py --out runs/compare

A CPU is enough: the reference model comes with kvscope.
"""

import argparse

import kvscope
from kvscope.results.comparisons import compare_methods


def main() -> None:
    """Run dense and recency on two prompts of 1K tokens, and print what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/compare", help="folder of the run; the same again resumes")
    parser.add_argument("--samples", type=int, default=2, help="prompts")
    options = parser.parse_args()
    run = kvscope.run(
        {
            "model": "reference",
            "methods": ["dense", "recency"],
            "tasks": ["niah_single_1"],
            "lengths_tokens": ["1k"],
            "samples": options.samples,
            "max_new_tokens": 16,
            "footprint": False,
            "out": options.out,
        },
        progress=False,
    )
    held_bytes = run.samples.resident_kv_bytes + run.samples.metadata_bytes
    shares = (held_bytes / run.samples.dense_kv_bytes).groupby(run.samples.method_label).mean()
    for label, score in run.samples.groupby("method_label").score.mean().items():
        print(f"{label}: {100 * score:.0f} % right, {100 * shares[label]:.0f} % of dense's bytes")
    for comparison in compare_methods(run.samples, info=run.info):
        points = 100 * (comparison.method_mean - comparison.baseline_mean)
        pair = f"{comparison.method_label} against {comparison.baseline_label}"
        print(f"{pair}: {points:+.0f} points, {comparison.sentence}")


if __name__ == "__main__":
    main()
