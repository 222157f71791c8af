"""The ``kvscope study`` commands: parse, call, print. Everything heavy is imported inside them."""

from pathlib import Path
from typing import Annotated

import typer

from kvscope.errors import UsageError
from kvscope.harness.passes.options import Device, Dtype, lengths_of
from kvscope.paths import check_out_file
from kvscope.terminal import say, tell

app = typer.Typer(
    name="study",
    help="Studies of attention that explain results; no part of a run.",
    no_args_is_help=True,
)

Model = Annotated[str, typer.Option("--model", help="reference, a folder, or a Hugging Face id.")]
Tasks = Annotated[list[str], typer.Option("--task", "-t", metavar="SPEC", help="Task; repeatable.")]
Lengths = Annotated[
    list[str], typer.Option("--length", "-l", metavar="TOKENS", help="Prompt + answer, as 4096 or 4k; repeatable.")
]
Samples = Annotated[int, typer.Option("--samples", "-n", min=1, help="Prompts per task and length.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the prompts.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="CSV", help="File to write; it must not exist.")]


def refuse_existing(path: Path) -> None:
    """Refuse to write over a file, or where none can be written.

    Raises:
        UsageError: it is there, or its place cannot be written.
    """
    if path.exists():
        raise UsageError(f"{path} exists already: remove it, or name another file with --out.")
    check_out_file(path)


@app.command("attention-mass", short_help="How much attention reaches the evidence, by layer and head.")
def attention_mass(
    task: Tasks,
    length: Lengths,
    out: Out,
    model: Model = "reference",
    samples: Samples = 10,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Sum every head's attention on the evidence, from the question to the answer's first step; one CSV row a head.

    Kvscope study attention-figure draws it.
    """
    lengths_tokens = lengths_of(length)
    refuse_existing(out)
    from kvscope.harness.studies.attention_mass import measure_to_csv

    measure_to_csv(
        out, model=model, tasks=task, lengths_tokens=lengths_tokens, samples=samples, seed=seed, device=device,
        dtype=dtype, note=tell,
    )  # fmt: skip


@app.command("noise-floor", short_help="How far one method's answers move between two runs.")
def noise_floor(
    first: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run over the same prompts.")],
    method: Annotated[
        str, typer.Option("--method", "-m", metavar="LABEL", help="Its label, as rows have it.")
    ] = "dense",
) -> None:
    """Compare a method with itself in two runs over the same prompts, say in another precision, batch or on a GPU.

    What moves there moves with nothing to be compared: a difference between methods has to stand out from it.
    """
    from kvscope.harness.studies.noise_floor import noise_floor_text

    say(noise_floor_text(first, second, method=method))


@app.command("block-ranks", short_help="Where a needle's block ranks under a block-sparse method's own score.")
def block_ranks(
    method: Annotated[
        list[str], typer.Option("--method", "-m", metavar="SPEC", help="quest, moba, msa or dsa; repeatable.")
    ],
    task: Tasks,
    length: Lengths,
    out: Out,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="METHOD.OPTION=VALUES", help="As kvscope run --sweep; repeatable."),
    ] = None,
    model: Model = "reference",
    samples: Samples = 5,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Look up, in every layer, whether a method reads the block of the answer; one CSV row a layer, and a summary."""
    lengths_tokens = lengths_of(length)
    refuse_existing(out)
    from kvscope.harness.studies.block_ranks import measure_to_csv, summary_text

    rows = measure_to_csv(
        out, methods=method, sweeps=sweep or [], model=model, tasks=task, lengths_tokens=lengths_tokens,
        samples=samples, seed=seed, device=device, dtype=dtype, note=tell,
    )  # fmt: skip
    say(summary_text(rows))
