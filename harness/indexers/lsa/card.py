"""The card beside a fitted indexer: what it was made of, and what it holds on documents it has not seen."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvscope.files import whole_file
from kvscope.harness.engine.devices import resolve_device
from kvscope.harness.indexers.lsa.fit_config import FitConfig, FitState
from kvscope.harness.indexers.lsa.label_share import MOST_KEPT, LabelShare
from kvscope.harness.passes.environment import capture_environment
from kvscope.methods.indexer_files import prompts_text
from kvscope.methods.lsa.indexer_config import IndexerConfig
from kvscope.units import format_length

CARD_FILE, CARD_JSON = "README.md", "card.json"
#: Documents from which on figures mean something: with seven to train, recall was perfect and a third of the answers
#: were lost (docs/log.md).
ENOUGH = {"train": 32, "calibrate": 8, "evaluate": 8}
#: What the card shows of an evaluation: the indexer at its threshold and at shares, and recency at the same.
SHOWN = (
    ("indexer", "threshold", 0.5),
    *((p, "fraction", f) for f in (0.1, 0.135, 0.2) for p in ("indexer", "recency")),
)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is said of an indexer.

    Attributes:
        config, state: of the fit.
        documents: how many served each end.
        indexer: its configuration.
        calibrated: what ``calibrate`` found.
        rows: of the evaluation.
        evaluated: measures at threshold 0.5 over the evaluation's refreshes, see ``refreshes.measures``.
        hit_rate: share of the chunks chosen at later refreshes that were resident already.
    """

    config: FitConfig
    state: FitState
    documents: dict[str, int]
    indexer: IndexerConfig
    calibrated: dict[str, Any]
    rows: Sequence[dict[str, Any]]
    evaluated: dict[str, Any]
    hit_rate: float | None

    @property
    def warnings(self) -> list[str]:
        """Return what is to be known before these figures are believed, a sentence each."""
        found = []
        few = [f"{self.documents[role]} to {role}" for role, enough in ENOUGH.items() if self.documents[role] < enough]
        if few:
            wanted = ", ".join(f"{enough} to {role}" for role, enough in ENOUGH.items())
            found.append(
                f"warning: {', '.join(few)} are few documents: answers may lose more than this recall tells. Give more "
                f"--minutes or shorter documents, for {wanted} at least."
            )
        if self.evaluated["kept"] > MOST_KEPT:
            found.append(
                f"warning: it keeps {self.evaluated['kept']:.1%} of new prompts, and above {MOST_KEPT:.0%} there is "
                "little to save. Give more --minutes, longer prompts (--length), a lower --target-recall, or a budget."
            )
        return found

    @property
    def command(self) -> str:
        """The command that made it, every option written out."""
        config = self.config
        assert self.state.probe is not None
        options: list[tuple[str, object]] = [("minutes", f"{config.minutes:g}")]
        options += [("task", task) for task in self.state.probe["tasks"]]
        options += [("length", length) for length in self.state.probe["lengths_tokens"]]
        options += [("seed", config.seed), ("tau", config.tau), ("chunk-tokens", config.chunk_tokens)]
        options += [("target-recall", f"{config.target_recall:g}"), ("chat-template", config.chat_template)]
        options += [("device", config.device), ("dtype", config.dtype)]
        words = [word for name, value in options for word in (f"--{name}", str(value))]
        return shlex.join(["kvscope", "lsa", "fit", config.model, *words, "--out", "DIR"])

    def table(self) -> list[dict[str, Any]]:
        """Return golden recall against the share of bytes kept, a row a policy and setting, a cell a length."""
        rows = [row for row in self.rows if row["task"] == "all"]
        lengths = sorted({row["length_tokens"] for row in rows})
        found = []
        for shown in SHOWN:
            policy, setting, value = shown
            line = {"what": f"{policy}, {setting} {value:g}"}
            for row in rows:
                if (row["policy"], row["setting"], row["value"]) == shown:
                    recall = "-" if row["recall"] is None else f"{row['recall']:.1%}"
                    line[format_length(row["length_tokens"])] = f"{recall} at {row['kept_bytes_fraction']:.1%}"
            found.append(line)
        return found if lengths else []

    def summary_text(self) -> str:
        """Return what a user wants to know first."""
        from tabulate import tabulate

        hits = (
            "no second refresh" if self.hit_rate is None else f"{self.hit_rate:.0%} of later choices were there already"
        )
        text = tabulate(self.table(), headers="keys", tablefmt="simple")
        told = (
            f"{text}\n\nEach cell: golden recall at the share of a prompt's bytes kept, on "
            f"{self.documents['evaluate']} new documents. Refreshes: {hits}."
        )
        return "\n\n".join([told, *self.warnings])

    def values(self) -> dict[str, Any]:
        """Return everything as plain values."""
        state = self.state
        return {
            "model": self.indexer.model,
            "model_revision": self.indexer.model_revision,
            "command": self.command,
            "environment": capture_environment(device=str(resolve_device(self.config.device))),
            "probe": state.probe,
            "labels": state.labels,
            "layers": list(self.indexer.layers),
            "documents": self.documents,
            "seeds": {"first": self.config.seed + 1, "last": self.config.seed + 1 + state.rounds},
            "held_out": state.trained,
            "calibration": self.calibrated,
            "evaluation": {**self.evaluated, "hit_rate": self.hit_rate, "table": self.table()},
            "seconds": state.phases_s,
            "warnings": self.warnings,
            "indexer": {key: value for key, value in asdict(self.indexer).items() if key != "trained"},
        }


