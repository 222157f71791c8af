"""The cell list of the committed reference results: cells, their parts, and the pieces these are measured in."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kvscope.errors import UsageError
from kvscope.harness.passes.config import RunConfig, make_config
from kvscope.results.store import RUN_FILE, RunStore

CELLS_FILE = Path(__file__).parent / "reference_cells.yaml"
USED_FILE = "used.jsonl"
#: What a part says besides keys of the configuration.
PART_KEYS = ("seeds", "first_seed", "fewer", "carried")


@dataclass(frozen=True)
class Cell:
    """One run folder of the result, and the pieces it is measured in.

    Attributes:
        planned_gpu_minutes: of what is still to be measured when planned; what is carried over is not in it.
        seeds: pieces of each part.
        parts: what each part asks for in place of ``run``'s keys; besides, ``seeds``: its own number of pieces (long
            prompts get fewer than short ones, and one table), ``first_seed``: where they begin, to measure more of a
            (task, length) later. A part with fewer than 200 prompts a cell (50 past 128K) says why under ``fewer``.
            ``carried: NAME`` marks a part that is not measured again: its rows come from the packed cell NAME, or from
            this cell as packed before.
        carried: what is known of those packed cells, as cells.json shall say it: ``name``, ``used_gpu_minutes`` and so
            on.
    """

    name: str
    planned_gpu_minutes: float
    seeds: int
    run: dict[str, Any]
    parts: Sequence[dict[str, Any]] = ({},)
    carried: Sequence[dict[str, Any]] = ()

    def __post_init__(self) -> None:
        known = {item.get("name") for item in self.carried}
        for part in self.parts:
            if "carried" in part and part["carried"] not in known:
                raise UsageError(
                    f"Cell {self.name}: a part is carried from {part['carried']!r}, which its list `carried` does not "
                    "name: add it there, with the minutes that it took."
                )

    def seeds_of(self, part: dict[str, Any]) -> range:
        """Return the seeds of a part, one piece each."""
        first = int(part.get("first_seed", 0))
        return range(first, first + int(part.get("seeds", self.seeds)))

    def config(self, part: dict[str, Any], seed: int) -> RunConfig:
        """Return the checked configuration of one piece."""
        values = {**self.run, **{key: value for key, value in part.items() if key not in PART_KEYS}}
        return make_config({**values, "seed": seed}, source=f"cell {self.name}")

    def command(self, part: dict[str, Any]) -> str:
        """Return what measures a part under one seed, as text."""
        config = self.config(part, self.seeds_of(part)[0])
        values = config.model_dump(mode="json", exclude_unset=True, exclude={"seed"})
        sets = [f"--set {shlex.quote(f'{key}={json.dumps(value)}')}" for key, value in values.items()]
        return " ".join(["kvscope run", *sets, "--set seed=SEED", "--out DIR"])

    def prompts(self) -> list[int]:
        """Return how many prompts a (task, length) of each part has."""
        return [len(self.seeds_of(part)) * self.config(part, self.seeds_of(part)[0]).samples for part in self.parts]

    def part_pieces(self, index: int) -> list[tuple[str, RunConfig]]:
        """Return the name and the checked configuration of every piece of one part; none where it is carried over."""
        part = self.parts[index]
        if "carried" in part:
            return []
        stem = "" if len(self.parts) == 1 else f"part-{index}-"
        return [(f"{stem}seed-{seed}", self.config(part, seed)) for seed in self.seeds_of(part)]

    def pieces(self) -> list[tuple[str, RunConfig]]:
        """Return the name and the checked configuration of every piece that is to be measured."""
        return [piece for index in range(len(self.parts)) for piece in self.part_pieces(index)]


def read_cells(path: Path, only: Sequence[str] = ()) -> list[Cell]:
    """Read the cell list.

    Raises:
        UsageError: it is missing or malformed, or a name in ``only`` is not in it.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))["cells"]
        cells = [Cell(**item) for item in found]
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is not a list of cells: {error}.") from error
    unknown = sorted(set(only) - {cell.name for cell in cells})
    if unknown:
        raise UsageError(f"There is no cell {unknown[0]!r} in {path.name}: {', '.join(cell.name for cell in cells)}.")
    return [cell for cell in cells if not only or cell.name in only]


def is_done(folder: Path, config: RunConfig) -> bool:
    """Whether a piece has every row it asks for, measured or not."""
    if not (folder / RUN_FILE).exists():
        return False
    store = RunStore.open(folder)
    if config.find_max:
        return len(store.max_contexts()) == len(config.methods)
    if config.throughput:
        return len(store.throughputs()) == len(config.methods) * len(config.lengths_tokens)
    samples = len(config.tasks) * len(config.lengths_tokens) * config.samples * len(config.methods)
    footprints = len(config.footprint_cells_tokens) * len(config.methods)
    return len(store.samples()) == samples and len(store.footprints()) == footprints


def used_minutes(work: Path, cell: Cell) -> float:
    """Return the minutes of the GPU that a cell took so far; processes that shared it count for their part."""
    path = work / cell.name / USED_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return round(sum(json.loads(line)["seconds"] for line in lines) / 60, 2)
