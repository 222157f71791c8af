"""What chaos kills: every pass, a report, collections and trainings, each with what must hold after a kill."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dsa_tools
import in_process
import planted
from tiny import SMALL, save_tiny_model

from kvscope.harness.indexers.collection.collect import CollectConfig, collect
from kvscope.harness.indexers.dsa.objective import DsaTrainConfig
from kvscope.harness.indexers.dsa.train import train as train_dsa
from kvscope.harness.indexers.lsa.train import train as train_lsa
from kvscope.harness.indexers.lsa.train_config import TrainConfig
from kvscope.harness.passes import process_pass
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.sweep import run
from kvscope.reports.build import build_report
from kvscope.results.columns import SURROUNDINGS_COLUMNS, TIME_COLUMNS
from kvscope.results.frames import load_run
from kvscope.results.store import ROW_KINDS, RunStore

Held = Mapping[str, Any]
"""What is durable, by key: it may become more, and never other."""
PRESET = {"model": "preset:tiny", "device": "cpu", "footprint_decode_tokens": 4}
LSA = "lsa:budget_tokens=512,selection=synthetic"
#: Readings of an allocator, or of when a method began.
_LOOSE = TIME_COLUMNS | SURROUNDINGS_COLUMNS | {"started_utc"}


@dataclass(frozen=True)
class Scenario:
    """A command over a folder.

    Attributes:
        act: runs it, from the start or from where it was killed.
        held: what it has put there for good; raises where something is damaged.
        doubled: what is there twice.
        prepare: makes the folder as it is before the first call.
        workers: words of the command line of processes of its own, which are killed in its place; None where it has
            none.
        kills_a_folder: about how often it is killed before it may end.
    """

    name: str
    act: Callable[[Path], None]
    held: Callable[[Path], Held]
    doubled: Callable[[Path], int] = lambda folder: 0
    prepare: Callable[[Path], None] = lambda folder: None
    workers: str | None = None
    kills_a_folder: int = 5


# -- rows


def rows(folder: Path) -> Held:
    """Return the rows that are results, times left out, as ``load_run`` gives them."""
    if not (folder / "run.json").exists():
        assert not any((folder / name).exists() for name in ROW_KINDS), "rows without a run"
        return {}
    with RunStore.open(folder) as store:
        every = [*store.samples(), *store.footprints(), *store.max_contexts(), *store.throughputs()]
    load_run(folder)
    return {
        f"{type(row).__name__} {row.key}": _firm(row.model_dump(mode="json"))
        for row in every
        if getattr(row, "status", "ok") == "ok"
    }


def _firm(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two runs must agree in."""
    return {
        key: _firm(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in _LOOSE and key != "request_s"  # of a server
    }


def doubled_rows(folder: Path) -> int:
    """Return how many results have a second row."""
    n_doubled = 0
    for name, kind in ROW_KINDS.items():
        seen = set()
        text = (folder / name).read_bytes() if (folder / name).exists() else b""
        for line in text.split(b"\n")[:-1]:
            row = kind.model_validate_json(line)
            if row.key in seen:
                n_doubled += 1
            if getattr(row, "status", "ok") == "ok":
                seen.add(row.key)
    return n_doubled


def measuring(values: Mapping[str, Any], *, here: bool = False) -> Callable[[Path], None]:
    """Return a run; ``here`` measures memory in its own process, at a tenth of the time."""

    def act(folder: Path) -> None:
        if here:
            process_pass.run_worker = lambda job, **options: in_process.measure(job)  # type: ignore[assignment]
        run(make_config(values), out=folder, progress=False)

    return act


# -- reports


def report_ready(run_folder: Path) -> Callable[[Path], None]:
    """Return what makes a run with a report of its first half, and rows of both halves."""

    def prepare(folder: Path) -> None:
        folder.mkdir()
        (folder / "run.json").write_bytes((run_folder / "run.json").read_bytes())
        lines = (run_folder / "samples.jsonl").read_text().splitlines(keepends=True)
        (folder / "samples.jsonl").write_text("".join(lines[: len(lines) // 2]))
        build_report(folder)
        (folder / "samples.jsonl").write_text("".join(lines))

    return prepare


def report_files(folder: Path) -> dict[str, bytes]:
    """Return the report's tables."""
    place = folder / "report"
    found = [path for path in place.rglob("*") if path.suffix in (".csv", ".md", ".tex")]
    return {str(path.relative_to(place)): path.read_bytes() for path in found if ".building" not in str(path)}


def whole_report(folder: Path) -> Held:
    """Check that each visible table is one of a whole report, and that there is one."""
    files = report_files(folder)
    assert (folder / "report" / "report.html").read_text().rstrip().endswith("</html>"), "a torn page"
    assert files, "no report at all"
    for name, data in files.items():
        assert data.endswith(b"\n"), f"{name} is torn"
    return {}


# -- collections and trainings


def collecting(model: str) -> Callable[[Path], None]:
    """Return a collection of the tiny model's attention."""
    config = CollectConfig(
        model=model, tasks=("vt",), lengths_tokens=(640, 704), samples=6, seed=77, chunk_tokens=16, shard_documents=2,
        device="cpu",
    )  # fmt: skip
    return lambda folder: (collect(config, folder, progress=Progress()), None)[1]


def recorded_shards(folder: Path) -> Held:
    """Return what the manifest records, with the bytes that are there."""
    if not (folder / "manifest.json").exists():
        return {}
    names = [each["file"] for each in json.loads((folder / "manifest.json").read_text())["shards"]]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def finished_indexer(folder: Path) -> Held:
    """Return the finished indexer, its weights and its configuration; each file is whole, or not there."""
    config = folder / "config.json"
    if not config.exists():
        return {}
    values = json.loads(config.read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert files, "a configuration without weights"
    values = json.loads(re.sub(re.escape(str(folder.parent)), "", json.dumps(values)))
    return {"config": values, **{path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}}


LSA_QUICK = TrainConfig(
    tau=1, epochs=3, lr=2e-2, batch_documents=4, recency_tokens=128, sink_tokens=4, patience=12, device="cpu",
    encoder="mean", lookback=1, warm_start=False, negatives=3, neighbours=0, keep="loss",
)  # fmt: skip
DSA_QUICK = DsaTrainConfig(epochs=3, lr=1e-2, batch_documents=4, key_dim=12, heads=2, patience=10, device="cpu")


def scenarios(base: Path, *, server: str | None = None) -> dict[str, Scenario]:
    """Return all of them, by name; ``base`` gets the model and the data that they share.

    Args:
        server: URL of a stub; without one nothing is asked of servers.
    """
    save_tiny_model(base / "tiny")
    model = str(base / "tiny")
    small = {**SMALL, "model": model, "batch": 1, "self_check": False}
    run(make_config({**small, "samples": 12}), out=base / "rows", progress=False)
    labels = planted.planted_collection(base / "planted", documents=20, per_shard=10)
    tokens = dsa_tools.planted_collection(base / "planted-dsa", samples=20)

    def quiet(text: str) -> None:
        del text

    def of_rows(name: str, values: Mapping[str, Any], *, here: bool = False, **more: Any) -> Scenario:
        return Scenario(name, measuring(values, here=here), rows, doubled_rows, **more)

    found = [
        of_rows("accuracy", {**small, "samples": 8}),
        of_rows("accuracy, 2 processes", {**small, "samples": 8, "jobs": 2}, workers="shard_worker"),
        of_rows("footprint", {**PRESET, "methods": ["dense", LSA], "lengths_tokens": [1024]}, workers="worker"),
        of_rows("footprint, in the sweep", {**PRESET, "lengths_tokens": [512, 1024]}, here=True),
        of_rows(
            "find-max",
            {**PRESET, "methods": ["dense", LSA], "find_max": True, "gpu_budget_bytes": "1MiB",
             "find_max_limit_tokens": "16k"},
            here=True,
        ),
        of_rows(
            "throughput",
            {**PRESET, "methods": ["dense", LSA], "throughput": True, "lengths_tokens": ["1k", "2k"], "max_batch": 4},
            here=True,
        ),
        Scenario(
            "report", lambda folder: (build_report(folder), None)[1], whole_report,
            prepare=report_ready(base / "rows"), kills_a_folder=6,
        ),
        Scenario("collection", collecting(model), recorded_shards),
        Scenario(
            "training of lsa's indexer", lambda folder: (train_lsa([labels], folder, LSA_QUICK, note=quiet), None)[1],
            finished_indexer,
        ),
        Scenario(
            "training of dsa's indexer", lambda folder: (train_dsa([tokens], folder, DSA_QUICK, note=quiet), None)[1],
            finished_indexer,
        ),
    ]  # fmt: skip
    if server is not None:
        asked = {"model": server, "tokenizer": "reference", "tasks": ["niah_single_1"], "lengths_tokens": [320],
                 "samples": 10}  # fmt: skip
        found.append(of_rows("served", asked))
    return {each.name: each for each in found}
