"""What ``kvscope lsa fit`` is asked for, how its time is split, and what it remembers between two calls."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvscope.errors import UsageError
from kvscope.files import first_line, whole_file
from kvscope.harness.engine.chat import AUTO
from kvscope.harness.indexers.collection.collect import DEFAULT_CHUNK_TOKENS
from kvscope.harness.indexers.lsa.calibrate import DEFAULT_TARGET_RECALL
from kvscope.harness.indexers.lsa.train_config import DEFAULT_TAU
from kvscope.results.reading import parse_json, read_regular

#: Asked where the user names no task: one needle, one among many, chains, and questions about a story.
TASKS = ("niah_single_1", "niah_multikey_2", "vt", "long_qa")
#: Lengths that are tried where the user names none: the two longest of which enough documents can be made, else one.
LADDER_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
ENOUGH_DOCUMENTS = 60
#: Where the time is spent at the latest: documents until the first share of it, training until the second.
COLLECT_UNTIL, TRAIN_UNTIL = 0.7, 0.92
#: What rounds of documents are for, over and over, at one length after the other; no document serves two ends.
ROLES = ("train", "calibrate", "evaluate", "train", "train")
STATE_FILE = "fit.json"
FORMAT = 2
MOST_STATE_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """What to fit an indexer to.

    Attributes:
        model: as ``kvscope run --model``.
        minutes: of everything, of earlier calls for the same folder, too.
        tasks: task specs; None: four that come with kvscope, those that the shortest length has room for.
        lengths_tokens: of the documents; None: two that the model takes and the time allows.
        seed: of the documents, of each round one more. Keep it away from the seeds that evaluate.
        tau: decode steps between refreshes.
        chunk_tokens: tokens of a chunk.
        target_recall: golden recall that threshold 0.5 is set to, on documents not trained on.
        chat_template, device, dtype: as ``kvscope run``.
    """

    model: str
    minutes: float = 10.0
    tasks: tuple[str, ...] | None = None
    lengths_tokens: tuple[int, ...] | None = None
    seed: int = 1000
    tau: int = DEFAULT_TAU
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    target_recall: float = DEFAULT_TARGET_RECALL
    chat_template: str = AUTO
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if not 0 < self.minutes < float("inf"):
            raise UsageError(f"minutes must be positive, got {self.minutes:g}.")
        for name in ("tau", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be 1 or more, got {getattr(self, name)}.")
        if not 0 < self.target_recall < 1:
            raise UsageError(f"target_recall must lie between 0 and 1, both excluded, got {self.target_recall}.")

    @property
    def identity(self) -> dict[str, Any]:
        """What a folder is begun with, as JSON gives it back. More minutes continue it.

        What ``chat_template`` comes to is told from the model's tokenizer, and stands in ``FitState.probe``.
        """
        values = {key: value for key, value in asdict(self).items() if key not in ("minutes", "chat_template")}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@dataclass
class FitState:
    """What is done in a folder.

    Attributes:
        identity: of the configuration.
        spent_s: seconds of earlier calls, and of this one up to the last save.
        probe: what the first documents told: ``labels`` tried, ``layers``, ``lengths_tokens``, ``tasks``,
            and the hash of the ``chat_template`` that prompts are in; None before.
        rounds: complete ones.
        collected: whether no more documents are to be made in ``minutes``.
        minutes: of the call that ended with that.
        labels: rules tried on the training documents, the one taken last; None before.
        trained: held-out measures of the training; None before.
        phases_s: seconds of each phase.
    """

    identity: dict[str, Any]
    spent_s: float = 0.0
    probe: dict[str, Any] | None = None
    rounds: int = 0
    collected: bool = False
    minutes: float = 0.0
    labels: list[dict[str, Any]] | None = None
    trained: dict[str, Any] | None = None
    phases_s: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, config: FitConfig) -> "FitState":
        """Return what a folder holds; nothing done where there is none.

        Raises:
            UsageError: it was begun with other options, or cannot be read.
        """
        path = folder / STATE_FILE
        text = read_regular(path, most_bytes=MOST_STATE_BYTES) if path.exists() else None
        if text is None:
            return cls(config.identity)
        try:
            values: dict[str, Any] = parse_json(text)
            if values.pop("format") != FORMAT:
                raise ValueError(f"a format other than {FORMAT}")
            state = cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UsageError(
                f"'{path}' cannot be read ({first_line(error)}); give another --out, or delete the folder."
            ) from error
        for key, mine in config.identity.items():
            theirs = state.identity.get(key)
            if mine != theirs:
                raise UsageError(
                    f"Folder '{folder}' was begun with {key} {theirs}, and {mine} is asked for; give another --out, or "
                    "the options it was begun with."
                )
        if state.collected and config.minutes > state.minutes:  # more documents, and all of them are learnt from
            state.collected, state.labels, state.trained = False, None, None
        return state

    def save(self, folder: Path) -> None:
        """Write it; it appears whole or not at all."""
        with whole_file(folder / STATE_FILE) as temporary:
            temporary.write_text(json.dumps({"format": FORMAT, **vars(self)}, indent=1) + "\n", encoding="utf-8")


class Stopwatch:
    """The time of a fit, over all calls, and how much of it each phase took."""

    def __init__(self, config: FitConfig, state: FitState, folder: Path, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._state, self._folder = state, folder
        self._total_s = 60 * config.minutes
        self._begun_s = clock() - state.spent_s
        self._phase = "load"
        self._phase_since_s = clock()

    def begin(self, phase: str) -> None:
        """What is done from here on is part of ``phase``."""
        self.save()
        self._phase = phase

    def save(self) -> None:
        """Write what is done and how long it took."""
        now_s = self.clock()
        phases_s, state = self._state.phases_s, self._state
        phases_s[self._phase] = round(phases_s.get(self._phase, 0.0) + now_s - self._phase_since_s, 2)
        self._phase_since_s = now_s
        state.spent_s = round(now_s - self._begun_s, 2)
        state.save(self._folder)

    def deadline_s(self, share: float) -> float:
        """Return when a share of the time is over, by the clock."""
        return self._begun_s + share * self._total_s

    def left_s(self, share: float) -> float:
        """Return the seconds until then; below 0 when it is past."""
        return self.deadline_s(share) - self.clock()


default_clock = time.monotonic
