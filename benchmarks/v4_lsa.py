"""LSA on its own architecture: indexers for the small DeepSeek-V4, and the table of what they keep and lose.

    python benchmarks/v4_lsa.py --model reference-v4 --out DIR [--data DIR] [--minutes 20] [STEP ...]

Steps, in order. Each resumes, and is skipped where it is done (DIR/STEP.json says what it did and took):

- `collect` runs the model over documents (`v4_lsa_data.py`), in processes that share one GPU;
- `train` makes two indexers from the shards alone, beginning at the model's own: `paper` by the paper's labels (native
  indexers vote, top-p 0.6), `ours` by attention (top-p 0.9, least mass 0.05);
- `calibrate` sets what both keep at threshold 0.5, to --kept in the paper's accounting, and measures golden recall;
- `pilot` answers a few prompts of other seeds, which sizes recency and random at lsa's bytes;
- `table` fixes the plan, answers the prompts, and writes DIR/table.json and DIR/table.md (`v4_lsa_table.py`).

DIR/lsa/ours is what belongs into `methods/lsa/indexers/reference-v4`. --minutes is the time of this call, shared out to
its steps; the same command goes on. --layers says what is indexed: 3 (those whose attention votes most), all, or layers
with commas. --tiny does everything on a CPU with a tiny random model: whether it runs, not how good it is.
"""

import argparse
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import indexers_data as documents
import v4_lsa_data as data
import v4_lsa_table as table
import v4_lsa_text as text
from indexers import in_processes
from steps import run_steps

from kvscope.errors import UsageError
from kvscope.harness.engine.devices import resolve_device
from kvscope.harness.indexers.collection.label_choice import LabelChoice
from kvscope.harness.indexers.collection.reading import Collection
from kvscope.harness.indexers.lsa.calibrate import CalibrateConfig, calibrate
from kvscope.harness.indexers.lsa.evaluate import evaluate
from kvscope.harness.indexers.lsa.measuring import EvalConfig
from kvscope.harness.indexers.lsa.train import train
from kvscope.harness.indexers.lsa.train_config import TrainConfig
from kvscope.harness.passes.environment import capture_environment
from kvscope.methods.fp8_keys import SCALE_BYTES
from kvscope.methods.indexer_files import CONFIG_FILE
from kvscope.methods.lsa.indexer_files import read_indexer_config

STEP_MINUTES = {"collect": 8.0, "train": 3.0, "calibrate": 1.0, "pilot": 2.0, "table": 16.0}
"""What a step is thought to take on an H200: --minutes is shared out by it."""
OURS: dict[str, Any] = {"voters": "layer", "top_p": 0.9, "votes": 1}
TRAINING_MASS, GOLDEN_MASS = 0.05, 0.1
"""Least attention to an entry of a label that trains by our rule, and of a golden entry, whatever trained."""
NAMES = ("ours", "paper")


@dataclass(frozen=True)
class Work:
    """One call: what is asked for, and where it goes.

    Attributes:
        layers: as --layers.
        votes: native indexers that make a chunk positive by the paper's rule; 3 of 21 there.
        kept: share of the cache to keep, in the paper's accounting.
    """

    model: str
    out: Path
    data: Path
    device: str
    jobs: int
    layers: str
    votes: int
    tau: int
    kept: float
    lengths_tokens: tuple[int, ...]
    samples: int
    tiny: bool

    def note(self, text: str) -> None:
        """Say where it is."""
        print(text, flush=True)

    def labels(self, name: str) -> dict[str, Any]:
        """Return how the labels that an indexer learns are told."""
        if name == "ours":
            return {**OURS, "least_mass": TRAINING_MASS}
        return {"voters": "index", "top_p": 0.6, "votes": self.votes, "least_mass": data.LEAST_MASS}

    def indexer(self, name: str) -> Path:
        """Return the folder of an indexer, calibrated."""
        return self.out / "lsa" / name


