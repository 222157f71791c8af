"""The ``kvscope dsa`` commands: parse, call, print. Everything heavy is imported inside them."""

from pathlib import Path
from typing import Annotated

import typer

from kvscope.harness.indexers.options import (
    BatchDocuments,
    BatchRows,
    DataFolders,
    Epochs,
    HeldOut,
    IndexerOut,
    LearningRate,
    Patience,
    Quiet,
    RandomSeed,
    WarmStart,
    WeightDecay,
    silence,
)
from kvscope.harness.passes.options import Device
from kvscope.terminal import say, tell

app = typer.Typer(
    name="dsa",
    help="The lightning indexer of dsa: train it without the model on what kvscope lsa collect --token-samples stored, "
    "and judge it.",
    no_args_is_help=True,
)


@app.command(short_help="Train a lightning indexer from shards; the model is never loaded.")
def train(
    data: DataFolders,
    out: IndexerOut,
    epochs: Epochs = 10,
    lr: LearningRate = 3e-4,
    weight_decay: WeightDecay = 0.01,
    batch_documents: BatchDocuments = 4,
    batch_rows: BatchRows = 32,
    heads: Annotated[
        int | None, typer.Option("--heads", help="Index heads.  [default: the model's, at most 64]")
    ] = None,
    key_dim: Annotated[
        int | None, typer.Option("--key-dim", help="Index key size.  [default: half a head, at most 128]")
    ] = None,
    warm_start: WarmStart = True,
    held_out: HeldOut = 0.1,
    patience: Patience = 3,
    seed: Annotated[int, typer.Option("--seed", help="Of weights and order.")] = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Fit one small indexer a layer to the attention summed over heads (KL); the best epoch on held-out is kept."""
    from kvscope.harness.indexers.dsa.objective import DsaTrainConfig
    from kvscope.harness.indexers.dsa.train import measures_text
    from kvscope.harness.indexers.dsa.train import train as run_train

    config = DsaTrainConfig(
        epochs=epochs, lr=lr, weight_decay=weight_decay, batch_documents=batch_documents, batch_rows=batch_rows,
        heads=heads, key_dim=key_dim, warm_start=warm_start, held_out=held_out, patience=patience, seed=seed,
        device=device,
    )  # fmt: skip
    best = run_train([str(folder) for folder in data], out, config, note=silence if quiet else tell)
    say(f"indexer  {out}  (epoch {best['epoch']}, held-out {measures_text(best)})")


@app.command("eval", short_help="Share of the attention that the chosen tokens hold, by length and budget.")
def evaluate(
    data: DataFolders,
    indexer: Annotated[str, typer.Option("--indexer", help="Folder or shipped name.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the tables.")],
    seed: RandomSeed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Measure an indexer on shards, beside the attention oracle, the last tokens and random ones."""
    from kvscope.harness.indexers.dsa.evaluate import evaluate as run_evaluate
    from kvscope.harness.indexers.dsa.evaluate import summary_text

    rows = run_evaluate(
        [str(folder) for folder in data], indexer, out, seed=seed, device=device, note=silence if quiet else tell
    )
    say(summary_text(rows))
    say(f"\ntables  {out}")
