"""The options that the commands of both indexers share, each written once. Nothing heavy is imported: help is quick."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kvscope.errors import UsageError
from kvscope.harness.passes.options import with_options

DataFolders = Annotated[
    list[Path], typer.Option("--data", metavar="DIR", help="Folder that lsa collect wrote; repeatable.")
]
IndexerOut = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the indexer.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress; results and paths only.")]
Epochs = Annotated[int, typer.Option("--epochs", help="Passes over the documents at most.")]
LearningRate = Annotated[float, typer.Option("--lr", help="Learning rate.")]
WeightDecay = Annotated[float, typer.Option("--weight-decay", help="AdamW's.")]
BatchDocuments = Annotated[int, typer.Option("--batch-documents", help="Documents a step.")]
BatchRows = Annotated[int, typer.Option("--batch-rows", help="Decode steps of a document.")]
WarmStart = Annotated[
    bool, typer.Option("--warm-start/--cold-start", help="Begin at the model's own queries and keys.")
]
HeldOut = Annotated[float, typer.Option("--held-out", help="Share of documents to measure with.")]
Patience = Annotated[int, typer.Option("--patience", help="Epochs without gain before it stops.")]
RandomSeed = Annotated[int, typer.Option("--seed", help="Of the random policy.")]


class LabelOptions:
    """How labels are told: the keyword arguments of ``LabelChoice``."""

    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Share of attention a voter's chunks hold.  [default: the collection's]"),
    ]
    voters: Annotated[
        str | None, typer.Option("--voters", help="layer (head-summed), head or index.  [default: the collection's]")
    ]
    votes: Annotated[
        int | None, typer.Option("--votes", help="Votes that make a chunk positive.  [default: the collection's]")
    ]
    least_mass: Annotated[
        float | None, typer.Option("--least-mass", help="Least attention a vote needs.  [default: the collection's]")
    ]
    label_layers: Annotated[
        str | None, typer.Option("--label-layers", metavar="N,N", help="Layers that vote.  [default: all recorded]")
    ]
    sink_tokens: Annotated[int, typer.Option("--sink-tokens", help="First prompt tokens that always stay.")] = 4
    recency_tokens: Annotated[
        int | None,
        typer.Option("--recency-tokens", help="Last prompt tokens that always stay.  [default: as in the method]"),
    ]


def label_values(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of labels with the layers read."""
    return {**given, "label_layers": parse_layers(given["label_layers"], option="--label-layers")}


with_labels = with_options("labels", LabelOptions, label_values)
"""Gives a command the options of labels in place of ``labels``, keyword arguments of ``LabelChoice``."""


def parse_layers(text: str | None, *, option: str = "--layers") -> tuple[int, ...] | None:
    """Read ``3,7``.

    Raises:
        UsageError: not whole numbers.
    """
    if text is None:
        return None
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of layers: write for example {option} 3,7.") from None


def silence(text: str) -> None:
    """Print nothing."""
    del text