def collect(work: Work, deadline_s: float) -> dict[str, Any]:
    """Make the documents.

    Raises:
        UsageError: the time was over before there was a document of every role.
    """
    groups = data.tiny_groups() if work.tiny else data.GROUPS
    found = documents.collect_all(
        groups, work.data, model=work.model, device=work.device, jobs=work.jobs, deadline_s=deadline_s, note=work.note,
        unit_type=data.EntryUnit,
    )  # fmt: skip
    if empty := [role for role, of_role in found["documents"].items() if not of_role]:
        raise UsageError(f"The time was over before a document of {', '.join(empty)}: the same command goes on.")
    return found


def train_both(work: Work, deadline_s: float) -> dict[str, Any]:
    """Train both indexers, at a time."""
    folders = documents.made(work.data, documents.LSA)
    layers, votes = data.indexed_layers(work.layers, folders, LabelChoice(**work.labels("ours")))
    work.note(f"indexed layers {', '.join(map(str, layers))}; attention's votes by layer: {votes}")
    calls = [(_train, (name, layers, deadline_s)) for name in NAMES]
    return {"layers": list(layers), "votes_by_layer": votes, **dict(zip(NAMES, in_processes(work, calls), strict=True))}


def _train(work: Work, asked: tuple[str, tuple[int, ...], float]) -> dict[str, Any]:
    name, layers, deadline_s = asked
    target = work.out / "trained" / name
    if (target / CONFIG_FILE).is_file() and read_indexer_config(target).layers == layers:
        return dict(read_indexer_config(target).trained["held_out"])
    by_paper = name == "paper"
    config = TrainConfig(
        tau=work.tau, layers=layers, **work.labels(name), lookback=1, negatives=3 if by_paper else 8, batch_documents=4,
        batch_rows=16, lr=1e-3, epochs=1 if work.tiny else 5, held_out=0.3 if work.tiny else 0.08,
        keep="loss" if work.tiny else "recall", patience=99, device=work.device,
    )  # fmt: skip
    return train(
        documents.made(work.data, documents.LSA), target, config, note=lambda line: work.note(f"{name}: {line}"),
        clock=time.time, deadline_s=deadline_s,
    )  # fmt: skip


def calibrate_both(work: Work, deadline_s: float) -> dict[str, Any]:
    """Set the thresholds of both, and measure golden recall by one and the same labels."""
    del deadline_s
    return dict(zip(NAMES, in_processes(work, [(_calibrate, name) for name in NAMES]), strict=True))


def _calibrate(work: Work, name: str) -> dict[str, Any]:
    golden = EvalConfig(**OURS, least_mass=GOLDEN_MASS)
    trained, folders = work.out / "trained" / name, documents.made(work.data, documents.CALIBRATION)
    # Of a tiny prompt what always stays is more than the share.
    what = {"target_kept": min(0.99, work.kept + _beside(trained, folders[0]) + (0.4 if work.tiny else 0.0))}
    config = CalibrateConfig(**what, dtype="bfloat16", measure=golden)

    def note(line: str) -> None:
        work.note(f"{name}: {line}")

    found = calibrate(folders, str(trained), work.indexer(name), config, device=work.device, note=note)
    rows = evaluate(
        documents.made(work.data, documents.EVALUATION), str(work.indexer(name)), work.out / "recall" / name, golden,
        device=work.device, note=note,
    )  # fmt: skip
    at_half = [row for row in rows if (row["policy"], row["setting"], row["value"]) == ("indexer", "threshold", 0.5)]
    return {**what, "calibration": found, "golden_recall": at_half}


def _beside(trained: Path, folder: Path) -> float:
    """Return what the paper's accounting leaves out, as a share of the cache: HCA entries, and lsa's own keys."""
    info, config = Collection(folder).info, read_indexer_config(trained)
    keys = len(config.layers) * (config.key_dim + SCALE_BYTES) / config.chunk_tokens
    return (info.kept_bytes_per_token + keys) / info.kv_bytes_per_token


