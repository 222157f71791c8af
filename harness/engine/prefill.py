"""Prefill of a prompt, once for every method: what holds for any kind of cache. The rest is the backend's."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from kvscope.errors import HostMemoryShort, UsageError
from kvscope.harness.engine.host_memory import free_host_bytes
from kvscope.harness.engine.loaded import LoadedModel
from kvscope.methods.base import Collector
from kvscope.methods.shape import ModelShape
from kvscope.methods.store import PromptKV
from kvscope.units import format_bytes

DEFAULT_CHUNK_TOKENS = 2048


@torch.inference_mode()
def prefill(
    loaded: LoadedModel,
    ids: Sequence[int],
    *,
    collectors: Iterable[Collector] = (),
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    seed: int = 0,
) -> PromptKV:
    """Prefill a prompt densely.

    Args:
        loaded: the model.
        ids: the prompt tokens to prefill: all but those a method has to see as decode steps. May be empty.
        collectors: from ``union_collectors``; each hears its layer's K, V and hidden states, chunk by chunk.
        chunk_tokens: tokens of one forward; whole pages.
        seed: of the sample, kept for methods that draw.

    Returns:
        What the backend keeps of the prompt, in host memory; metadata, and the last token's hidden states.

    Raises:
        UsageError: a prompt longer than the model takes, or a chunk that is not whole pages.
        HostMemoryShort: the host pages do not fit the host's memory.
    """
    shape = loaded.shape
    if chunk_tokens < 1 or chunk_tokens % shape.page_tokens:
        raise UsageError(
            f"prefill_chunk_tokens must be a positive multiple of the page ({shape.page_tokens} tokens), "
            f"got {chunk_tokens}."
        )
    if len(ids) >= loaded.max_length_tokens:
        raise UsageError(
            f"A prompt of {len(ids)} tokens leaves no room in model '{loaded.name}', which takes "
            f"{loaded.max_length_tokens} tokens."
        )
    check_host_room(shape, len(ids))
    started_s = time.perf_counter()
    ids_N = torch.tensor(list(ids), dtype=torch.long)
    listeners: dict[int, list[Collector]] = {}
    for collector in collectors:
        collector.begin(len(ids))
        listeners.setdefault(collector.layer, []).append(collector)
    unmanaged = sorted(set(listeners) - set(shape.layers))
    if unmanaged:
        raise ValueError(f"collectors ask for layers {unmanaged}, which kvscope does not manage")
    prompt = loaded.backend.prefill(
        loaded,
        ids_N,
        listeners=listeners,
        chunk_tokens=chunk_tokens,
        seed=seed,
        prompt_sha256=hashlib.sha256(np.asarray(ids_N, dtype="<i8").tobytes()).hexdigest(),
    )
    for layer, layer_listeners in listeners.items():
        for collector in layer_listeners:
            prompt.metadata.setdefault(collector.name, {})[layer] = collector.finish()
    synchronize(loaded)
    prompt.prefill_s = time.perf_counter() - started_s
    return prompt


def synchronize(loaded: LoadedModel) -> None:
    """Wait for the GPUs that a model is on; nothing without one."""
    if loaded.device.type == "cuda":
        for device in {loaded.device, *map(torch.device, loaded.shape.devices)}:
            torch.cuda.synchronize(device)


def check_host_room(shape: ModelShape, n_tokens: int) -> None:
    """Refuse a prompt whose host pages do not fit, before the kernel has to end the process for it.

    Raises:
        HostMemoryShort: naming the bytes needed and the bytes free.
    """
    check_host_bytes(shape.paged_kv_bytes(n_tokens), n_tokens)


def check_host_bytes(need_bytes: int, n_tokens: int) -> None:
    """Refuse host pages of ``need_bytes`` for a prompt of ``n_tokens`` where they do not fit.

    Raises:
        HostMemoryShort: naming the bytes needed and the bytes free.
    """
    free_bytes = free_host_bytes()
    if need_bytes > free_bytes:
        raise HostMemoryShort(
            f"The host pages of a prompt of {n_tokens:,} tokens (the mirror that methods recall from) need "
            f"{format_bytes(need_bytes)} and {format_bytes(free_bytes)} of host memory is free: it would run out of "
            "memory. Take a shorter length, or a machine with more."
        )
