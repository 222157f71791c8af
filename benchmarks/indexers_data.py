"""The documents that `indexers.py` trains, calibrates and measures on, in small collections that processes share out.

A unit is a collection of one seed: made whole or not at all, by whichever process is free. Units are in an order in
which every group advances alike, so that a time limit leaves the mix as it was planned, only smaller.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from kvscope.harness.indexers.collection.collect import CollectConfig, collect
from kvscope.harness.indexers.collection.reading import Collection
from kvscope.harness.indexers.collection.shards import MANIFEST
from kvscope.harness.passes.mps import side_by_side
from kvscope.harness.passes.progress import Progress

RETRIEVAL_LAYERS = (5, 7)
"""Layers of the reference model that are indexed (docs/lsa-study.md)."""
CHUNK_TOKENS, STATES, TOKEN_SAMPLES, LEAST_MASS = 16, 64, 1024, 0.001
ONE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3")
SEVERAL = ("niah_multivalue", "niah_multiquery", "vt")
QA = ("long_qa",)
HOPS = ("long_qa:types=hops_2+hops_3+multi_session",)
"""What the indexers before lost: their evidence is known only once the names between have been written."""
ASKED = (*ONE, "niah_multivalue", "niah_multiquery", *QA)
"""Tasks of the test at 16K and 32K."""
LSA, DSA, CALIBRATION, EVALUATION, DSA_EVALUATION = "lsa", "dsa", "calibration", "evaluation", "dsa-evaluation"
TINY_TOKENS = 1024


@dataclass(frozen=True)
class Group:
    """Units alike but for their seeds.

    Attributes:
        role: what they are for. Documents for dsa hold all layers and single tokens; lsa trains on them, too.
        name: of its tasks, for folders.
        samples: documents of each task in a unit.
        first_seed, units: seeds from there on, a unit each.
    """

    role: str
    name: str
    tasks: tuple[str, ...]
    length_tokens: int
    samples: int
    first_seed: int
    units: int

    @property
    def documents(self) -> int:
        """Documents of a unit."""
        return self.samples * len(self.tasks)


K = 1024
GROUPS = (
    Group(LSA, "qa", QA, 16 * K, 9, 4000, 60),
    Group(LSA, "hops", HOPS, 16 * K, 9, 4100, 60),
    Group(LSA, "several", SEVERAL, 16 * K, 4, 4200, 12),
    Group(LSA, "one", (*ONE, "niah_multivalue"), 16 * K, 3, 4300, 8),
    Group(LSA, "qa", QA, 32 * K, 6, 4400, 12),
    Group(LSA, "hops", HOPS, 32 * K, 6, 4450, 12),
    Group(LSA, "several", SEVERAL, 32 * K, 2, 4500, 8),
    Group(LSA, "qa", QA, 64 * K, 3, 4600, 10),
    Group(LSA, "hops", HOPS, 64 * K, 3, 4650, 8),
    Group(LSA, "several", SEVERAL, 64 * K, 1, 4700, 6),
    Group(LSA, "qa", QA, 128 * K, 1, 4800, 10),
    Group(LSA, "several", SEVERAL, 128 * K, 1, 4900, 5),
    Group(LSA, "all", (*QA, *SEVERAL, *ONE), 4 * K, 2, 5000, 12),
    Group(DSA, "qa", QA, 16 * K, 9, 5100, 12),
    Group(DSA, "needles", (*ONE, *SEVERAL), 16 * K, 2, 5200, 6),
    Group(DSA, "all", (*QA, *ONE, *SEVERAL), 4 * K, 2, 5300, 10),
    Group(CALIBRATION, "asked", ASKED, 16 * K, 1, 6000, 8),
    Group(CALIBRATION, "asked", ASKED, 32 * K, 1, 6100, 8),
    Group(DSA_EVALUATION, "all", (*QA, *ONE, *SEVERAL), 16 * K, 1, 6200, 4),
    # Seeds of evaluation are below 1000; those of the tests of `indexers_gate.py` are others.
    Group(EVALUATION, "qa", QA, 16 * K, 9, 50, 4),
    Group(EVALUATION, "needles", ASKED[:-1], 16 * K, 2, 50, 5),
    Group(EVALUATION, "qa", QA, 32 * K, 9, 50, 4),
    Group(EVALUATION, "needles", ASKED[:-1], 32 * K, 2, 50, 5),
    Group(EVALUATION, "qa", QA, 64 * K, 3, 50, 6),
    Group(EVALUATION, "needles", ASKED[:-1], 64 * K, 1, 50, 2),
    Group(EVALUATION, "qa", QA, 128 * K, 1, 50, 5),
    Group(EVALUATION, "needles", ASKED[:-1], 128 * K, 1, 50, 1),
)


def tiny_groups() -> tuple[Group, ...]:
    """Return one short unit of every name and role: whether it runs, not how good it is."""
    found = {(group.role, group.name): group for group in reversed(GROUPS)}
    return tuple(replace(group, length_tokens=TINY_TOKENS, samples=1, units=1) for group in found.values())


@dataclass(frozen=True)
class Unit:
    """One collection.

    Attributes:
        place: where it stands in its group, from 0 to 1.
    """

    group: Group
    seed: int
    place: float

    @property
    def folder(self) -> str:
        """Its folder below the data's."""
        return f"{self.group.role}/{self.group.name}-{self.group.length_tokens // K}k-{self.seed}"

    @property
    def tokens(self) -> int:
        """Prompt tokens of all its documents."""
        return self.group.documents * self.group.length_tokens

    def config(self, model: str, *, device: str) -> CollectConfig:
        """Return what to collect, in one shard."""
        of_tokens = self.group.role in (DSA, DSA_EVALUATION)
        return CollectConfig(
            model=model, tasks=self.group.tasks, lengths_tokens=(self.group.length_tokens,),
            samples=self.group.samples, seed=self.seed, chunk_tokens=CHUNK_TOKENS,
            layers=None if of_tokens else RETRIEVAL_LAYERS, token_samples=TOKEN_SAMPLES if of_tokens else 0,
            least_mass=LEAST_MASS, state_tokens=STATES, shard_documents=self.group.documents, answers="own",
            device=device,
        )  # fmt: skip


