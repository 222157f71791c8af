"""The stock DeepSeek-V4 cache with its CSA entries and indexer keys in host memory, and some of them on the device.

Both tensors of a CSA layer are trimmed to the same entries, so the model's own top-k acts inside the resident set. That
is exact for one query at a time: every entry it holds lies in the past, and positions come from counts that do not
change (a longer query would need to know which entry is which).

Shapes: B batch (1), n entries of the prompt, D head size, E indexer key size.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache, DeepseekV4HCACache

from kvscope.methods.compressed_bytes import KINDS
from kvscope.methods.kernels.host_gather.gather import HostGather, gather_backend
from kvscope.methods.shape import tensor_bytes

NAMES = ("compressor", "indexer")
_PROGRAMS = 512
"""Of the kernel that recalls: an entry is small, and nothing else runs meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """How one resident set becomes another, found once for all layers.

    Attributes:
        n_old: entries of the set before.
        entries: of the set behind, ascending, on the CPU.
        stay_from, stay_to: places of what is in both, in the old set and in the new one.
        missing, missing_to, n_missing: entries to recall, their places and their number [1], int32 on the device.
    """

    n_old: int
    entries: torch.Tensor
    stay_from: torch.Tensor
    stay_to: torch.Tensor
    missing: torch.Tensor
    missing_to: torch.Tensor
    n_missing: torch.Tensor

    @property
    def is_none(self) -> bool:
        """Whether both sets are one."""
        return len(self.missing) == 0 and self.n_old == len(self.entries)

    @classmethod
    def between(cls, old: torch.Tensor, new: torch.Tensor, device: torch.device) -> "Change":
        """Compare two sets, ascending and on the CPU."""
        where = torch.searchsorted(old, new)
        stays = torch.zeros(len(new), dtype=torch.bool)
        if len(old):
            stays = old[where.clamp_max(len(old) - 1)] == new
        missing_to = (~stays).nonzero()[:, 0]
        return cls(
            n_old=len(old),
            entries=new,
            stay_from=where[stays].to(device),
            stay_to=stays.nonzero()[:, 0].to(device),
            missing=new[missing_to].int().to(device),
            missing_to=missing_to.int().to(device),
            n_missing=torch.tensor([len(missing_to)], dtype=torch.int32, device=device),
        )