def pilot(work: Work, deadline_s: float) -> dict[str, Any]:
    """Measure lsa's share of bytes at every length, on prompts of which nothing is claimed."""
    return table.pilot(plan_of(work), work.out / "pilot", ours=work.indexer("ours"), run=runs_of(work, deadline_s))


def judge(work: Work, deadline_s: float) -> dict[str, Any]:
    """Answer the prompts of the table, and judge them."""
    shares = table.pilot_shares(work.out / "pilot.json")
    indexers = {name: work.indexer(name) for name in NAMES}
    found = table.fill(
        plan_of(work), work.out / "rows", indexers=indexers, shares=shares, run=runs_of(work, deadline_s)
    )
    if not found.get("unfinished"):
        (work.out / "table.md").write_text(text.markdown(found), encoding="utf-8")
        work.note((work.out / "table.md").read_text(encoding="utf-8"))
    return found


def plan_of(work: Work) -> table.Plan:
    """Return what the table asks."""
    return table.Plan(
        tasks=("niah_single_1", "vt") if work.tiny else data.ASKED,
        lengths_tokens=work.lengths_tokens,
        samples=work.samples,
    )


def runs_of(work: Work, deadline_s: float) -> table.Runs:
    """Return how a cell is run."""
    extra = ("--max-new-tokens", "6") if work.tiny else ()
    return table.Runs(
        model=work.model, device=work.device, jobs=work.jobs, deadline_s=deadline_s, note=work.note, extra=extra
    )


STEPS: Mapping[str, Any] = {
    "collect": collect, "train": train_both, "calibrate": calibrate_both, "pilot": pilot, "table": judge,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--model", help="reference-v4 or a folder of that name; with --tiny none is needed")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--minutes", type=float, help="of this call; default: what its steps are thought to take")
    parser.add_argument("--jobs", type=int, help="processes on the device; default: 14, 1 when tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--layers", default="3")
    parser.add_argument("--votes", type=int, default=1)
    parser.add_argument("--tau", type=int, default=4)
    parser.add_argument("--kept", type=float, default=0.135)
    parser.add_argument("--lengths", default="4096,8192,16384,32768", help="of the table, in tokens")
    parser.add_argument("--samples", type=int, default=36, help="of every task and length; long_qa's types want nines")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if unknown := sorted(set(options.steps) - set(STEPS)):
        parser.error(f"no step {unknown[0]!r}: {', '.join(STEPS)}")
    if options.model is None and not options.tiny:
        parser.error("give --model reference-v4, or a folder of that name")
    if options.tiny:
        # Threads that wait for each other on a busy machine take twenty times as long for steps this small.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    model = options.model or str(data.tiny_model(options.out / "model" / "reference-v4"))
    if model != "reference-v4" and Path(model).resolve().name != "reference-v4":
        parser.error(f"name the folder `reference-v4`, not '{model}': indexers carry the name of their model")
    lengths = (1024,) if options.tiny else tuple(int(each) for each in options.lengths.split(","))
    work = Work(
        model=model, out=options.out, data=options.data or options.out / "data",
        device="cpu" if options.tiny else str(resolve_device(options.device)),
        jobs=options.jobs or (1 if options.tiny else 14), layers=options.layers, votes=options.votes, tau=options.tau,
        kept=options.kept, lengths_tokens=lengths, samples=2 if options.tiny else options.samples, tiny=options.tiny,
    )  # fmt: skip
    record = {"model": work.model, "tiny": work.tiny, "environment": capture_environment(device=work.device)}
    run_steps(
        {step: partial(run, work) for step, run in STEPS.items()}, options.steps or tuple(STEPS), work.out,
        minutes=options.minutes, thought_minutes=STEP_MINUTES, record=record, note=work.note,
    )  # fmt: skip


if __name__ == "__main__":
    main()