def units_of(groups: Sequence[Group], unit_type: type[Unit] = Unit) -> list[Unit]:
    """Return the units of groups, each group spread evenly over the whole; long ones first where equal."""
    found = [
        unit_type(group, group.first_seed + at, (at + 0.5) / group.units)
        for group in groups
        for at in range(group.units)
    ]
    return sorted(found, key=lambda unit: (unit.place, -unit.tokens))


def is_made(folder: Path) -> bool:
    """Whether a unit is there."""
    return (folder / MANIFEST).is_file()


def made(data: Path, *roles: str) -> list[Path]:
    """Return the units of roles that are there, in order of their names."""
    return [path.parent for role in roles for path in sorted((data / role).glob(f"*/{MANIFEST}"))]


def counts(data: Path, groups: Sequence[Group]) -> dict[str, dict[str, int]]:
    """Return role -> length in tokens -> documents that are there."""
    found: dict[str, dict[str, int]] = {}
    for role in dict.fromkeys(group.role for group in groups):
        of_role = found.setdefault(role, {})
        for folder in made(data, role):
            for document in Collection(folder).documents:
                key = str(document.length_tokens)
                of_role[key] = of_role.get(key, 0) + 1
    return found


def collect_all(
    groups: Sequence[Group],
    data: Path,
    *,
    model: str,
    device: str,
    jobs: int,
    deadline_s: float,
    note: Callable[[str], None],
    unit_type: type[Unit] = Unit,
) -> dict[str, Any]:
    """Make the units that are missing, ``jobs`` at a time on one device, until a deadline.

    Args:
        deadline_s: by ``time.time``; no unit is begun after it.
        unit_type: what a group's units are: a subclass collects otherwise.

    Returns:
        What was planned and made, and the seconds that this call took.

    Raises:
        UsageError: what a collection raises.
    """
    began_s = time.time()
    units = units_of(groups, unit_type)
    missing = [unit for unit in units if not is_made(data / unit.folder)]
    tokens = sum(unit.tokens for unit in missing)
    note(f"{len(missing)} of {len(units)} units to make, {tokens / 1e6:.1f} million tokens")
    done_tokens = 0
    for at, (unit, seconds) in enumerate(_made_by_processes(missing, data, model, device, jobs, deadline_s, note), 1):
        done_tokens += 0 if seconds is None else unit.tokens
        if at % 20 == 0 or at == len(missing):
            passed_s = time.time() - began_s
            note(f"{at} of {len(missing)} units, {done_tokens / max(1e-9, passed_s):,.0f} tokens a second")
    left_out = [unit.folder for unit in units if not is_made(data / unit.folder)]
    if left_out:
        note(f"the time was over before {len(left_out)} of {len(units)} units: what is there is used")
    return {
        "units_planned": len(units), "units_left_out": left_out, "documents": counts(data, groups),
        "tokens_of_this_call": done_tokens, "seconds": round(time.time() - began_s, 1), "jobs": jobs,
    }  # fmt: skip


def _made_by_processes(
    units: Sequence[Unit],
    data: Path,
    model: str,
    device: str,
    jobs: int,
    deadline_s: float,
    note: Callable[[str], None],
) -> Iterator[tuple[Unit, float | None]]:
    if not units:
        return
    jobs = min(jobs, len(units))
    with (
        shared_device([device] * jobs, note=note),
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_load, initargs=(model, device)) as pool,
    ):
        waiting = {pool.submit(_make, unit, str(data), model, device, deadline_s): unit for unit in units}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def shared_device(devices: Sequence[str], *, note: Callable[[str], None]) -> Iterator[None]:
    """Within it, processes that are started share a GPU side by side where the driver can (see ``passes.mps``).

    Args:
        devices: of each process, as ``cuda:0``.
        note: takes a line that says how.
    """
    with side_by_side(devices, note=note) as variables:
        wanted = {"OMP_NUM_THREADS": "1", **variables}
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


_LOADED: list[Any] = []


def _load(model: str, device: str) -> None:
    """Load the model once a process."""
    from kvscope.harness.engine.models import load_model

    _LOADED.append(load_model(model, device=device))


def _make(unit: Unit, data: str, model: str, device: str, deadline_s: float) -> float | None:
    """Make a unit and return the seconds it took; None where the time is over."""
    began_s = time.time()
    if began_s >= deadline_s:
        return None
    collect(unit.config(model, device=device), Path(data, unit.folder), progress=Progress(), loaded=_LOADED[0])
    return time.time() - began_s
