"""The ``kvscope lsa`` commands: parse, call, print. Everything heavy is imported inside them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kvscope.errors import UsageError
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
    parse_layers,
    silence,
    with_labels,
)
from kvscope.harness.passes.options import Device, Dtype, lengths_of
from kvscope.terminal import say, tell

app = typer.Typer(
    name="lsa",
    help="The Neural Memory Indexer: collect training data once, train without the model, evaluate, calibrate.",
    no_args_is_help=True,
)

Layers = Annotated[
    str | None, typer.Option("--layers", metavar="N,N", help="Layers, comma-separated.  [default: all there are]")
]
ChatTemplate = Annotated[
    str,
    typer.Option("--chat-template", metavar="auto|none|FILE", help="Prompts as a user's turn, as in kvscope run."),
]
Tau = Annotated[int, typer.Option("--tau", help="Decode steps between refreshes: how far labels look ahead.")]


@app.command(short_help="Collect, train, calibrate and evaluate within a time: an indexer for a model.")
def fit(
    model: Annotated[str, typer.Argument(help="reference, a folder, a GGUF file or a Hugging Face id.")],
    out: IndexerOut,
    minutes: Annotated[float, typer.Option("--minutes", help="Time for all of it, earlier calls included.")] = 10.0,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            "-t",
            metavar="SPEC",
            help="Task; repeatable.  [default: niah_single_1, niah_multikey_2, vt, long_qa]",
        ),
    ] = None,
    length: Annotated[
        list[str] | None,
        typer.Option(
            "--length",
            "-l",
            metavar="TOKENS",
            help="Length; repeatable.  [default: two, as long as the model and the time allow]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the documents; keep it off evaluation's.")] = 1000,
    tau: Tau = 4,
    chunk_tokens: Annotated[int, typer.Option("--chunk-tokens", help="Tokens of a chunk.")] = 16,
    target_recall: Annotated[
        float, typer.Option("--target-recall", help="Golden recall that threshold 0.5 is set to.")
    ] = 0.98,
    chat_template: ChatTemplate = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Make an indexer for a model: documents, training, threshold and evaluation, with a card beside it.

    No document serves two ends. The same command again continues.
    """
    from kvscope.harness.indexers.lsa.fit import fit as run_fit
    from kvscope.harness.indexers.lsa.fit_config import FitConfig

    config = FitConfig(
        model=model, minutes=minutes, tasks=tuple(task) if task else None,
        lengths_tokens=lengths_of(length) if length else None, seed=seed, tau=tau, chunk_tokens=chunk_tokens,
        target_recall=target_recall, chat_template=chat_template, device=device, dtype=dtype,
    )  # fmt: skip
    card = run_fit(config, out, note=silence if quiet else tell)
    say(card.summary_text())
    say(f"\nindexer  {out}\ncard     {out / 'README.md'}\nuse      -m lsa:indexer={out}")


