"""The cells of ``kvscope reproduce lsa``: FlashMemory's Table 1 row for row, and what else the paper claims.

Numbers of prompts and seeds are fixed here, before anything is measured: to 128K tokens 400 prompts a row, above 100,
the tasks of a row with equal weight. A row of RULER has five tasks. ``long_qa`` stands for LongBench-v2 by its four-way
choices and for LongMemEval by its eight other types.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from kvscope.methods.lsa import printed as paper
from kvscope.results.reproduction import PILOT, TABLE_1_ROLES, CellPlan, Role

Size = Literal["quick", "full"]

RULER_TASKS = ("niah_multikey_2", "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt")
CHOICE_TASKS = ("long_qa:types=multiple_choice",)
MEMORY_TYPES = (
    "single_fact", "assistant_fact", "knowledge_update", "temporal", "multi_session", "hops_2", "hops_3", "abstention",
)  # fmt: skip
MEMORY_TASKS = (f"long_qa:types={'+'.join(MEMORY_TYPES)}",)
ROLE_TASKS: dict[Role, tuple[str, ...]] = {
    "ruler": RULER_TASKS,
    "longbench_v2": CHOICE_TASKS,
    "longmemeval": MEMORY_TASKS,
    "mrcr": ("long_qa_mrcr",),
    "nothing_needed": ("long_qa_no_context",),
}
_ROLES: dict[str, Role] = {"LongBench-v2": "longbench_v2", "LongMemEval": "longmemeval", "RULER": "ruler"}

DIVISORS: dict[Size, int] = {"quick": 64, "full": 1}
LONGEST_OF_MANY_TOKENS = 128 * 1024
"""Rows to here have ``PROMPTS_OF_MANY`` prompts, longer ones ``PROMPTS_OF_FEW``."""
PROMPTS_OF_MANY, PROMPTS_OF_FEW = 400, 100
PROMPTS_A_PIECE = 200
QUICK_PROMPTS, QUICK_PROMPTS_ASIDE = 10, 6
PROMPTS_ASIDE = 100
"""Of MRCR and of questions that need nothing: no row of Table 1. Half of it past 128K."""
EQUAL_BYTES: dict[Size, tuple[str, ...]] = {
    "quick": ("recency", "random", "snapkv"),
    "full": ("recency", "random", "snapkv", "expected_attention"),
}
"""Baselines that are given lsa's bytes."""
PILOT_SEED = 900
"""Prompts that size these budgets; no claim is made from them."""
MRCR_TOKENS = 32 * 1024
"""The paper does not print MRCR's lengths."""
TABLE_2 = ("LongMemEval-S 125K", "LongMemEval-M 500K")
THROUGHPUT_MODEL = "preset:llama-3.1-8b"
THROUGHPUT_LSA = "lsa:selection=synthetic,budget_fraction=0.135"
THROUGHPUT_TOKENS = (256 * 1024, 512 * 1024)
FOOTPRINT_TOKENS = (128 * 1024, 256 * 1024, 512 * 1024)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a profile is made for.

    Attributes:
        size: quick or full.
        model: as of ``kvscope run``.
        lsa: the method that stands for LSA, without a window.
        divisor: the paper's lengths are divided by it.
    """

    size: Size
    model: str = "reference"
    lsa: str = "lsa"
    divisor: int = 1

    @property
    def window_tokens(self) -> int:
        """Window of lsa, recency and random."""
        return max(1, paper.RECENCY_TOKENS // self.divisor)


def lsa_cells(asked: Asked, *, most_tokens: int, has_gpu: bool) -> tuple[CellPlan, ...]:
    """Return the cells of ``kvscope reproduce lsa``, budgets of equal bytes still open.

    Args:
        most_tokens: longest prompt and answer that the model takes.
        has_gpu: whether memory by NVML and throughput can be measured.
    """
    cells = [_table_1_cell(asked, row) for row in paper.TABLE_1]
    cells.append(_extra(asked, "mrcr", "mrcr", tokens=MRCR_TOKENS, paper_row=None))
    cells += [
        _extra(asked, f"nothing-needed-{label.rpartition(' ')[2].lower()}", "nothing_needed", tokens=row.tokens,
               paper_row=label)
        for label in TABLE_2
        for row in paper.TABLE_1
        if row.label == label
    ]  # fmt: skip
    cells.sort(key=lambda cell: cell.lengths_tokens)
    cells += _gpu_cells(asked)
    return tuple(_fitting(cell, most_tokens=most_tokens, has_gpu=has_gpu) for cell in cells)


def _table_1_cell(asked: Asked, row: paper.PaperRow) -> CellPlan:
    role = next(role for name, role in _ROLES.items() if row.name.startswith(name))
    tasks = ROLE_TASKS[role]
    n = QUICK_PROMPTS if asked.size == "quick" else prompts_of_row(row.tokens // asked.divisor)
    # Question types are dealt out in blocks of eight: whole blocks weigh them alike.
    if role == "longmemeval":
        n += -n % len(MEMORY_TYPES) if asked.size == "full" else -(n % len(MEMORY_TYPES))
    n_pieces = max(1, n // PROMPTS_A_PIECE)
    return CellPlan(
        name=row.label.lower().replace(" ", "-"),
        role=role,
        paper_row=row.label,
        lengths_tokens=(row.tokens // asked.divisor,),
        tasks=tasks,
        samples=n // len(tasks) // n_pieces,
        seeds=tuple(range(n_pieces)),
        methods=_methods(asked, "dense", "lsa", "recency", "random"),
    )


def prompts_of_row(length_tokens: int) -> int:
    """Return the prompts of a row of the full profile."""
    return PROMPTS_OF_MANY if length_tokens <= LONGEST_OF_MANY_TOKENS else PROMPTS_OF_FEW


def _extra(asked: Asked, name: str, role: Role, *, tokens: int, paper_row: str | None) -> CellPlan:
    """A cell of dense and lsa alone. MRCR's replies and their questions need some room, however much is divided."""
    least = 2048 if role == "mrcr" else 0
    length = max(least, tokens // asked.divisor)
    many = PROMPTS_ASIDE if length <= LONGEST_OF_MANY_TOKENS else PROMPTS_ASIDE // 2
    return CellPlan(
        name=name,
        role=role,
        paper_row=paper_row,
        lengths_tokens=(length,),
        tasks=ROLE_TASKS[role],
        samples=QUICK_PROMPTS_ASIDE if asked.size == "quick" else many,
        methods=_methods(asked, "dense", "lsa"),
    )


def _gpu_cells(asked: Asked) -> list[CellPlan]:
    """Memory by NVML, and throughput of another model's shape, which has random weights."""
    window = asked.window_tokens
    lengths = tuple(tokens // asked.divisor for tokens in FOOTPRINT_TOKENS)
    footprint = CellPlan(
        name="footprint", role="footprint", lengths_tokens=lengths,
        methods={"dense": "dense", "lsa": windowed(asked.lsa, window)},
        config={"footprint": True, "kv": "prefill", "tasks": ["niah_multikey_2"], "samples": 1},
    )  # fmt: skip
    throughput = CellPlan(
        name="throughput", role="throughput", lengths_tokens=THROUGHPUT_TOKENS,
        methods={"dense": "dense", "lsa": THROUGHPUT_LSA},
        config={"model": THROUGHPUT_MODEL, "throughput": True, "footprint_decode_tokens": 129},
    )  # fmt: skip
    return [footprint, throughput]


def _fitting(cell: CellPlan, *, most_tokens: int, has_gpu: bool) -> CellPlan:
    why = None
    if not cell.scored and not has_gpu:
        why = "there is no GPU"
    elif cell.role != "throughput" and max(cell.lengths_tokens) > most_tokens:
        why = f"the model takes {most_tokens:,} tokens"
    return cell if why is None else cell.model_copy(update={"left_out": why})


def _methods(asked: Asked, *names: str) -> dict[str, str]:
    specs = {"dense": "dense", "lsa": asked.lsa, "recency": "recency", "random": "random"}
    return {name: specs[name] if name == "dense" else windowed(specs[name], asked.window_tokens) for name in names}


def windowed(spec: str, window_tokens: int) -> str:
    """Return a method with the window, as rows call it."""
    from kvscope.methods.registry import create_method
    from kvscope.specs import parse_spec

    return create_method(parse_spec(spec, kind="method").with_option("recency_tokens", window_tokens)).label


def pilot_cells(cells: Sequence[CellPlan]) -> tuple[CellPlan, ...]:
    """Return the cells that size budgets of equal bytes: lsa alone, on a few prompts of other seeds, a cell a role."""
    found = []
    for role in TABLE_1_ROLES:
        mine = [cell for cell in cells if cell.role == role and cell.left_out is None]
        if mine:
            found.append(
                CellPlan(
                    name=f"{PILOT}-{role.replace('_', '-')}",
                    role=role,
                    lengths_tokens=tuple(sorted(cell.lengths_tokens[0] for cell in mine)),
                    tasks=mine[0].tasks,
                    samples=1 if role == "ruler" else 4,
                    seeds=(PILOT_SEED,),
                    methods={"lsa": mine[0].methods["lsa"]},
                )
            )
    return tuple(found)
