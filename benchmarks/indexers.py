"""The trained indexers of the reference model again, for new weights: lsa by chunks of 16, 64 and 256, and dsa.

    python benchmarks/indexers.py --model FOLDER --out DIR [--data DIR] [--minutes 8] [STEP ...]

Steps, in order; without a name all but the last two. Each resumes, and is skipped where it is done:

- `collect` runs the model over documents (`indexers_data.py`), in processes that share one GPU;
- `train` trains the shipped lsa indexer further on them and a dsa indexer anew, side by side;
- `calibrate` sets what lsa keeps, for chunks of 16, 64 and 256, and measures golden recall on evaluation's seeds;
- `gate` answers the prompts of the tests fixed in `indexers_gate.py`, and judges them;
- `rehearse` asks the same of one or more settings (--lsa) on training seeds (--seed): to choose by, and none passes.

DIR/lsa and DIR/dsa are what belongs into `methods/lsa/indexers` and `methods/dsa/indexers`; DIR/recall and DIR/gate
have tables; DIR/STEP.json says what a step did and took. Shards (about 21 GB) go to --data, by default DIR/data.
--minutes is the time of this call, shared out to its steps: a collection or training that reaches its end is used as
far as it got, and the step's file says so. The gate goes on by the same command. --tiny is everything on a CPU in
small: whether it runs, not how good it is. The first recipe, from random weights, is `indexers_h100.sh`.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import indexers_data as documents
import indexers_gate as gate
from steps import run_steps

from kvscope.errors import UsageError
from kvscope.harness.engine.devices import resolve_device
from kvscope.harness.indexers.collection.reading import Collection
from kvscope.harness.indexers.lsa.lineage import origin
from kvscope.harness.indexers.lsa.measuring import EvalConfig
from kvscope.harness.passes.environment import capture_environment
from kvscope.methods.dsa.indexer_files import FILES as DSA_FILES
from kvscope.methods.indexer_files import CONFIG_FILE, WEIGHTS_FILE
from kvscope.methods.lsa.indexer_files import indexer_folder, load_indexer, read_indexer_config, save_indexer

STEP_MINUTES = {"collect": 4.0, "train": 2.5, "calibrate": 1.5, "gate": 12.0, "rehearse": 10.0}
"""What a step is thought to take on an H200: --minutes is shared out by it."""
CAP_TOKENS, CAP_FRACTION = 12_288, 0.13
"""Most tokens that lsa keeps: the number holds to 94K tokens, the fraction beyond. With the indexer's keys (0.8 %) that
is at most 13.9 % of dense's bytes on a long prompt. At 0.08 `long_qa` lost at the cap: 1 of 27 prompts at 256K of
training seeds, and none from 0.1 on."""
LABELS: dict[str, Any] = {"voters": "layer", "top_p": 0.9, "label_layers": documents.RETRIEVAL_LAYERS}
TRAINING_MASS, GOLDEN_MASS = 0.1, 0.2
"""Least mass of a label that trains, and of a golden chunk (docs/lsa-study.md)."""
TAU = 4
KEPT = {16: 0.105, 64: 0.125, 256: 0.165}
"""Chunk tokens -> share of the prompt's bytes that threshold 0.5 is set to keep, at 16K and 32K."""
NAMES = {16: "reference", 64: "reference-chunk64", 256: "reference-chunk256"}


@dataclass(frozen=True)
class Work:
    """One call: what is asked for, and where it goes.

    Attributes:
        start: the lsa indexer that is trained further, a folder or a shipped name.
        lsa: method specs that are judged, of a gate one; none: the indexer of DIR.
        tests: names of the tests that are asked.
        cells, samples, seed: of a rehearsal, see ``indexers_gate.rehearsed``.
    """

    model: str
    out: Path
    data: Path
    device: str
    jobs: int
    start: str
    lsa: tuple[str, ...]
    tests: tuple[str, ...]
    cells: tuple[str, ...]
    samples: int | None
    seed: int
    tiny: bool

    def note(self, text: str) -> None:
        """Say where it is."""
        print(text, flush=True)


# -- collect


def collect(work: Work, deadline_s: float) -> dict[str, Any]:
    """Make the documents.

    Raises:
        UsageError: the time was over before there was a document of every role.
    """
    groups = documents.tiny_groups() if work.tiny else documents.GROUPS
    found = documents.collect_all(
        groups, work.data, model=work.model, device=work.device, jobs=work.jobs, deadline_s=deadline_s, note=work.note
    )
    if empty := [role for role, of_role in found["documents"].items() if not of_role]:
        raise UsageError(f"The time was over before a document of {', '.join(empty)}: the same command goes on.")
    return found


# -- train


def train(work: Work, deadline_s: float) -> dict[str, Any]:
    """Train lsa further and dsa anew, at a time."""
    return dict(
        zip(("lsa", "dsa"), in_processes(work, [(_train_lsa, deadline_s), (_train_dsa, deadline_s)]), strict=True)
    )


