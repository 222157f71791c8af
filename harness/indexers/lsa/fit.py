"""``kvscope lsa fit``: an indexer for a model in one command: collect, train, calibrate, evaluate, within a time.

A few short documents come first. They tell how long documents may be, which labels ask for little enough to be worth
predicting (``label_share``), and which layers retrieve. Then rounds of documents are made until their share of the
time is over, for training, calibration and evaluation in turn: no document serves two ends. The rest is the separate
commands, with the same defaults. What is done stays done: the same call again continues after the last whole part.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvscope.errors import UsageError
from kvscope.files import make_folder
from kvscope.harness.engine.chat import chat_tokenizer
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.models import load_model
from kvscope.harness.engine.presets import refuse_preset
from kvscope.harness.indexers.collection.collect import CollectConfig, check_lengths, collect, make_tasks
from kvscope.harness.indexers.collection.places import places_of, split
from kvscope.harness.indexers.collection.reading import Collection, open_collections
from kvscope.harness.indexers.collection.shards import MANIFEST
from kvscope.harness.indexers.lsa.calibrate import CalibrateConfig, calibrate
from kvscope.harness.indexers.lsa.card import Card, write_card
from kvscope.harness.indexers.lsa.evaluate import evaluate
from kvscope.harness.indexers.lsa.fit_config import (
    COLLECT_UNTIL,
    ROLES,
    TRAIN_UNTIL,
    FitConfig,
    FitState,
    Stopwatch,
    default_clock,
)
from kvscope.harness.indexers.lsa.fit_documents import DocumentCost, fitting_lengths, lengths_to_try, tasks_to_ask
from kvscope.harness.indexers.lsa.label_share import LAXER_MASSES, choose_labels, record_of, retrieving_layers
from kvscope.harness.indexers.lsa.measuring import EvalConfig, measuring_options
from kvscope.harness.indexers.lsa.objective import example
from kvscope.harness.indexers.lsa.refreshes import hit_rate, measures, score
from kvscope.harness.indexers.lsa.train import train
from kvscope.harness.indexers.lsa.train_config import TrainConfig
from kvscope.harness.passes.progress import Progress
from kvscope.methods.indexer_files import prompts_text
from kvscope.methods.lsa.indexer_files import load_indexer
from kvscope.paths import check_out, user_path
from kvscope.units import format_length, format_seconds

if TYPE_CHECKING:
    pass

LEAST_TRAINING_DOCUMENTS = 4
#: One longer document is timed where it takes no more of the time than this.
TIMING_SHARE = 0.06


def fit(
    config: FitConfig, out: str | Path, *, note: Callable[[str], None], clock: Callable[[], float] = default_clock
) -> Card:
    """Fit an indexer into a folder, with its card, its evaluation and the documents beside it.

    Args:
        note: takes lines that tell where it is.
        clock: seconds from any beginning.

    Returns:
        What the card says.

    Raises:
        UsageError: bad options, a folder begun with others, a model of which no labels are worth predicting, or too
            little time for the fewest documents.
        EnvironmentProblem: the disk is too small.
    """
    folder = user_path(out, what="out")
    check_out(folder)
    refuse_preset(config.model, "fit")
    state = FitState.of(folder, config)
    run = _Fit(config, folder, state, note, clock)
    run.documents()
    run.train()
    return run.finish()


class _Fit:
    """One call: the phases, and what they share."""

    def __init__(
        self,
        config: FitConfig,
        folder: Path,
        state: FitState,
        note: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self.config, self.folder, self.state, self.note = config, folder, state, note
        self.watch = Stopwatch(config, state, folder, clock)

    # -- documents

    def documents(self) -> None:
        """Make documents until their time is over."""
        state = self.state
        if state.collected:
            return
        config = self.config
        loaded = load_model(config.model, device=config.device, dtype=config.dtype)
        chat = chat_tokenizer(loaded.tokenizer, config.chat_template)
        template = None if chat is None else chat.sha256
        if state.probe is None:
            lengths = lengths_to_try(config, loaded)
            tasks = tasks_to_ask(config, chat or loaded.tokenizer, lengths[0])
            check_lengths(make_tasks(tasks), lengths, chat or loaded.tokenizer, loaded)
            make_folder(self.folder)  # not before: what is refused leaves no folder behind
            self.watch.begin("probe")
            self._probe(loaded, lengths, tasks)
        elif state.probe.get("chat_template") != template:
            raise UsageError(
                f"Folder '{self.folder}' was begun with {prompts_text(state.probe.get('chat_template'))}, and "
                f"{prompts_text(template)} are asked for: give --chat-template what it was begun with, or another "
                "--out."
            )
        self.watch.begin("collect")
        lengths = tuple(self._probed["lengths_tokens"])
        self.note(
            f"documents of {' and '.join(format_length(n) for n in lengths)} tokens, about "
            f"{format_seconds(max(0.0, self.watch.left_s(COLLECT_UNTIL)))} left for them"
        )
        document_s = float(self._probed["document_s"])
        while self._goes_on(document_s):
            document_s = self._round(loaded, document_s)
        counts = {role: sum(map(len, self._opened(role))) for role in dict.fromkeys(ROLES)}
        fewest = {"train": LEAST_TRAINING_DOCUMENTS, "calibrate": 1, "evaluate": 1}
        if any(counts[role] < least for role, least in fewest.items()):
            told = ", ".join(f"{count} to {role}" for role, count in counts.items())
            raise UsageError(
                f"{config.minutes:g} minutes were enough for {told}: too few documents for an indexer. Give more "
                "--minutes (the same command continues), shorter lengths (--length), or fewer tasks (--task)."
            )
        state.collected, state.minutes = True, config.minutes
        self.watch.save()

    @property
    def _probed(self) -> dict[str, Any]:
        assert self.state.probe is not None
        return self.state.probe

    def _goes_on(self, document_s: float) -> bool:
        """Whether another document fits the time for documents."""
        return self.watch.left_s(COLLECT_UNTIL) >= document_s

    def _probe(self, loaded: LoadedModel, lengths: tuple[int, ...], tasks: tuple[str, ...]) -> None:
        """Make one document of every task, short, with all layers: labels, layers and lengths go by them."""
        config = self.config
        self.note(f"labels, layers and lengths go by {len(tasks)} documents of {format_length(lengths[0])}")
        probe = self.folder / "data" / "probe"

        def timed(task: str, length_tokens: int, *, again: str = "") -> float:
            collecting = CollectConfig(
                model=config.model, tasks=(task,), lengths_tokens=(length_tokens,), samples=1, seed=config.seed,
                chunk_tokens=config.chunk_tokens, least_mass=min(LAXER_MASSES), shard_documents=1,
                chat_template=config.chat_template, device=config.device, dtype=config.dtype,
            )  # fmt: skip
            since_s = self.watch.clock()
            collect(collecting, probe / f"{task}-{length_tokens}{again}", progress=Progress(), loaded=loaded)
            return self.watch.clock() - since_s

        # The first document also warms up: the fastest tells what a document costs.
        cost = DocumentCost.of({lengths[0]: min([timed(task, lengths[0]) for task in tasks])})
        longer = self._length_to_time(lengths, cost)
        if longer is not None:
            # Twice: kernels compile for a length, and the first of it pays for all.
            cost = cost.and_of(longer, min([timed(tasks[0], longer), timed(tasks[0], longer, again="-again")]))
        opened = [Collection(probe / f"{task}-{lengths[0]}") for task in tasks]
        tried = choose_labels(opened, tau=config.tau)
        rule = opened[0].info.rule(top_p=tried[-1].top_p, least_mass=tried[-1].least_mass)
        layers = retrieving_layers(opened, rule, tau=config.tau)
        chosen = config.lengths_tokens or fitting_lengths(lengths, cost, self.watch.left_s(COLLECT_UNTIL))
        self.state.probe = {
            "tasks": list(tasks), "lengths_tokens": list(chosen), "document_s": cost.of_length(max(chosen)),
            "labels": record_of(tried), "layers": list(layers), "chat_template": opened[0].info.chat_template,
        }  # fmt: skip
        for each in tried:
            self.note(each.text())
        self.note(f"layers that retrieve: {', '.join(map(str, layers))}")
        self.watch.save()
        shutil.rmtree(probe)  # nothing asks for it again, and it holds every layer's keys

    def _length_to_time(self, lengths: Sequence[int], cost: DocumentCost) -> int | None:
        """Return the longest further length of which one document takes little of the time at the most; or None."""
        if self.config.lengths_tokens is not None:
            return None
        most_s = TIMING_SHARE * 60 * self.config.minutes
        return max((each for each in lengths[1:] if cost.of_length(each) <= most_s), default=None)

    def _round(self, loaded: LoadedModel, document_s: float) -> float:
        """Make one document of every task at one length, or what the time allows; return the seconds of a long one.

        Args:
            document_s: the same, of the round before.
        """
        state, probed = self.state, self._probed
        since_s = self.watch.clock()
        lengths: list[int] = probed["lengths_tokens"]
        length = lengths[state.rounds // len(ROLES) % len(lengths)]
        rule = probed["labels"][-1]
        collecting = CollectConfig(
            model=self.config.model, tasks=tuple(probed["tasks"]), lengths_tokens=(length,),
            samples=1, seed=self.config.seed + 1 + state.rounds, chunk_tokens=self.config.chunk_tokens,
            layers=tuple(probed["layers"]), top_p=rule["top_p"], least_mass=rule["least_mass"], shard_documents=1,
            chat_template=self.config.chat_template, device=self.config.device, dtype=self.config.dtype,
        )  # fmt: skip
        target = self._round_folder(state.rounds)
        collect(collecting, target, progress=Progress(), loaded=loaded, goes_on=lambda: self._goes_on(document_s))
        if not (target / MANIFEST).is_file():
            return document_s
        made, role = Collection(target), ROLES[state.rounds % len(ROLES)]
        took_s = self.watch.clock() - since_s
        left_s = max(0.0, self.watch.left_s(COLLECT_UNTIL))
        self.note(
            f"round {state.rounds + 1}: {len(made)} documents of {format_length(length)} to {role} in "
            f"{format_seconds(took_s)}, {format_seconds(left_s)} left for documents"
        )
        if made.complete:
            state.rounds += 1
        self.watch.save()
        tokens = sum(document.length_tokens for document in made.documents)
        return took_s / tokens * max(lengths)

    def _round_folder(self, number: int) -> Path:
        return self.folder / "data" / f"{number:03d}-{ROLES[number % len(ROLES)]}"

    def _folders(self, role: str) -> list[Path]:
        """Return the rounds of one end, the one that time ended, too."""
        found = [self._round_folder(number) for number in range(self.state.rounds + 1)]
        return [each for each in found if each.name.endswith(f"-{role}") and (each / MANIFEST).is_file()]

    def _opened(self, role: str) -> list[Collection]:
        folders = self._folders(role)
        return open_collections(folders) if folders else []

    # -- training

    def train(self) -> None:
        """Choose labels by all training documents, and train."""
        state, config = self.state, self.config
        if state.trained is not None:
            return
        self.watch.begin("train")
        collections = self._opened("train")
        first = self._probed["labels"][-1]
        tried = choose_labels(collections, tau=config.tau, top_p=first["top_p"], least_mass=first["least_mass"])
        self.note(f"{sum(map(len, collections))} documents to train on, {tried[-1].text()}")
        options = TrainConfig(
            tau=config.tau, top_p=tried[-1].top_p, least_mass=tried[-1].least_mass, held_out=0.2,
            device=config.device,
        )  # fmt: skip
        options = replace(options, keep="recall" if _held_out_needs(collections, options) else "loss")
        best = train(
            self._folders("train"),
            self.folder / "trained",
            options,
            note=self.note,
            clock=self.watch.clock,
            deadline_s=self.watch.deadline_s(TRAIN_UNTIL),
        )
        state.labels, state.trained = record_of(tried), best
        self.watch.save()

    # -- threshold and card

    def finish(self) -> Card:
        """Set the threshold on other documents, measure on others still, and write the card."""
        config, state, folder = self.config, self.state, self.folder
        assert state.labels is not None
        self.watch.begin("evaluate")
        rule = {key: state.labels[-1][key] for key in ("top_p", "least_mass")}
        measure = EvalConfig(tau=config.tau, **rule)
        calibrated = calibrate(
            self._folders("calibrate"), str(folder / "trained"), folder,
            CalibrateConfig(target_recall=config.target_recall, measure=measure), device=config.device,
            note=self.note,
        )  # fmt: skip
        rows = evaluate(
            self._folders("evaluate"), str(folder), folder / "evaluation", measure, device=config.device,
            note=self.note,
        )  # fmt: skip
        indexer = load_indexer(folder)
        scored = score(indexer, self._opened("evaluate"), measuring_options(indexer.config, measure))
        self.watch.save()
        card = Card(
            config=config,
            state=state,
            documents={role: sum(map(len, self._opened(role))) for role in dict.fromkeys(ROLES)},
            indexer=indexer.config,
            calibrated=calibrated,
            rows=rows,
            evaluated=measures(scored),
            hit_rate=hit_rate(scored),
        )
        write_card(folder, card)
        return card


def _held_out_needs(collections: Sequence[Collection], options: TrainConfig) -> bool:
    """Whether a held-out refresh needs a chunk, so that an epoch can be chosen by recall."""
    _, held_out = split(places_of(collections), share=options.held_out)
    for place in held_out:
        found = example(place, options)
        if found is not None and found.positives[found.document.refresh_rows(options.tau)].any():
            return True
    return False
