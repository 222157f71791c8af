"""A prompt nobody prefilled: pages of random numbers, for bytes and times at lengths whose prefill is not the question.

Every byte is as a prefill would leave it: pages in host memory, pinned for a GPU, and each method's metadata, made by
its own collectors from these keys. Only the values mean nothing, and rows say ``prefill = synthetic``.

A method that recalls from the host needs the whole mirror, which is built. One that keeps what it wants on the device
needs no mirror afterwards, so its layers share one layer's pages, each beginning one page further on.

Shapes: as ``kvscope.harness.engine.prefill``.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable

import torch

from kvscope.errors import UsageError
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.harness.engine.prefill import DEFAULT_CHUNK_TOKENS, check_host_bytes, synchronize
from kvscope.methods.base import AttentionCall, Collector
from kvscope.methods.pinned import empty_mapped, lock
from kvscope.methods.shape import ModelShape
from kvscope.methods.store import PromptKV, page_shape

#: Random pages drawn; they repeat, each repetition scaled a little differently. A prime: no chunk size divides it.
BLOCK_PAGES = 251


def synthetic_host_bytes(shape: ModelShape, n_tokens: int, *, mirror: bool) -> int:
    """Return the host bytes of a synthetic prompt."""
    whole_bytes = shape.paged_kv_bytes(n_tokens)
    if mirror:
        return whole_bytes
    page_bytes = shape.page_tokens * shape.layer_bytes_per_token
    return (shape.pages(n_tokens) + len(shape.layers) - 1) * page_bytes


@torch.inference_mode()
def synthetic_prompt(
    loaded: LoadedModel,
    n_tokens: int,
    *,
    mirror: bool,
    collectors: Iterable[Collector] = (),
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    seed: int = 0,
) -> PromptKV:
    """Return a prompt of ``n_tokens`` whose K, V and hidden states are random.

    Args:
        loaded: the model.
        n_tokens: prompt tokens; at least one.
        mirror: whether every layer gets pages of its own, as a method that recalls from the host needs.
        collectors: as for a prefill; keys count as unrotated, being random either way.
        chunk_tokens: tokens handed to a collector at once; whole pages.
        seed: of the values.

    Raises:
        UsageError: a prompt longer than the model takes, or a cache of more than pages.
        HostMemoryShort: the host pages do not fit the host's memory.
        MemoryError: they cannot be mapped or locked.
    """
    shape = loaded.shape
    gap = loaded.backend.synthetic_gap(shape)
    if gap is not None:
        raise UsageError(f"Model '{loaded.name}' has {gap} not filled with synthetic values: leave out kv=synthetic.")
    if not 0 < n_tokens < loaded.max_length_tokens:
        raise UsageError(
            f"A prompt of {n_tokens} tokens does not fit model '{loaded.name}', which takes {loaded.max_length_tokens}."
        )
    check_host_bytes(synthetic_host_bytes(shape, n_tokens, mirror=mirror), n_tokens)
    started_s = time.perf_counter()
    pages = _mirror_pages(loaded, n_tokens, seed) if mirror else _shared_pages(loaded, n_tokens, seed)
    draws = torch.Generator(device=loaded.device).manual_seed(seed)
    hidden_SM = torch.randn(
        (min(chunk_tokens, n_tokens), shape.hidden_size), dtype=loaded.dtype, device=loaded.device, generator=draws
    )
    prompt = PromptKV(
        shape=shape,
        n_tokens=n_tokens,
        pages=pages,
        dtype=loaded.dtype,
        last_hidden={layer: hidden_SM[-1:].clone() for layer in range(shape.n_layers)},
        seed=seed,
        prompt_sha256=hashlib.sha256(f"synthetic {n_tokens} {seed}".encode()).hexdigest(),
    )
    for collector in collectors:
        device = shape.device_of(collector.layer, loaded.device)
        _feed(collector, prompt, hidden_SM.to(device), chunk_tokens=chunk_tokens)
    synchronize(loaded)
    prompt.prefill_s = time.perf_counter() - started_s
    return prompt


def _mirror_pages(loaded: LoadedModel, n_tokens: int, seed: int) -> dict[int, torch.Tensor]:
    shape = loaded.shape
    block = _block(loaded, seed)
    found = {}
    for index, layer in enumerate(shape.layers):
        pages = _empty(loaded, shape.pages(n_tokens))
        _fill(pages, block, first=index)
        _zero_tails(pages[-1:], n_tokens)
        _lock(loaded, pages)
        found[layer] = pages
    return found


def _shared_pages(loaded: LoadedModel, n_tokens: int, seed: int) -> dict[int, torch.Tensor]:
    shape = loaded.shape
    n_pages, n_layers = shape.pages(n_tokens), len(shape.layers)
    pages = _empty(loaded, n_pages + n_layers - 1)
    _fill(pages, _block(loaded, seed), first=0)
    _zero_tails(pages[n_pages - 1 :], n_tokens)
    _lock(loaded, pages)
    return {layer: pages[index : index + n_pages] for index, layer in enumerate(shape.layers)}


def _block(loaded: LoadedModel, seed: int) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(page_shape(loaded.shape, BLOCK_PAGES), generator=draws).to(loaded.dtype)


def _empty(loaded: LoadedModel, n_pages: int) -> torch.Tensor:
    size = page_shape(loaded.shape, n_pages)
    return empty_mapped(size, dtype=loaded.dtype)


def _lock(loaded: LoadedModel, pages: torch.Tensor) -> None:
    if loaded.device.type == "cuda":
        lock(pages)


def _fill(pages: torch.Tensor, block: torch.Tensor, *, first: int) -> None:
    """Write the block over and over, one pass over the memory; ``first`` makes layers differ."""
    for repetition, start in enumerate(range(0, len(pages), len(block))):
        part = pages[start : start + len(block)]
        torch.mul(block[: len(part)], 1.0 + ((repetition + first) % 64) / 64, out=part)


def _zero_tails(pages: torch.Tensor, n_tokens: int) -> None:
    used = n_tokens % pages.shape[3]
    if used:
        pages[:, :, :, used:] = 0


def _feed(collector: Collector, prompt: PromptKV, hidden_SM: torch.Tensor, *, chunk_tokens: int) -> None:
    """Let a collector hear its layer's keys and values, chunk by chunk, as in a prefill.

    Of attention it hears the last chunk: over random keys the rest says nothing, and would take as long as a prefill.
    """
    shape, P = prompt.shape, prompt.shape.page_tokens
    pages = prompt.pages[collector.layer]
    collector.begin(prompt.n_tokens)
    for start in range(0, prompt.n_tokens, chunk_tokens):
        end = min(start + chunk_tokens, prompt.n_tokens)
        part = pages[start // P : -(-end // P)].to(hidden_SM.device)
        k_BHSD, v_BHSD = (_tokens(part, i, end - start) for i in (0, 1))
        if end == prompt.n_tokens and collector.hears_attention:
            whole = pages[: -(-end // P)].to(hidden_SM.device)
            draws = torch.Generator(device=whole.device).manual_seed(prompt.seed)
            size = (1, shape.n_q_heads, end - start, shape.head_dim)
            call = AttentionCall(
                query=torch.randn(size, dtype=whole.dtype, device=whole.device, generator=draws),
                key=_tokens(whole, 0, end),
                value=_tokens(whole, 1, end),
                scale=shape.head_dim**-0.5,
            )
            collector.attention(call, start_tokens=start)
        collector.chunk(k_BHSD, v_BHSD, hidden_SM[None, : end - start], start_tokens=start)
    prompt.metadata.setdefault(collector.name, {})[collector.layer] = collector.finish()


def _tokens(pages: torch.Tensor, kind: int, n_tokens: int) -> torch.Tensor:
    """Return K (kind 0) or V (1) of the first tokens of pages [S, H, 2, P, D], as [1, H, n_tokens, D]."""
    return pages[:, :, kind].transpose(0, 1).flatten(1, 2)[None, :, :n_tokens]