@app.command(short_help="Run the model once over documents and store what an indexer learns from.")
def collect(
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder; the same again resumes.")],
    task: Annotated[list[str], typer.Option("--task", "-t", metavar="SPEC", help="Task; repeatable.")],
    length: Annotated[list[str], typer.Option("--length", "-l", metavar="TOKENS", help="Length; repeatable.")],
    model: Annotated[str, typer.Option("--model", help="reference, a folder, or a Hugging Face id.")] = "reference",
    samples: Annotated[int, typer.Option("--samples", "-n", help="Documents per task and length.")] = 100,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the documents; keep it off evaluation's.")] = 1000,
    chunk_tokens: Annotated[
        int | None, typer.Option("--chunk-tokens", help="Tokens of a chunk.  [default: 16, or an entry's]")
    ] = None,
    layers: Layers = None,
    features: Annotated[
        str, typer.Option("--features", help="tokens (every key) or stats (mean, maximum, minimum a chunk).")
    ] = "tokens",
    top_p: Annotated[float, typer.Option("--top-p", help="Share of attention a voter's chunks hold.")] = 0.9,
    votes: Annotated[int, typer.Option("--votes", help="Votes that make a chunk positive.")] = 1,
    voters: Annotated[
        str, typer.Option("--voters", help="layer (head-summed), head, or index (the native one).")
    ] = "layer",
    least_mass: Annotated[float, typer.Option("--least-mass", help="Least attention a vote needs.")] = 0.2,
    states: Annotated[int, typer.Option("--states", help="Hidden states kept before step 0.")] = 16,
    shard_documents: Annotated[int, typer.Option("--shard-documents", help="Documents a shard.")] = 16,
    token_samples: Annotated[
        int, typer.Option("--token-samples", help="Random tokens a prompt to store for kvscope dsa train, as 2048.")
    ] = 0,
    answers: Annotated[
        str, typer.Option("--answers", help="own (the model's, greedily decoded) or reference (the task's).")
    ] = "own",
    chat_template: ChatTemplate = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> None:
    """Prefill every document once, feed its answer, and write hidden states, chunk keys and labels as shards."""
    from kvscope.harness.indexers.collection.collect import CollectConfig
    from kvscope.harness.indexers.collection.collect import collect as run_collect
    from kvscope.harness.passes.progress import make_progress

    config = CollectConfig(
        model=model, tasks=tuple(task), lengths_tokens=lengths_of(length),
        samples=samples, seed=seed, chunk_tokens=chunk_tokens, layers=parse_layers(layers),
        features=features, top_p=top_p, votes=votes, voters=voters,  # type: ignore[arg-type]
        least_mass=least_mass, state_tokens=states, shard_documents=shard_documents,
        token_samples=token_samples, answers=answers,  # type: ignore[arg-type]
        chat_template=chat_template, device=device, dtype=dtype,
    )  # fmt: skip
    with make_progress(not quiet) as progress:
        folder = run_collect(config, out, progress=progress)
    say(f"collection  {folder}")


@app.command(short_help="Train an indexer from shards; the model is never loaded.")
@with_labels
def train(
    *,
    data: DataFolders,
    out: IndexerOut,
    tau: Tau = 4,
    chunk_tokens: Annotated[
        int | None, typer.Option("--chunk-tokens", help="A multiple of the collections'.  [default: theirs]")
    ] = None,
    layers: Layers = None,
    epochs: Epochs = 4,
    lr: LearningRate = 1e-3,
    weight_decay: WeightDecay = 0.01,
    gamma: Annotated[float, typer.Option("--gamma", help="Of the focal loss.")] = 2.0,
    negatives: Annotated[int, typer.Option("--negatives", help="Random negatives a positive.")] = 8,
    batch_documents: BatchDocuments = 4,
    batch_rows: BatchRows = 32,
    heads: Annotated[int | None, typer.Option("--heads", help="Indexer heads.  [default: the model's]")] = None,
    key_dim: Annotated[int | None, typer.Option("--key-dim", help="Key size.  [default: at most 128]")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Query rank.  [default: half the width]")] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="mean, stats or pooled.  [default: by the collection]")
    ] = None,
    encoder_width: Annotated[int, typer.Option("--encoder-width", help="Hidden width of the encoder.")] = 64,
    lookback: Annotated[int, typer.Option("--lookback", help="Last hidden states scored at a refresh.")] = 16,
    revive: Annotated[
        float, typer.Option("--revive", help="Gradient of products below zero, where that raises them. 0: none.")
    ] = 0.1,
    segment_tokens: Annotated[
        int | None,
        typer.Option("--segment-tokens", help="Tokens that share a key, part of a chunk.  [default: all of it]"),
    ] = None,
    neighbours: Annotated[
        int | None,
        typer.Option(
            "--neighbours", help="Segments on either side that one lends its score to.  [default: those of --start, 8]"
        ),
    ] = None,
    start: Annotated[
        str | None, typer.Option("--start", metavar="INDEXER", help="Train this one further; same sizes and layers.")
    ] = None,
    warm_start: WarmStart = True,
    labels: dict[str, Any],
    held_out: HeldOut = 0.1,
    keep: Annotated[
        str,
        typer.Option("--keep", help="Epoch kept: loss (lowest held-out) or recall (best tenth at refreshes, highest)."),
    ] = "recall",
    patience: Patience = 2,
    target_recall: Annotated[
        float | None, typer.Option("--target-recall", help="Set threshold 0.5 to this held-out golden recall.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of weights, order and negatives.")] = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Fit the dual encoder with focal loss; held-out recall and precision every epoch, the best (--keep) stays."""
    from kvscope.harness.indexers.lsa.train import train as run_train
    from kvscope.harness.indexers.lsa.train_config import TrainConfig

    config = TrainConfig(
        tau=tau, chunk_tokens=chunk_tokens, layers=parse_layers(layers), epochs=epochs, lr=lr,
        weight_decay=weight_decay, gamma=gamma, negatives=negatives, start=start, warm_start=warm_start,
        batch_documents=batch_documents, batch_rows=batch_rows, heads=heads, key_dim=key_dim, rank=rank,
        encoder=encoder, encoder_width=encoder_width, lookback=lookback, revive=revive,  # type: ignore[arg-type]
        segment_tokens=segment_tokens, neighbours=neighbours, keep=keep,  # type: ignore[arg-type]
        held_out=held_out, patience=patience, target_recall=target_recall, seed=seed, device=device, **labels,
    )  # fmt: skip
    best = run_train([str(folder) for folder in data], out, config, note=silence if quiet else tell)
    say(f"indexer  {out}  ({measures_text(best)})")


def measures_text(best: dict[str, Any]) -> str:
    """Return the held-out measures in one phrase."""
    names = ("epoch", "recall", "refresh_recall", "precision", "kept_fraction", "recall_at_tenth",
             "refresh_recall_at_tenth")  # fmt: skip
    return ", ".join(f"{name} {best[name]}" for name in names if best.get(name) is not None)


@app.command("eval", short_help="Golden recall against the fraction kept; or the label gate.")
@with_labels
def evaluate(
    *,
    data: DataFolders,
    indexer: Annotated[str | None, typer.Option("--indexer", help="Folder or shipped name.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder of tables and figure.")] = None,
    gate: Annotated[bool, typer.Option("--gate", help="Decode restricted to the labels instead.")] = False,
    model: Annotated[str | None, typer.Option("--model", help="For --gate.  [default: the collection's]")] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", "-n", help="For --gate: prompts per task and length.  [default: all]")
    ] = None,
    chunk_tokens: Annotated[
        int | None,
        typer.Option("--chunk-tokens", help="For --gate: a multiple of the collection's.  [default: its own]"),
    ] = None,
    tau: Annotated[
        int | None, typer.Option("--tau", help="Decode steps between refreshes.  [default: the indexer's, 4]")
    ] = None,
    labels: dict[str, Any],
    seed: RandomSeed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quiet: Quiet = False,
) -> int:
    """Measure an indexer on shards, beside recency, random and the attention oracle. Exit 1 when the gate fails."""
    note = silence if quiet else tell
    folders = [str(folder) for folder in data]
    if gate:
        from tabulate import tabulate

        from kvscope.harness.indexers.collection.label_choice import LabelChoice
        from kvscope.harness.indexers.lsa.gate import LEAST_SHARE
        from kvscope.harness.indexers.lsa.gate import gate as run_gate
        from kvscope.harness.indexers.lsa.label_share import MOST_KEPT
        from kvscope.harness.indexers.lsa.train_config import DEFAULT_TAU

        result = run_gate(
            folders, model=model, tau=tau or DEFAULT_TAU, choice=LabelChoice(**labels), samples=samples,
            chunk_tokens=chunk_tokens, device=device, dtype=dtype, note=note,
        )  # fmt: skip
        say(tabulate(result.rows, headers="keys", tablefmt="simple"))
        asked = f"dense must keep {LEAST_SHARE:.0%} of its score by at most {MOST_KEPT:.0%} of the prompts"
        say(f"gate passed: {asked}" if result.passed else f"gate failed: {'; and '.join(result.failures)}")
        return 0 if result.passed else 1
    if indexer is None or out is None:
        raise UsageError("lsa eval needs --indexer and --out (or --gate).")
    if chunk_tokens is not None:
        raise UsageError("--chunk-tokens belongs to --gate: an indexer brings its own chunk size; leave it out.")
    from kvscope.harness.indexers.lsa.evaluate import evaluate as run_evaluate
    from kvscope.harness.indexers.lsa.measuring import EvalConfig
    from kvscope.harness.indexers.lsa.recall_tables import summary_text

    config = EvalConfig(tau=tau, seed=seed, **labels)
    rows = run_evaluate(folders, indexer, out, config, device=device, note=note)
    say(summary_text(rows))
    say(f"\ntables and figure  {out}")
    return 0


@app.command(short_help="Set what threshold 0.5 keeps, for the same or larger chunks; nothing is trained.")
@with_labels
def calibrate(
    *,
    data: DataFolders,
    indexer: Annotated[str, typer.Option("--indexer", metavar="IN", help="Folder or shipped name.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the indexer to write.")],
    chunk_tokens: Annotated[
        int | None, typer.Option("--chunk-tokens", help="A multiple of the tokens a key.  [default: the indexer's]")
    ] = None,
    threshold: Annotated[float | None, typer.Option("--threshold", help="What is this becomes 0.5.")] = None,
    target_recall: Annotated[
        float | None,
        typer.Option(
            "--target-recall", help="Least golden recall at refreshes.  [default: 0.98, unless another is given]"
        ),
    ] = None,
    target_kept: Annotated[
        float | None, typer.Option("--target-kept", help="Largest mean share of the prompt's bytes at refreshes.")
    ] = None,
    cap_tokens: Annotated[
        int | None,
        typer.Option("--cap-tokens", help="Most tokens of a prompt that stay, stored along.  [default: the indexer's]"),
    ] = None,
    cap_fraction: Annotated[
        float | None,
        typer.Option(
            "--cap-fraction", help="The cap as a fraction, where that is more, stored along.  [default: the indexer's]"
        ),
    ] = None,
    least_tokens: Annotated[
        int | None,
        typer.Option("--least-tokens", help="Least tokens that stay, filled up by score.  [default: the indexer's]"),
    ] = None,
    least_fraction: Annotated[
        float | None,
        typer.Option("--least-fraction", help="The same as a fraction, where that is more.  [default: the indexer's]"),
    ] = None,
    weight_dtype: Annotated[
        str, typer.Option("--dtype", help="Of the stored weights: float32 or bfloat16 (biases stay float32).")
    ] = "float32",
    tau: Annotated[
        int | None, typer.Option("--tau", help="Decode steps between refreshes.  [default: the indexer's]")
    ] = None,
    labels: dict[str, Any],
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Shift the bias of a trained indexer so that threshold 0.5 keeps what is asked for, on documents new to it.

    Give one of --threshold, --target-recall and --target-kept, or none for a recall of 0.98. A chunk of several keys
    has the score of its best one.
    """
    from kvscope.harness.indexers.lsa.calibrate import CalibrateConfig, summary_text
    from kvscope.harness.indexers.lsa.calibrate import calibrate as run_calibrate
    from kvscope.harness.indexers.lsa.measuring import EvalConfig

    config = CalibrateConfig(
        chunk_tokens=chunk_tokens, threshold=threshold, target_recall=target_recall, target_kept=target_kept,
        cap_tokens=cap_tokens, cap_fraction=cap_fraction, least_tokens=least_tokens, least_fraction=least_fraction,
        dtype=weight_dtype, measure=EvalConfig(tau=tau, **labels),  # type: ignore[arg-type]
    )  # fmt: skip
    found = run_calibrate([str(folder) for folder in data], indexer, out, config, device=device,
                          note=silence if quiet else tell)  # fmt: skip
    say(summary_text(found))
    say(f"\nindexer  {out}")
