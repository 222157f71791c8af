"""Cache methods on a public model, in one recipe: fit an indexer, name the tasks, measure, ask the driver.

1. ``fit``: ``kvscope lsa fit`` in a time.
2. ``choose``: dense alone on seeds that the fit trains on. A task is measured if dense answers enough of it there, over
   all lengths. The choice is written down before the first row of the measurement.
3. ``measure``: every method on new seeds, a run a length, each with its own share of the bytes.
4. ``footprint``: memory of several sequences at the longest length, by the driver.

    kvscope models fetch gemma-3-270m
    python benchmarks/public_models.py --model FILE.gguf --work runs/gemma --length 4k=0.25 --length 16k=0.25 \\
        --length 32k=0.135 --samples 540 --gpus all --jobs 4

Steps that are done are not done again. Folders of runs, ``tasks.json`` and the indexer's card lie in ``--work``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean

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
STEPS = ("fit", "choose", "measure", "footprint")
INDEXER = "indexer"


def tested(share: float, *, fitted: bool) -> list[str]:
    """Return what is tested against dense on all prompts of a length, at a share of its tokens."""
    fit = [f"lsa:budget_fraction={share:g},indexer={INDEXER}", f"lsa:indexer={INDEXER}"] if fitted else []
    return ["dense", *fit, f"lsa:budget_fraction={share:g},indexer=landmark"]


def others(share: float) -> list[str]:
    """Return what stands beside them, on fewer prompts: those that keep a set, at the same share."""
    freed = [f"{name}:budget_fraction={share:g}" for name in ("snapkv", "recency", "random")]
    return ["dense", "quest", "msa", "moba", *freed]


class Recipe:
    """The steps of one model.

    Args:
        shares: length in tokens -> share of its tokens that methods with a budget keep.
    """

    def __init__(self, options: argparse.Namespace, shares: dict[int, float]) -> None:
        self.options, self.shares = options, shares
        self.work: Path = options.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.took_s: dict[str, float] = {}

    def kvscope(self, *arguments: str) -> None:
        """Run a command of kvscope in the folder of work, where indexers have short names.

        Raises:
            CalledProcessError: it failed.
        """
        code = f"import sys; sys.argv[1:] = {list(arguments)!r}; from kvscope.cli import main; main()"
        print("kvscope", *arguments, flush=True)
        subprocess.run([sys.executable, "-c", code], cwd=self.work, check=True)

    def fit(self) -> None:
        """Make the indexer."""
        if not (self.work / INDEXER / "README.md").exists():
            rest = [item for length in self.options.fit_length for item in ("--length", length)]
            self.kvscope(
                "lsa", "fit", self.options.model, "--out", INDEXER, "--minutes", f"{self.options.fit_minutes:g}",
                "--seed", str(CHOOSING_SEED), *rest,
            )  # fmt: skip

    def choose(self) -> None:
        """Write down which tasks are measured, by dense's scores."""
        self._run("choose", methods=["dense"], tasks=list(CANDIDATES), lengths=list(self.shares),
                  samples=CHOOSING_SAMPLES, seed=CHOOSING_SEED)  # fmt: skip
        scores = defaultdict(list)
        for line in (self.work / "choose" / "samples.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            scores[row["task"]].append(row["score"])
        means = {task: round(mean(each), 3) for task, each in scores.items()}
        chosen = [task for task in CANDIDATES if means[task] >= LEAST_SCORE]
        note = {"least_score": LEAST_SCORE, "seed": CHOOSING_SEED, "dense": means, "tasks": chosen}
        (self.work / "tasks.json").write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8")
        print(note, flush=True)

    def measure(self) -> None:
        """Measure every method, a run a length."""
        tasks = json.loads((self.work / "tasks.json").read_text(encoding="utf-8"))["tasks"]
        for name, samples in (("tested", self.options.samples), ("others", self.options.other_samples)):
            for length, share in self.shares.items():
                methods = tested(share, fitted=self._fitted) if name == "tested" else others(share)
                self._run(f"{name}-{format_length(length)}", methods=methods, tasks=tasks, lengths=[length],
                          samples=-(-samples // len(tasks)), seed=MEASURING_SEED)  # fmt: skip

    def footprint(self) -> None:
        """Let the driver say what several sequences hold at the longest length."""
        length = max(self.shares)
        share = self.shares[length]
        methods = [*tested(share, fitted=self._fitted), f"recency:budget_fraction={share:g}"]
        self._run("footprint", methods=methods, tasks=["niah_single_1"], lengths=[length], samples=1,
                  seed=MEASURING_SEED, footprint=True)  # fmt: skip

    @property
    def _fitted(self) -> bool:
        return (self.work / INDEXER).exists()

    def _run(
        self, out: str, *, methods: list[str], tasks: list[str], lengths: list[int], samples: int, seed: int,
        footprint: bool = False,
    ) -> None:  # fmt: skip
        found = ["run", "--model", self.options.model, "--out", out, "--seed", str(seed), "--samples", str(samples)]
        found += [item for each in methods for item in ("--method", each)]
        found += [item for each in tasks for item in ("--task", each)]
        found += [item for each in lengths for item in ("--length", str(each))]
        if not footprint:
            gpus = ["--gpus", self.options.gpus] if self.options.gpus else []
            found += ["--no-footprint", *gpus, "--jobs", str(self.options.jobs)]
        else:
            found += ["--footprint-batch", str(self.options.footprint_batch)]
        self.kvscope(*found, *(["--device", self.options.device] if self.options.device else []), "--no-report")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as of kvscope run; a path is taken from --work or absolute")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--length", action="append", required=True, help="as 16k=0.25: with its share; repeatable")
    parser.add_argument("--samples", type=int, default=504, help="prompts a length, over all tasks, of the test")
    parser.add_argument("--other-samples", type=int, default=108, help="the same of the methods beside it")
    parser.add_argument("--fit-minutes", type=float, default=4.0)
    parser.add_argument("--fit-length", action="append", default=[], help="lengths of the documents; none: chosen")
    parser.add_argument("--gpus", help="as of kvscope run")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--device")
    parser.add_argument("--footprint-batch", type=int, default=16)
    parser.add_argument("--step", action="append", choices=STEPS, help="repeatable; all of them")
    options = parser.parse_args()
    pairs = (text.partition("=") for text in options.length)
    recipe = Recipe(options, {parse_length(length): float(share) for length, _, share in pairs})
    for step in options.step or STEPS:
        since_s = time.perf_counter()
        getattr(recipe, step)()
        recipe.took_s[step] = round(time.perf_counter() - since_s, 1)
    if os.environ.get("KVSCOPE_COMMIT"):
        print("commit", os.environ["KVSCOPE_COMMIT"])
    print(json.dumps(recipe.took_s))


if __name__ == "__main__":
    main()