def adopted(start: str, like: Path, out: Path) -> Path:
    """Write an indexer of other weights of the same architecture as one of the model of a collection.

    Those weights went on from the ones it was trained for, so its states and keys are near: a better beginning than
    none. Its record says where it comes from.

    Args:
        like: a collection of the model.
    """
    folder, info = indexer_folder(start), Collection(like).info
    indexer = load_indexer(folder)
    indexer.config = replace(
        indexer.config, model=info.model, model_revision=info.model_revision, kept_fraction=None,
        trained={"start": origin(folder)},
    )  # fmt: skip
    save_indexer(indexer, out)
    return out


def _train_lsa(work: Work, deadline_s: float) -> dict[str, Any]:
    from kvscope.harness.indexers.lsa.train import train as run
    from kvscope.harness.indexers.lsa.train_config import TrainConfig

    target = work.out / "trained" / "lsa"
    if (target / CONFIG_FILE).is_file():
        return dict(read_indexer_config(target).trained["held_out"])
    folders = documents.made(work.data, documents.LSA, documents.DSA)
    start = adopted(work.start, folders[0], work.out / "trained" / "start")
    was = read_indexer_config(start)
    config = TrainConfig(
        tau=TAU, layers=documents.RETRIEVAL_LAYERS, **LABELS, least_mass=TRAINING_MASS, start=str(start),
        heads=was.heads, key_dim=was.key_dim, rank=was.rank, encoder=was.encoder, encoder_width=was.encoder_width,
        neighbours=was.neighbours, lookback=was.lookback_tokens, negatives=8, batch_documents=4, batch_rows=8,
        lr=5e-4, revive=0.3, epochs=1 if work.tiny else 4, held_out=0.4 if work.tiny else 0.04, keep="recall",
        patience=99, device=work.device,
    )  # fmt: skip
    return run(folders, target, config, note=_named("lsa", work), clock=time.time, deadline_s=deadline_s)


def _train_dsa(work: Work, deadline_s: float) -> dict[str, Any]:
    from kvscope.harness.indexers.dsa.objective import DsaTrainConfig
    from kvscope.harness.indexers.dsa.train import train as run

    target = work.out / "trained" / "dsa"
    if (target / CONFIG_FILE).is_file():
        return dict(DSA_FILES.read_config(target).trained["held_out"])
    config = DsaTrainConfig(epochs=1 if work.tiny else 10, held_out=0.4 if work.tiny else 0.1, device=work.device)
    folders = documents.made(work.data, documents.DSA)
    return run(folders, target, config, note=_named("dsa", work), clock=time.time, deadline_s=deadline_s)


def _named(name: str, work: Work) -> Callable[[str], None]:
    return lambda text: work.note(f"{name}: {text}")


# -- calibrate


def calibrate(work: Work, deadline_s: float) -> dict[str, Any]:
    """Set the thresholds, and measure golden recall; of dsa the attention that its choices hold."""
    del deadline_s
    found = in_processes(work, [*((_calibrate_lsa, chunk_tokens) for chunk_tokens in KEPT), (_eval_dsa, None)])
    return dict(zip((*NAMES.values(), "dsa"), found, strict=True))


def _calibrate_lsa(work: Work, chunk_tokens: int) -> dict[str, Any]:
    from kvscope.harness.indexers.lsa.calibrate import CalibrateConfig
    from kvscope.harness.indexers.lsa.calibrate import calibrate as run
    from kvscope.harness.indexers.lsa.evaluate import evaluate

    name, golden = NAMES[chunk_tokens], EvalConfig(**LABELS, least_mass=GOLDEN_MASS)
    target = work.out / "lsa" / name
    # Of a prompt of 1K, sinks and window alone are more than the shares.
    what = {"target_recall": 0.9} if work.tiny else {"target_kept": KEPT[chunk_tokens]}
    config = CalibrateConfig(
        chunk_tokens=chunk_tokens, **what, cap_tokens=CAP_TOKENS, cap_fraction=CAP_FRACTION, dtype="bfloat16",
        measure=golden,
    )  # fmt: skip
    note = _named(name, work)
    set_to = run(
        documents.made(work.data, documents.CALIBRATION), str(work.out / "trained" / "lsa"), target, config,
        device=work.device, note=note,
    )  # fmt: skip
    rows = evaluate(
        documents.made(work.data, documents.EVALUATION), str(target), work.out / "recall" / name, golden,
        device=work.device, note=note,
    )  # fmt: skip
    at_half = [row for row in rows if (row["policy"], row["setting"], row["value"]) == ("indexer", "threshold", 0.5)]
    note(recall_text(at_half))
    return {"calibration": set_to, "golden_recall": at_half}


