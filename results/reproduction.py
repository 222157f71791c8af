"""`reproduce.json`: which cells a reproduction is made of, fixed before they are measured, and their rows as runs.

A folder of a reproduction holds this file and one packed run a finished cell; `pieces/CELL/seed-N` are the run folders
in which cells are measured. Tables of claims are made of these rows alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, ValidationError, model_validator

from kvscope.errors import UsageError
from kvscope.paths import no_folder
from kvscope.results import limits
from kvscope.results.frames import Run, load_run, make_run
from kvscope.results.merge import Piece, merge_pieces
from kvscope.results.packed import Rows, is_packed, write_packed
from kvscope.results.reading import parse_json, read_regular
from kvscope.results.rowfile import check_version, first_problem
from kvscope.results.run_schema import RunInfo
from kvscope.results.schema import Count, Length, Name, Positive, Record, Seed, Text
from kvscope.results.store import REPRODUCE_FILE, RUN_FILE, RunStore

PIECES_FOLDER = "pieces"
PILOT = "pilot"
_MOST_BYTES = 4 << 20
UNFINISHED = "the reproduction is not finished"

Role = Literal["ruler", "longbench_v2", "longmemeval", "mrcr", "nothing_needed", "footprint", "throughput", "sweep"]
TABLE_1_ROLES: tuple[Role, ...] = ("ruler", "longbench_v2", "longmemeval")


class CellPlan(Record):
    """One cell: the rows of one length, or of one value of a setting, in one run folder a seed."""

    name: Name
    """Folder of the cell."""
    role: Role
    """What its rows stand for."""
    paper_row: Name | None = None
    """Row of the paper's Table 1 that it stands for, as `kvscope verify flashmemory` calls it."""
    lengths_tokens: Annotated[tuple[Length, ...], Field(min_length=1, max_length=limits.MOST_LENGTHS)]
    """Lengths as measured; one, but for cells of memory and throughput."""
    tasks: tuple[Name, ...] = ()
    """Tasks as asked for, each with as many prompts."""
    samples: Positive = 1
    """Prompts a task and seed."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1, max_length=1000)] = (0,)
    """Seeds of its pieces, fixed before."""
    methods: dict[str, Name] = Field(default_factory=dict)
    """What a method stands for (`dense`, `lsa`, `recency_equal`) -> its label in the rows."""
    lsa_share: Annotated[float, Field(gt=0.0)] | None = None
    """lsa's share of bytes in the pilot, which the methods of equal bytes were given."""
    left_out: Text | None = None
    """Why the cell is not measured here."""
    config: dict[str, JsonValue] = Field(default_factory=dict)
    """Keys of the configuration besides."""

    @property
    def prompts(self) -> int:
        """Prompts over all tasks and seeds."""
        return len(self.tasks) * len(self.lengths_tokens) * self.samples * len(self.seeds)

    @property
    def scored(self) -> bool:
        """Whether answers are scored."""
        return self.role not in ("footprint", "throughput")


class Reproduction(Record):
    """`reproduce.json`, version 1."""

    schema_version: Literal[1] = 1
    """Version of this schema."""
    kvscope_version: Text
    """Version of kvscope that began it."""
    started_utc: Text
    """ISO 8601 time of the first start."""
    profile: Literal["lsa", "setup"]
    """Which claims it is about."""
    size: Literal["quick", "full"]
    """Which profile."""
    model: Name
    """Model as asked for."""
    lsa: Name
    """lsa as asked for, without the window."""
    divisor: Positive
    """Lengths are the paper's over this."""
    window_tokens: Count
    """Last prompt tokens that lsa, recency and random keep: the paper's 8,192 over the divisor."""
    cells: Annotated[tuple[CellPlan, ...], Field(max_length=1000)]
    """In the order in which they are measured."""

    @property
    def scaled(self) -> bool:
        """Whether its lengths are not the paper's."""
        return self.divisor != 1

    @property
    def scale_sentence(self) -> str:
        """What stands on every table of a reproduction at other lengths; empty at the paper's."""
        if not self.scaled:
            return ""
        return (
            f"Lengths are the paper's divided by {self.divisor}, and so is the window of 8,192 tokens: these numbers "
            "show that everything runs, and decide none of the paper's claims."
        )

    def cell(self, name: str) -> CellPlan:
        """Return a cell by its name."""
        return next(cell for cell in self.cells if cell.name == name)

    def same_plan(self, other: "Reproduction") -> bool:
        """Whether another one asks for the same; budgets that a pilot fixed aside."""

        def asked(each: Reproduction) -> object:
            cells = [cell.model_dump(exclude={"methods", "lsa_share"}) for cell in each.cells]
            return each.model_dump(exclude={"cells", "kvscope_version", "started_utc"}), cells

        return asked(self) == asked(other)

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [cell.name for cell in self.cells]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two cells share the name {twice[0]!r}")
        odd = next((name for name in names if "/" in name or name in (".", "..", PIECES_FOLDER, "report")), None)
        if odd is not None:
            raise ValueError(f"{odd!r} is not the name of a folder")
        return self


