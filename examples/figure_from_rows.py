"""Read committed rows and draw a figure: accuracy against lsa's share of bytes, by task.

    python examples/figure_from_rows.py --run results/reference/h100/lsa-vt --out lsa_share.png

A run folder gives two frames: `samples`, a row a prompt and method, and `footprint`, a row a memory measurement.
"""

import argparse

from matplotlib.figure import Figure

import kvscope


def main() -> None:
    """Average the rows of lsa by task and length, print them and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="results/reference/h100/lsa-vt", help="a run folder with rows of lsa")
    parser.add_argument("--out", default="lsa_share.png", help="the picture")
    options = parser.parse_args()
    samples = kvscope.load_run(options.run).samples
    rows = samples[samples.method == "lsa"].copy()
    rows["share"] = (rows.resident_kv_bytes + rows.metadata_bytes) / rows.dense_kv_bytes
    cells = rows.groupby(["task", "length_tokens"], as_index=False).agg(
        accuracy=("score", "mean"), share=("share", "mean"), prompts=("score", "size")
    )
    print(cells.to_string(index=False, float_format="{:.3f}".format))
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for task, group in cells.groupby("task"):
        axes.plot(100 * group.share, 100 * group.accuracy, marker="o", label=task)
    axes.set(xlabel="lsa's bytes over dense's (%)", ylabel="accuracy (%)", xlim=(0, None))
    axes.legend()
    figure.savefig(options.out, dpi=150)
    print(f"figure: {options.out}")


if __name__ == "__main__":
    main()
