"""The ``kvscope backbone`` commands: the reference model, which every other command can run on. Everything heavy is
imported inside them.
"""

from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from kvscope.errors import UsageError
from kvscope.files import whole_file
from kvscope.harness.passes.options import lengths_of
from kvscope.paths import check_out_file
from kvscope.terminal import say, tell

app = typer.Typer(
    name="backbone",
    help="The reference model: train it, evaluate it with the stock generate, and check what its answers rest on.",
    no_args_is_help=True,
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a checkpoint.")]
Rows = Annotated[Path, typer.Option("--out", "-o", metavar="JSON", help="File of rows to write.")]
Samples = Annotated[int, typer.Option("--samples", "-n", min=1, help="Prompts per task and length.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the prompts, or of weights and batches.")]
Workers = Annotated[int, typer.Option("--workers", min=0, help="Processes that make the data; 0 for none.")]


def print_row(row: dict[str, Any]) -> None:
    """Print a row of results as one line of JSON."""
    say(dumps(row))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON."""
    with whole_file(path) as temporary:
        temporary.write_text(dumps(rows, indent=1) + "\n", encoding="utf-8")


@app.command(short_help="Train the reference model, phase after phase.")
def train(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the checkpoint.")],
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="Checkpoint folder to start from.")
    ] = None,
    architecture: Annotated[
        str, typer.Option("--architecture", metavar="NAME", help="afmoe (the reference model) or deepseek_v4.")
    ] = "afmoe",
    optimizer: Annotated[
        str | None,
        typer.Option("--optimizer", metavar="NAME", help="muon or adamw.  [default: the architecture's]"),
    ] = None,
    phases: Annotated[
        str | None,
        typer.Option(
            "--phases",
            metavar="NAME,NAME",
            help="Phases, comma-separated; left: what --resume has not ended.  [default: all]",
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option("--steps", metavar="N,N", help="Steps of these phases, comma-separated (to repeat a logged run)."),
    ] = None,
    seconds: Annotated[
        str | None,
        typer.Option("--seconds", metavar="S,S", help="Time budgets of these phases instead, comma-separated."),
    ] = None,
    seed: Seed = 0,
    workers: Workers = 0,
    max_seconds: Annotated[
        float | None, typer.Option("--max-seconds", help="Stop at this age of the run, with a checkpoint.")
    ] = None,
    replicas: Annotated[
        int, typer.Option("--replicas", min=1, help="Batches a step, spread over torchrun's processes.")
    ] = 1,
) -> None:
    """Train in phases of growing length; after each a checkpoint that the next run can start from.

    On several GPUs: torchrun --nproc-per-node=2 --no-python kvscope backbone train ...
    """
    from kvscope.harness.reference_model.phases import check_age, phases_left, phases_of, seconds_of
    from kvscope.harness.reference_model.train import backbone_of, read_state
    from kvscope.harness.reference_model.train import train as run_train

    backbone = backbone_of(architecture)
    check_age(max_seconds)
    if steps is not None and seconds is not None:
        raise UsageError("--steps and --seconds both say how long a phase lasts: give one of them.")
    if optimizer is not None:
        if optimizer not in ("muon", "adamw"):
            raise UsageError(f"--optimizer {optimizer!r}: muon or adamw.")
        backbone.optimizer = optimizer
    history = [] if resume is None else read_state(resume)["phases"]
    if phases == "left":
        if resume is None or steps is not None:
            raise UsageError("--phases left goes on with the run of --resume DIR: give that folder, and no --steps.")
        chosen = phases_left(backbone.phases, history)
    else:
        chosen = phases_of(phases, steps, backbone.phases, history)
    run_train(
        out=out, phases=chosen, resume=resume, seconds=seconds_of(seconds, chosen), seed=seed, workers=workers,
        max_seconds=max_seconds, replicas=replicas, backbone=backbone, validation=True,
    )  # fmt: skip


@app.command(short_help="Dense accuracy of a checkpoint, with the stock generate.")
def evaluate(
    folder: Folder,
    out: Rows,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", "-t", metavar="NAME", help="Task; repeatable.  [default: the five tasks of needles]"),
    ] = None,
    length: Annotated[
        list[str] | None,
        typer.Option(
            "--length", "-l", metavar="TOKENS", help="Prompt + answer, as 4k; repeatable.  [default: 1k 4k 16k 32k]"
        ),
    ] = None,
    samples: Samples = 200,
    seed: Seed = 0,
    workers: Workers = 0,
    batch_tokens: Annotated[
        int, typer.Option("--batch-tokens", min=1, help="Prompt tokens a batch; less where memory is short.")
    ] = 524_288,
    closed_book: Annotated[
        bool, typer.Option("--closed-book", help="Keep the question and drop the haystack.")
    ] = False,
    max_seconds: Annotated[float | None, typer.Option("--max-seconds", help="Begin no cell past this age.")] = None,
) -> None:
    """Score a checkpoint through the text interface, without kvscope's own engine, and write the rows as JSON."""
    lengths_tokens = lengths_of(length or ["1k", "4k", "16k", "32k"])
    check_out_file(out)
    from kvscope.harness.reference_model.evaluate import NIAH, load_checkpoint
    from kvscope.harness.reference_model.evaluate import evaluate as run_evaluate
    from kvscope.harness.reference_model.phases import check_age

    check_age(max_seconds)
    rows = run_evaluate(
        *load_checkpoint(folder), tasks=task or NIAH, lengths_tokens=lengths_tokens, samples=samples, seed=seed,
        workers=workers, closed_book=closed_book, batch_tokens=batch_tokens, max_seconds=max_seconds, note=print_row,
    )  # fmt: skip
    write_rows(out, rows)


@app.command(short_help="Closed book near chance, evidence alone nearly perfect.")
def controls(
    folder: Folder,
    out: Rows,
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", metavar="NAME", help="Task; repeatable.  [default: long_qa]")
    ] = None,
    length: Annotated[
        list[str] | None,
        typer.Option("--length", "-l", metavar="TOKENS", help="Prompt + answer, as 4k; repeatable.  [default: 4k 16k]"),
    ] = None,
    samples: Samples = 450,
    seed: Seed = 0,
    workers: Workers = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts a batch.")] = 64,
) -> int:
    """Answer evaluation's prompts without the haystack, then with the evidence alone. Exit 1 when a control fails."""
    lengths_tokens = lengths_of(length or ["4k", "16k"])
    check_out_file(out)
    from kvscope.harness.passes.pooling import excluded_types
    from kvscope.harness.reference_model.controls import run_controls
    from kvscope.harness.reference_model.evaluate import load_checkpoint

    rows = run_controls(
        *load_checkpoint(folder), tasks=task or ["long_qa"], lengths_tokens=lengths_tokens, samples=samples, seed=seed,
        workers=workers, batch=batch, note=print_row,
        left_out=frozenset((each.task, each.question_type) for each in excluded_types(str(folder))),
    )  # fmt: skip
    write_rows(out, rows)
    failed = [row for row in rows if not row.get("passed", True)]
    for row in failed:
        tell(f"{row['control']} of {row['task']} at {row['length_tokens']}: {row['accuracy_percent']} % fails")
    return 1 if failed else 0


@app.command("exclude-types", short_help="List the question types that the dense model cannot do.")
def exclude_types(
    rows: Annotated[Path, typer.Argument(metavar="JSON", help="Rows of kvscope backbone evaluate.")],
    model: Annotated[Path, typer.Option("--model", metavar="DIR", help="Model folder that gets the list.")],
) -> None:
    """Write the list of question types that pooled scores leave out into a model's folder."""
    from kvscope.harness.passes.pooling import EXCLUDED_FILE, exclusion_list, read_rows

    if not (model / "config.json").is_file():
        raise UsageError(f"{model} is no model folder: it has no config.json.")
    made = exclusion_list(read_rows(rows))
    with whole_file(model / EXCLUDED_FILE) as temporary:
        temporary.write_text(made.model_dump_json(indent=1) + "\n", encoding="utf-8")
    for each in made.excluded:
        say(each.sentence)
    say(f"{len(made.excluded)} question types excluded; {model / EXCLUDED_FILE}")
