"""How many blocks one query of a block-sparse method reads, and how large they are. No torch."""

from dataclasses import dataclass
from math import log2

from kvscope.methods.shape import ModelShape

SHORT_CONTEXT_FRACTION = 16
SHORT_CONTEXT_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """Blocks as they act on one prompt.

    Attributes:
        block_tokens: tokens of a block; block ``i`` holds tokens ``i * block_tokens`` and on, from the prompt's start.
        n_blocks: blocks one query reads, the current one (the query's own, maybe partly filled) included.
        whole_tokens: a context of up to this many tokens is read whole: a budget that was given holds it, even where it
            ends inside a block.
    """

    block_tokens: int
    n_blocks: int
    whole_tokens: int = 0

    @property
    def budget_tokens(self) -> int:
        """Tokens read when the current block is full."""
        return self.block_tokens * self.n_blocks

    def count(self, n_tokens: int) -> int:
        """Blocks that ``n_tokens`` begin."""
        return -(-n_tokens // self.block_tokens)

    def reads_all(self, n_tokens: int) -> bool:
        """Whether the query at the end of ``n_tokens`` has no more blocks, or no more tokens, than it may read."""
        return self.count(n_tokens) <= self.n_blocks or n_tokens <= self.whole_tokens

    def tail_tokens(self, n_tokens: int) -> int:
        """Tokens of the current block, of ``n_tokens`` in all (at least one)."""
        return n_tokens - (self.count(n_tokens) - 1) * self.block_tokens


def default_budget_tokens(n_tokens: int, paper_tokens: int) -> int:
    """Return the budget unless told: min(the paper's, max(128, n_tokens / 16)).

    The papers' 2,048 tokens are reached at 32K. Below, they would be a quarter of the context or all of it, and a
    method that reads all of it is dense by another name; a sixteenth is the share at 32K.
    """
    return min(paper_tokens, max(SHORT_CONTEXT_TOKENS, n_tokens // SHORT_CONTEXT_FRACTION))


def plan_blocks(
    n_tokens: int,
    *,
    paper_block_tokens: int,
    paper_budget_tokens: int,
    block_tokens: int | None,
    budget_tokens: int | None,
) -> BlockPlan:
    """Return the blocks of a prompt of ``n_tokens``; None is automatic.

    An automatic block keeps the paper's number of blocks read: it is the paper's size, or a power of two below it, the
    nearest one that fills the budget with as many blocks. A budget that was given is never exceeded; an automatic one
    is rounded to whole blocks. Two blocks are read at least, the current one and one chosen.
    """
    automatic = budget_tokens is None
    budget = default_budget_tokens(n_tokens, paper_budget_tokens) if budget_tokens is None else budget_tokens
    if block_tokens is None:
        power = log2(max(1, budget * paper_block_tokens / paper_budget_tokens))
        block_tokens = min(paper_block_tokens, 2 ** (round(power) if automatic else int(power)))
    n_blocks = round(budget / block_tokens) if automatic else budget // block_tokens
    return BlockPlan(block_tokens=block_tokens, n_blocks=max(2, n_blocks), whole_tokens=0 if automatic else budget)


def check_blocks(block_tokens: int | None, budget_tokens: int | None) -> None:
    """Raise ValueError when a size is out of range or the budget does not hold the current block and another."""
    if block_tokens is not None and block_tokens < 1:
        raise ValueError(f"block_tokens must be 1 or more, got {block_tokens}")
    if budget_tokens is not None and budget_tokens < 2 * (block_tokens or 1):
        block = "" if block_tokens is None else f" of block_tokens={block_tokens}"
        raise ValueError(
            f"budget_tokens={budget_tokens} does not hold the current block and one more{block}; raise the budget or "
            "set block_tokens lower"
        )


def layer_token_bytes(shape: ModelShape) -> int:
    """Return the bytes of one token's K and V in one layer and one KV head."""
    return 2 * shape.head_dim * shape.element_bytes


def layer_token_flops(shape: ModelShape) -> int:
    """Return the FLOPs of QK^T and PV over one token in one layer and one KV head: all query heads of its group."""
    return 4 * (shape.n_q_heads // shape.n_kv_heads) * shape.head_dim
