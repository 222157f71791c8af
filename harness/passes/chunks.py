"""How many tokens one forward of a prefill takes.

A small model on a GPU spends a prefill on launches: 16K tokens of the reference model took 168 ms in chunks of 2,048 on
an H200, and 26 ms in one.
"""

from typing import TYPE_CHECKING

from kvscope.harness.passes.config import CHUNK_TOKENS, RunConfig

if TYPE_CHECKING:
    from kvscope.harness.passes.facts import ModelFacts

_MOST_TOKENS = 16384
#: What the hidden states of a chunk on their way through a layer may take.
_MOST_BYTES = 2**29


def memory_chunk_tokens(config: RunConfig) -> int:
    """Return the chunk of the passes that measure memory: its peak follows the chunk."""
    return CHUNK_TOKENS if config.prefill_chunk_tokens is None else config.prefill_chunk_tokens


def accuracy_chunk_tokens(config: RunConfig, facts: "ModelFacts") -> int:
    """Return the chunk of the accuracy pass."""
    if config.prefill_chunk_tokens is not None:
        return config.prefill_chunk_tokens
    if not facts.device.startswith("cuda"):
        return CHUNK_TOKENS
    token_bytes = (8 * facts.shape.hidden_size + 3 * facts.intermediate_size) * facts.shape.element_bytes
    whole = _MOST_BYTES // token_bytes // CHUNK_TOKENS * CHUNK_TOKENS
    return max(CHUNK_TOKENS, min(_MOST_TOKENS, whole))