class ResidentCSA(DeepseekV4CSACache):  # type: ignore[misc]  # transformers is untyped
    """A CSA layer whose prompt entries live on the host; chosen ones and all that are decoded are on the device.

    ``compressed_kv`` are views of preallocated buffers: first the resident entries of the prompt, then decoded ones.

    Attributes:
        reserved: decoded entries that a buffer has room for behind the resident ones.
        spare_share: None: a buffer has room for exactly what is resident. Else it stays where it is as long as the
            resident entries fit, and has room for this share more where they do not.
    """

    # transformers registers a subclass under this name for every model; this one is for kvscope's caches alone.
    _layer_type = None
    host: Mapping[str, torch.Tensor]
    resident: torch.Tensor
    buffers: dict[str, torch.Tensor]
    reserved: int
    spare_share: float | None

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
        layer.reserved, layer.spare_share = reserve_entries, None
        layer.buffers = {
            name: entries.new_zeros((entries.shape[0], reserve_entries, entries.shape[2]), device=device)
            for name, entries in host.items()
        }
        for name in NAMES:
            layer.compressed_kv[name] = layer.buffers[name][:, :0]
        return layer

    def set_resident(self, entries: torch.Tensor) -> int:
        """Make exactly these prompt entries resident: ascending, on the CPU; return the bytes copied from the host."""
        return self.change(Change.between(self.resident, entries, self.buffers[NAMES[0]].device))

    def change(self, change: "Change") -> int:
        """Make another set resident; what was resident already does not cross the bus again.

        A layer's old and new set exist at once while it is changed. Where both are of one size the buffer stays.

        Args:
            change: from the set that is resident now. All layers of a sequence share it.

        Returns:
            Bytes copied from the host.
        """
        if change.is_none:
            return 0
        n_old, n_new, copied_bytes = change.n_old, len(change.entries), 0
        for name in NAMES:
            old, host = self.buffers[name], self.host[name]
            n_held = self.compressed_kv[name].shape[1] - n_old + n_new
            # Decoded entries past the reserve stand in what is spare.
            self.reserved = max(self.reserved, n_held - n_new)
            new = old.new_zeros((old.shape[0], self._room(n_new, old.shape[1]), old.shape[2]))
            new[:, n_new:n_held] = old[:, n_old : n_held - n_new + n_old]
            new[:, change.stay_to] = old[:, change.stay_from]
            if len(change.missing):
                mirror, slots = _units(host), _units(new)
                recall = HostGather(mirror, slots, backend=gather_backend(mirror, slots), n_programs=_PROGRAMS)
                recall(change.missing, change.missing_to, change.n_missing)
            copied_bytes += len(change.missing) * host.shape[2] * host.element_size()
            if new.shape == old.shape:
                old.copy_(new)
            else:
                self.buffers[name] = new
            self.compressed_kv[name] = self.buffers[name][:, :n_held]
        self.resident = change.entries
        return copied_bytes

    def _room(self, n_resident: int, held: int) -> int:
        """Return the entries that a buffer of ``held`` is to have room for with another resident set."""
        needed = n_resident + self.reserved
        if self.spare_share is None:
            return needed
        return held if needed <= held else needed + math.ceil(self.spare_share * n_resident)

    def keep_buffers(self, spare_share: float, *, reserve_entries: int) -> None:
        """Let the buffers stay where they are from here on, with room for at least these decoded entries.

        Args:
            spare_share: see the class.
        """
        self.spare_share, self.reserved = spare_share, max(self.reserved, reserve_entries)
        n_resident = len(self.resident)
        room = n_resident + self.reserved + math.ceil(spare_share * n_resident)
        for name in NAMES:
            self._move(name, room)

    def grow(self, n_entries: int) -> None:
        """Give the buffers room for more decoded entries: they move."""
        self.reserved += n_entries
        for name in NAMES:
            self._move(name, self.buffers[name].shape[1] + n_entries)

    def _move(self, name: str, room: int) -> None:
        held_BnD = self.compressed_kv[name]
        buffer = self.buffers[name]
        self.buffers[name] = buffer.new_zeros((buffer.shape[0], room, buffer.shape[2]))
        self.buffers[name][:, : held_BnD.shape[1]] = held_BnD
        self.compressed_kv[name] = self.buffers[name][:, : held_BnD.shape[1]]

    def count_entry(self) -> None:
        """An entry was written behind those that are held, by a step that does not count."""
        for name in NAMES:
            self.compressed_kv[name] = self.buffers[name][:, : self.compressed_kv[name].shape[1] + 1]
            self.entry_count[name] += 1

    def update_compressor_states(self, name: str, compressed: torch.Tensor) -> torch.Tensor:
        """Append decoded entries [B, 0 or 1, D or E] in place, return all on the device; counts as the stock does."""
        held, n_new = self.compressed_kv[name].shape[1], compressed.shape[1]
        if held + n_new > self.buffers[name].shape[1]:
            self.buffers[name] = torch.cat([self.buffers[name][:, :held], compressed], dim=1)
            self.reserved = held + n_new - len(self.resident)
        elif n_new:
            self.buffers[name][:, held : held + n_new] = compressed
        self.compressed_kv[name] = self.buffers[name][:, : held + n_new]
        self.entry_count[name] += n_new
        held_BnD: torch.Tensor = self.compressed_kv[name]
        return held_BnD


def _units(entries_BnD: torch.Tensor) -> torch.Tensor:
    """Return entries as the recall takes them, units of one token: [n, 1, 2, 1, D / 2]."""
    return entries_BnD.view(entries_BnD.shape[1], 1, 2, 1, -1)


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