def write_card(folder: Path, card: Card) -> None:
    """Write the card as Markdown and JSON."""
    values = card.values()
    with whole_file(folder / CARD_JSON) as temporary:
        temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    with whole_file(folder / CARD_FILE) as temporary:
        temporary.write_text(markdown(card, values), encoding="utf-8")


def markdown(card: Card, values: dict[str, Any]) -> str:
    """Return the card in words."""
    from tabulate import tabulate

    state, environment = card.state, values["environment"]
    assert state.probe is not None
    assert state.labels is not None
    lengths = " and ".join(format_length(n) for n in state.probe["lengths_tokens"])
    packages = ", ".join(f"{name} {found}" for name, found in environment["packages"].items() if found)
    lines = [
        f"# An lsa indexer for {values['model']}",
        "",
        *(line for warning in card.warnings for line in (f"**{warning}**", "")),
        f"- Model: {values['model']}, revision {values['model_revision']}.",
        f"- Documents: {card.documents['train']} to train, {card.documents['calibrate']} to set the threshold, "
        f"{card.documents['evaluate']} to evaluate, each for one of these alone.",
        f"- Tasks: {', '.join(state.probe['tasks'])}, at {lengths} tokens; answers are the model's own.",
        f"- Seeds: {values['seeds']['first']} to {values['seeds']['last']}, one a round of documents.",
        f"- Prompts: {prompts_text(state.probe.get('chat_template'))}.",
        f"- Layers indexed: {', '.join(map(str, card.indexer.layers))}; chunks of {card.indexer.chunk_tokens} tokens, "
        f"a refresh every {card.indexer.tau} steps.",
        f"- Seconds: {', '.join(f'{name} {taken:g}' for name, taken in state.phases_s.items())}.",
        f"- Machine: {environment['gpu'] or environment['cpu'] or 'a CPU'}, {environment['cpu_cores']} cores.",
        f"- Versions: kvscope {environment['kvscope']} (commit {environment['commit']}), {packages}.",
        "",
        "    kvscope run -m dense -m lsa:indexer=DIR --model MODEL --length LENGTH --task TASK --out runs/fitted",
        "",
        "## What it holds",
        "",
        tabulate(card.table(), headers="keys", tablefmt="github"),
        "",
        "Golden recall at the share of a prompt's bytes kept, everything counted, on the documents to evaluate "
        f"({card.evaluated['refreshes']} refreshes, {card.evaluated['refreshes_needing']} of them need a chunk).",
        "Hit rate at refreshes: " + ("-." if card.hit_rate is None else f"{card.hit_rate:.1%}."),
        "By task, at every threshold and share: `evaluation/recall.csv`.",
        "",
        "## Labels",
        "",
        "Rules tried, the last one taken; at most "
        f"{MOST_KEPT:.0%} of the chunks may be asked for. First on short documents, one a task:",
        "",
        *(f"- {LabelShare(**each).text()}" for each in state.probe["labels"]),
        "",
        "Then on the documents to train:",
        "",
        *(f"- {LabelShare(**each).text()}" for each in state.labels),
        "",
        "## Made by",
        "",
        f"    {card.command}",
        "",
    ]
    return "\n".join(lines)
