"""Cache methods on a public model, in one recipe: fit an indexer, name the tasks, measure, ask the driver.

1. ``fit``: ``kvscope lsa fit`` in a time.
2. ``recall``: golden recall of that indexer on new documents, at the lengths given with ``--recall-length``.
3. ``choose``: dense alone on seeds that the fit trains on. A task is measured if dense answers enough of it there, over
   all lengths. The choice is written down before the first row of the measurement.
4. ``test``: lsa, landmark and the common baselines on new seeds, at each length's share of the managed bytes.
5. ``compare``: all methods on the first of those prompts, at every share of ``--share``.
6. ``footprint``: memory of several sequences at the longest length, by the driver.
7. ``times``: time a token of all methods at 13.5 % of the managed bytes, each alone, at every length.

``public_models_result.py`` packs the runs for keeping, and has their figures as JSON.

    kvscope models fetch gemma-3-270m
    python benchmarks/public_models.py --model FILE.gguf --work runs/gemma --length 4k=0.25 --length 16k=0.25 \\
        --length 32k=0.135 --samples 540 --gpus all --jobs 4

Steps that are done are not done again, and a step whose time is over (``--time-limit``) goes on when it is asked again.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

from measure import ended, say
from public_models_folder import WorkFolder
from public_models_methods import INDEXER, compared, tested

from kvscope.errors import UsageError
from kvscope.harness.engine.models import load_model
from kvscope.methods.at_share import DECODED_TOKENS
from kvscope.methods.dense.method import Dense
from kvscope.results.frames import load_run
from kvscope.units import format_length, parse_length

CANDIDATES = (
    "niah_single_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "long_qa",
)
LEAST_SCORE = 0.6
CHOOSING_SEED, CHOOSING_SAMPLES = 1000, 12
MEASURING_SEED = 0
#: Seed of the documents that golden recall is measured on: neither fitted nor asked.
RECALL_SEED, RECALL_SAMPLES = 3000, 8
STEPS = ("fit", "recall", "choose", "test", "compare", "footprint", "times")
#: Share of `times`, and steps of a cell: more than a captured step needs to settle.
TIMED_SHARE, TIMED_STEPS = 0.135, 65
CARD_FILE, TASKS_FILE, BYTES_FILE = "card.json", "tasks.json", "bytes.json"


class Recipe:
    """The steps of one model.

    Args:
        shares: length in tokens -> share of the managed bytes that the methods under test hold.

    Raises:
        UsageError: the folder of work cannot be made, or is another model's.
    """

    def __init__(self, options: argparse.Namespace, shares: dict[int, float]) -> None:
        self.options, self.shares = options, shares
        self.work = WorkFolder(options)

    def fit(self) -> bool:
        """Make the indexer."""
        if not self._fitted:
            rest = [item for length in self.options.fit_length for item in ("--length", length)]
            self.work.kvscope(
                "lsa", "fit", self.options.model, "--out", INDEXER, "--minutes", f"{self.options.fit_minutes:g}",
                "--seed", str(CHOOSING_SEED), *rest, *self.work.device,
            )  # fmt: skip
        return True

    def recall(self) -> bool:
        """Measure the indexer's golden recall on documents that are new to it, as the fit's card does."""
        lengths = [item for length in self.options.recall_length for item in ("--length", length)]
        if not lengths or (self.work.path / "recall" / "recall.json").exists():
            return True
        card = self.work.note(f"{INDEXER}/{CARD_FILE}", step="fit")
        rule = card["labels"][-1]
        tasks = [item for task in card["probe"]["tasks"] for item in ("--task", task)]
        self.work.kvscope(
            "lsa", "collect", "--model", self.options.model, "--out", "recall-documents", *tasks, *lengths,
            "--samples", str(RECALL_SAMPLES), "--seed", str(RECALL_SEED),
            "--chunk-tokens", str(card["indexer"]["chunk_tokens"]),
            "--layers", ",".join(map(str, card["probe"]["layers"])), "--top-p", str(rule["top_p"]),
            "--least-mass", str(rule["least_mass"]), "--quiet", *self.work.device,
        )  # fmt: skip
        self.work.kvscope("lsa", "eval", "--indexer", INDEXER, "--data", "recall-documents", "--out", "recall")
        return True

    def choose(self) -> bool:
        """Write down which tasks are measured, by dense's scores."""
        folder = "choose"
        if not self.work.run(folder, methods=["dense"], tasks=list(CANDIDATES), lengths=list(self.shares),
                             samples=CHOOSING_SAMPLES, seed=CHOOSING_SEED):  # fmt: skip
            return False
        scores = defaultdict(list)
        for row in load_run(self.work.path / folder).samples.itertuples():
            scores[row.task].append(row.score)
        means = {task: round(mean(each), 3) for task, each in scores.items()}
        chosen = [task for task in CANDIDATES if means[task] >= LEAST_SCORE]
        note = {"least_score": LEAST_SCORE, "seed": CHOOSING_SEED, "dense": means, "tasks": chosen}
        self.work.write_note(TASKS_FILE, note)
        print(note, flush=True)
        if not chosen:
            raise UsageError(f"Dense answers no task in {LEAST_SCORE:.0%} of prompts: {means}. Nothing is measured.")
        return True

    def test(self) -> bool:
        """Measure what is tested, a run a length."""
        tasks = self._tasks
        return all(
            self.work.run(f"test-{format_length(length)}", tasks=tasks, lengths=[length],
                          methods=tested(self._of_all(share, length), fitted=self._fitted),
                          samples=-(-self.options.samples // len(tasks)), seed=MEASURING_SEED)
            for length, share in sorted(self.shares.items())
        )  # fmt: skip

    def compare(self) -> bool:
        """Measure the others, a run a length, the shortest first."""
        tasks = self._tasks
        asked = sorted(self.options.share or set(self.shares.values()))
        return all(
            self.work.run(f"compare-{format_length(length)}", tasks=tasks, lengths=[length],
                          methods=compared([self._of_all(share, length) for share in asked], fitted=self._fitted),
                          samples=-(-self.options.compare_samples // len(tasks)), seed=MEASURING_SEED)
            for length in sorted(self.shares)
        )  # fmt: skip

    def footprint(self) -> bool:
        """Let the driver say what several sequences hold at the longest length."""
        length = max(self.shares)
        share = self._of_all(self.shares[length], length)
        methods = tested(share, fitted=self._fitted)
        asked = ["--footprint-batch", str(self.options.footprint_batch)]
        return self.work.run("footprint", methods=methods, tasks=["niah_single_1"], lengths=[length], samples=1,
                             seed=MEASURING_SEED, footprint=asked)  # fmt: skip

    def times(self) -> bool:
        """Time a token of each method at each length, one sequence in a process of its own."""
        asked = ["--set", f"footprint_decode_tokens={TIMED_STEPS}"]
        return all(
            self.work.run(f"times-{format_length(length)}", tasks=["niah_single_1"], lengths=[length],
                          methods=compared([self._of_all(TIMED_SHARE, length)], fitted=self._fitted),
                          samples=1, seed=MEASURING_SEED, footprint=asked)
            for length in sorted(self.shares)
        )  # fmt: skip

    @property
    def _fitted(self) -> bool:
        return (self.work.path / INDEXER / CARD_FILE).exists()

    def _of_all(self, share: float, length: int) -> float:
        """Return a share of the managed bytes as one of all bytes: no method manages the model's sliding windows."""
        window, dense = self._bytes["window_bytes"], self._bytes["dense_bytes"][str(length)]
        return float((window + share * (dense - window)) / dense)

    @cached_property
    def _bytes(self) -> dict[str, Any]:
        """What a sequence holds under dense, by length, behind as many decoded tokens as a share is counted with."""
        path = self.work.path / BYTES_FILE
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"dense_bytes": {}}
        if not {str(n) for n in self.shares} <= set(found["dense_bytes"]):
            inside = self.work.path / self.options.model
            spec = str(inside) if inside.exists() else self.options.model
            shape = load_model(spec, device=self.options.device or "auto").shape
            dense = {str(n): Dense().predict(shape, n, DECODED_TOKENS).device_bytes for n in self.shares}
            found = {
                "window_bytes": shape.stock_kv_bytes(min(self.shares), DECODED_TOKENS),
                "dense_bytes": found["dense_bytes"] | dense,
            }
            self.work.write_note(BYTES_FILE, found)
        return found

    @property
    def _tasks(self) -> list[str]:
        tasks: list[str] = self.work.note(TASKS_FILE, step="choose")["tasks"]
        return tasks


def shares_of(texts: Iterable[str]) -> dict[int, float]:
    """Return length in tokens -> share, of texts as ``16k=0.25``.

    Raises:
        UsageError: one is otherwise, or its length was there before.
    """
    found: dict[int, float] = {}
    for text in texts:
        length, _, share = text.partition("=")
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if not 0 < value <= 1:
            raise UsageError(f"--length '{text}' has no share between 0 and 1: write it as 16k=0.25.")
        n_tokens = parse_length(length)
        if n_tokens in found:
            raise UsageError(f"--length {length} is given twice: a length has one share.")
        found[n_tokens] = value
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps in turn; return 0 when all are done.

    Raises:
        UsageError: an argument is wrong, or a step cannot be done.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as of kvscope run; a path is taken from --work or absolute")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--length", action="append", required=True, help="as 16k=0.25: with its share; repeatable")
    parser.add_argument("--samples", type=int, default=504, help="prompts a length, over all tasks, of the test")
    parser.add_argument("--share", type=float, action="append", help="of `compare`; repeatable; default: the test's")
    parser.add_argument("--compare-samples", type=int, default=216, help="prompts a length of `compare`")
    parser.add_argument("--fit-minutes", type=float, default=4.0)
    parser.add_argument("--fit-length", action="append", default=[], help="lengths of the documents; none: chosen")
    parser.add_argument(
        "--recall-length", action="append", default=[], help="of new documents for the indexer's recall"
    )
    parser.add_argument("--gpus", help="as of kvscope run")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device")
    parser.add_argument("--footprint-batch", type=int, default=16)
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds of all steps")
    parser.add_argument("--step", action="append", choices=STEPS, help="repeatable; all of them")
    options = parser.parse_args(arguments)
    for name in ("samples", "compare_samples", "jobs", "footprint_batch"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(options, name)}.")
    for share in options.share or ():
        if not 0 < share <= 1:
            raise UsageError(f"--share must be above 0 and at most 1, got {share:g}.")
    recipe = Recipe(options, shares_of(options.length))
    for step in options.step or STEPS:
        since_s = time.perf_counter()
        try:
            done = getattr(recipe, step)()
        except subprocess.CalledProcessError as error:
            raise UsageError(
                f"Step {step}: kvscope ended with exit code {error.returncode}, as it says above."
            ) from error
        say(f"{step}: {'done' if done else 'not done'}, {time.perf_counter() - since_s:.1f} s")
        if not done:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(ended(main))
