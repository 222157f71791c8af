"""The stock DeepSeek-V4 cache with its CSA entries and indexer keys in host memory, and some of them on the device.

Both tensors of a CSA layer are trimmed to the same entries, so the model's own top-k acts inside the resident set. That
is exact for one query at a time: every entry it holds lies in the past, and positions come from counts that do not
change (a longer query would need to know which entry is which).

Shapes: B batch (1), n entries of the prompt, D head size, E indexer key size.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import DynamicCache
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache, DeepseekV4HCACache

from kvscope.methods.compressed_bytes import KINDS
from kvscope.methods.shape import tensor_bytes

NAMES = ("compressor", "indexer")


class ResidentCSA(DeepseekV4CSACache):  # type: ignore[misc]  # transformers is untyped
    """A CSA layer whose prompt entries live on the host; chosen ones and all that are decoded are on the device.

    ``compressed_kv`` are views of preallocated buffers: first the resident entries of the prompt, then decoded ones.
    """

    # transformers registers a subclass under this name for every model; this one is for kvscope's caches alone.
    _layer_type = None
    host: Mapping[str, torch.Tensor]
    resident: torch.Tensor
    buffers: dict[str, torch.Tensor]

    @classmethod
    def opened(
        cls,
        stock: DeepseekV4CSACache,
        host: Mapping[str, torch.Tensor],
        device: torch.device,
        *,
        reserve_entries: int = 0,
    ) -> "ResidentCSA":
        """Take over a prefilled layer's state with nothing of its entries resident.

        Args:
            stock: not changed; its tensors are copied.
            host: name -> all entries of the prompt [B, n, D or E], shared and read only.
            device: where the resident entries go.
            reserve_entries: decoded ones to preallocate for.
        """
        layer = cls.__new__(cls)
        layer.__dict__.update(_copied(stock, device))
        layer.host = host
        layer.resident = torch.empty(0, dtype=torch.long)
        layer.buffers = {
            name: entries.new_zeros((entries.shape[0], reserve_entries, entries.shape[2]), device=device)
            for name, entries in host.items()
        }
        for name in NAMES:
            layer.compressed_kv[name] = layer.buffers[name][:, :0]
        return layer

    def set_resident(self, entries: torch.Tensor) -> int:
        """Make exactly these prompt entries resident; what was resident already does not cross the bus again.

        A layer's old and new set exist at once while it is changed. Where both are of one size the buffer stays.

        Args:
            entries: ascending, on the CPU.

        Returns:
            Bytes copied from the host.
        """
        n_old, n_new = len(self.resident), len(entries)
        where = torch.searchsorted(self.resident, entries)
        stays = torch.zeros(n_new, dtype=torch.bool)
        if n_old:
            stays = self.resident[where.clamp_max(n_old - 1)] == entries
        if n_new == n_old and stays.all():
            return 0
        copied_bytes = 0
        for name in NAMES:
            old = self.buffers[name]
            n_held = self.compressed_kv[name].shape[1] - n_old + n_new
            new = old.new_zeros((old.shape[0], old.shape[1] - n_old + n_new, old.shape[2]))
            new[:, n_new:] = old[:, n_old:]
            new[:, stays.nonzero()[:, 0].to(old.device)] = old[:, where[stays].to(old.device)]
            recalled = self.host[name][:, entries[~stays]]
            new[:, (~stays).nonzero()[:, 0].to(old.device)] = recalled.to(old.device)
            copied_bytes += recalled.nbytes
            if n_new == n_old:
                old.copy_(new)
            else:
                self.buffers[name] = new
            self.compressed_kv[name] = self.buffers[name][:, :n_held]
        self.resident = entries
        return copied_bytes

    def update_compressor_states(self, name: str, compressed: torch.Tensor) -> torch.Tensor:
        """Append decoded entries [B, 0 or 1, D or E] in place, return all on the device; counts as the stock does."""
        held, n_new = self.compressed_kv[name].shape[1], compressed.shape[1]
        if held + n_new > self.buffers[name].shape[1]:
            self.buffers[name] = torch.cat([self.buffers[name][:, :held], compressed], dim=1)
        elif n_new:
            self.buffers[name][:, held : held + n_new] = compressed
        self.compressed_kv[name] = self.buffers[name][:, : held + n_new]
        self.entry_count[name] += n_new
        held_BnD: torch.Tensor = self.compressed_kv[name]
        return held_BnD


def take_entries(
    layer: DeepseekV4CSACache, like: Mapping[str, torch.Tensor], *, pinned: bool
) -> dict[str, torch.Tensor]:
    """Move a prefilled layer's entries and indexer keys to host memory (the mirror) and free them on the device.

    Args:
        like: name -> an empty tensor of the right width and type, for a layer that has not been called.
    """
    copies = {}
    for name in NAMES:
        held = layer.compressed_kv[name]
        held = like[name] if held is None else held
        mirror = torch.empty(held.shape, dtype=held.dtype, pin_memory=pinned)
        copies[name] = mirror.copy_(held)
        layer.compressed_kv[name] = None
    return copies


def move_rest(cache: DynamicCache, device: torch.device) -> None:
    """Move every tensor of a cache; a view of a larger tensor becomes its own, so that the rest is let go of."""
    for layer in cache.layers:
        layer.__dict__.update(_copied(layer, device))


def opened_cache(
    config: Any,
    prefilled: DynamicCache,
    host: Mapping[int, Mapping[str, torch.Tensor]],
    device: torch.device,
    *,
    reserve_entries: int,
) -> DynamicCache:
    """Return a cache for one sequence: CSA layers from the host with nothing resident, copies of the others."""
    cache = DynamicCache(config=config)
    layers: list[Any] = []
    for index, layer in enumerate(prefilled.layers):
        if index in host:
            layers.append(ResidentCSA.opened(layer, host[index], device, reserve_entries=reserve_entries))
        else:
            clone = copy.copy(layer)
            clone.__dict__.update(_copied(layer, device))
            layers.append(clone)
    cache.layers = layers
    return cache


def live_bytes(cache: DynamicCache) -> dict[str, int]:
    """Return the bytes of every live tensor of a cache by kind (``compressed_bytes.KINDS``)."""
    kinds: dict[str, list[torch.Tensor | None]] = {kind: [] for kind in KINDS}
    for layer in cache.layers:
        kinds["window"] += [layer.keys, layer.values]
        if isinstance(layer, DeepseekV4CSACache):
            kinds["csa_kv"].append(layer.compressed_kv["compressor"])
            kinds["indexer_keys"].append(layer.compressed_kv["indexer"])
            kinds["buffers"] += [*layer.overlap_kv.values(), *layer.overlap_gate.values()]
        elif isinstance(layer, DeepseekV4HCACache):
            kinds["hca_kv"].append(layer.compressed_kv["compressor"])
        if isinstance(layer, DeepseekV4HCACache):
            kinds["buffers"] += [*layer.buffer_kv.values(), *layer.buffer_gate.values()]
    return {kind: tensor_bytes(tensors) for kind, tensors in kinds.items()}


def _copied(layer: Any, device: torch.device) -> dict[str, Any]:
    """A layer's attributes with every tensor copied to its own size; K and V stay one tensor where they are."""

    def own(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, copy=True, memory_format=torch.contiguous_format)

    state = dict(vars(layer))
    for name, value in state.items():
        if isinstance(value, dict):
            state[name] = {key: own(item) for key, item in value.items()}
    if state.get("keys") is not None:
        shared = state["values"] is state["keys"]
        state["keys"] = own(state["keys"])
        state["values"] = state["keys"] if shared else own(state["values"])
        state["device"] = device
    return state


Angles = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""Position -> cosine and sine of the compressed layers' rotation, one a rotating pair."""