@dataclass(frozen=True)
class Loaded:
    """A reproduction with the rows that are there."""

    plan: Reproduction
    runs: Mapping[str, Run]
    """Name of a cell -> its rows, for those that have any."""
    folder: Path
    memo: dict[str, Any] = field(init=False, default_factory=dict, repr=False, compare=False)
    """What was worked out of these rows already, by name. It must not be changed."""

    def of_role(self, *roles: str) -> list[tuple[CellPlan, Run | None]]:
        """Return the cells of some roles, each with its rows where there are any."""
        return [(cell, self.runs.get(cell.name)) for cell in self.plan.cells if cell.role in roles]


def read_reproduction(folder: Path) -> Reproduction | None:
    """Return what `reproduce.json` says; None where there is none.

    Raises:
        UsageError: it cannot be read or is not valid.
    """
    path = folder / REPRODUCE_FILE
    data = read_regular(path, most_bytes=_MOST_BYTES)
    if data is None:
        return None
    try:
        values = parse_json(data)
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}. Restore it from its source.") from error
    check_version(values, str(path))
    try:
        return Reproduction.model_validate_json(data)
    except ValidationError as error:
        raise UsageError(f"{path} is not valid: {first_problem(error)}. Restore it from its source.") from error


def load_reproduction(folder: str | Path) -> Loaded:
    """Read a reproduction, finished or not.

    Raises:
        UsageError: the folder holds none, or a cell's rows cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} {no_folder(folder)}. Give the folder that `kvscope reproduce --out` wrote.")
    plan = read_reproduction(folder)
    if plan is None:
        raise UsageError(f"{folder} holds no {REPRODUCE_FILE}: it is no folder of kvscope reproduce.")
    runs = {}
    for cell in plan.cells:
        if is_packed(folder / cell.name):
            runs[cell.name] = load_run(folder / cell.name)
            continue
        merged = merged_cell(folder, cell)
        if merged is not None:
            info, rows = merged
            runs[cell.name] = make_run(
                rows.samples, rows.footprints, info=info, folder=folder / cell.name, throughputs=rows.throughputs
            )
    return Loaded(plan, runs, folder)


def piece_folder(folder: Path, cell: str, seed: int) -> Path:
    """Return where a piece is measured."""
    return folder / PIECES_FOLDER / cell / f"seed-{seed}"


def merged_cell(folder: Path, cell: CellPlan) -> tuple[RunInfo, Rows] | None:
    """Return the rows of a cell's pieces, those of whole prompts; None where there are none."""
    pieces = []
    for seed in cell.seeds:
        place = piece_folder(folder, cell.name, seed)
        if (place / RUN_FILE).exists():
            store = RunStore.open(place)
            asked = cell.samples * len(cell.seeds) if cell.scored else None
            name = f"{cell.name}/seed-{seed}"
            piece = Piece(name=name, info=store.info, rows=store.rows(), asked_samples=asked, unfinished=UNFINISHED)
            if piece.rows.samples or piece.rows.footprints or piece.rows.throughputs:
                pieces.append(piece)
    return merge_pieces(pieces) if pieces else None


def pack_cell(folder: Path, cell: CellPlan) -> None:
    """Pack a finished cell's pieces into one run of a few compressed files."""
    merged = merged_cell(folder, cell)
    assert merged is not None
    write_packed(folder / cell.name, *merged)