def recall_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return golden recall and what is kept, by length."""
    cells = [
        f"{row['length_tokens']:,} tokens {'-' if row['recall'] is None else format(row['recall'], '.1%')} at "
        f"{row['kept_bytes_fraction']:.1%}"
        for row in rows
        if row["task"] == "all"
    ]
    return f"golden recall {', '.join(cells)}"


def _eval_dsa(work: Work, _: None) -> list[dict[str, Any]]:
    from kvscope.harness.indexers.dsa.evaluate import evaluate
    from kvscope.harness.indexers.dsa.train import CARD_FILE

    target = work.out / "dsa" / "reference"
    target.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE):  # checkpoints and log stay where it was trained
        shutil.copyfile(work.out / "trained" / "dsa" / name, target / name)
    rows = evaluate(
        documents.made(work.data, documents.DSA_EVALUATION), str(target), work.out / "recall" / "dsa",
        device=work.device, note=_named("dsa", work),
    )  # fmt: skip
    return [row for row in rows if (row["task"], row["layer"]) == ("all", "all")]


def in_processes(work: Work, calls: Sequence[tuple[Callable[..., Any], Any]]) -> list[Any]:
    """Return what functions of a module return, each called in a process of its own; without jobs one after another.

    Raises:
        UsageError: and whatever else one raises.
    """
    if work.jobs == 1:
        return [call(work, argument) for call, argument in calls]
    with (
        documents.shared_device([work.device] * len(calls), note=work.note),
        ProcessPoolExecutor(len(calls), mp_context=get_context("spawn")) as pool,
    ):
        waiting = [pool.submit(call, work, argument) for call, argument in calls]
        return [each.result() for each in waiting]


# -- gate


def judge(work: Work, deadline_s: float) -> dict[str, Any]:
    """Answer the prompts of the tests that were fixed in advance, and judge them."""
    return _judged(work, _plan(work), "gate", lsa=_specs(work)[0], deadline_s=deadline_s)


def rehearse(work: Work, deadline_s: float) -> dict[str, Any]:
    """Ask the tests on training seeds, in a folder of their own: nothing of it is the gate's."""
    specs = _specs(work)
    plan = gate.rehearsed(_plan(work), specs, seed=work.seed, cells=work.cells, samples=work.samples)
    # The plan's own word for the method stands for what is given as lsa, so a plain one has to be given as such.
    return _judged(work, plan, "rehearsal", lsa="lsa" if "lsa" in specs else specs[0], deadline_s=deadline_s)


def _specs(work: Work) -> tuple[str, ...]:
    return work.lsa or (f"lsa:indexer={work.out / 'lsa' / NAMES[16]}",)


def _plan(work: Work) -> gate.Plan:
    return gate.asking(gate.tiny_plan() if work.tiny else gate.PLAN, work.tests)


def _judged(work: Work, plan: gate.Plan, folder: str, *, lsa: str, deadline_s: float) -> dict[str, Any]:
    return gate.gate(
        plan, work.out / folder, model=work.model, lsa=lsa, device=work.device, jobs=work.jobs, deadline_s=deadline_s,
        note=work.note,
    )  # fmt: skip


STEPS: dict[str, Callable[[Work, float], dict[str, Any]]] = {
    "collect": collect, "train": train, "calibrate": calibrate, "gate": judge, "rehearse": rehearse,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=", ".join(STEPS))
    parser.add_argument("--model", required=True, help="a folder named `reference`, or reference")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--minutes", type=float, help="of this call; default: what its steps are thought to take")
    parser.add_argument("--jobs", type=int, help="processes on the device; default: 14, 1 when tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--start", default="reference", help="lsa indexer to begin with")
    parser.add_argument(
        "--lsa", action="append", default=[], metavar="SPEC",
        help="method to judge, as lsa for a shipped indexer, of a rehearsal also several; default: that of --out",
    )  # fmt: skip
    parser.add_argument("--tests", default="A,B,C", help="those that are asked, as B,C; default: all")
    parser.add_argument("--cells", help="of a rehearsal, as far-256k; default: all of its tests")
    parser.add_argument("--samples", type=int, help="of a rehearsal, per task and length; default: the gate's")
    parser.add_argument("--seed", type=int, default=7000, help="of a rehearsal, 1000 or more; default: 7000")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if unknown := sorted(set(options.steps) - set(STEPS)):
        parser.error(f"no step {unknown[0]!r}: {', '.join(STEPS)}")
    if options.model != "reference" and Path(options.model).resolve().name != "reference":
        parser.error(f"name the folder `reference`, not '{options.model}': indexers carry the name of their model")
    if len(options.lsa) > 1 and "gate" in options.steps:
        parser.error("the gate judges one --lsa; several are for rehearse")
    if options.samples is not None and options.samples < 1:
        parser.error(f"--samples must be 1 or more, got {options.samples}")
    device = "cpu" if options.tiny else str(resolve_device(options.device))
    work = Work(
        model=options.model, out=options.out, data=options.data or options.out / "data", device=device,
        jobs=options.jobs or (1 if options.tiny else 14), start=options.start, lsa=tuple(options.lsa),
        tests=tuple(options.tests.split(",")), cells=tuple(options.cells.split(",")) if options.cells else (),
        samples=options.samples, seed=options.seed, tiny=options.tiny,
    )  # fmt: skip
    asked = options.steps or ("collect", "train", "calibrate")
    record = {"model": work.model, "tiny": work.tiny, "environment": capture_environment(device=work.device)}
    passed = run_steps(
        {step: partial(run, work) for step, run in STEPS.items()}, asked, work.out, minutes=options.minutes,
        thought_minutes=STEP_MINUTES, record=record, note=work.note,
    )  # fmt: skip
    if not passed and not work.tiny:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
