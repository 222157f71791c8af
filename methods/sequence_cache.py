"""One sequence under one method: what is physically on the device, and what a query attends to.

Shapes: B batch (1), Q query heads, H KV heads, D head size, M hidden size.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from kvscope.methods.call import AttentionCall
from kvscope.methods.shape import Footprint, tensor_bytes

if TYPE_CHECKING:
    import torch

    from kvscope.methods.joined import Read
    from kvscope.methods.step_batch import StepReads
    from kvscope.methods.step_counters import StepCounters
    from kvscope.methods.store import PromptKV


@dataclass(frozen=True, kw_only=True)
class Residency:
    """How a resident set that changes while decoding behaved.

    Attributes:
        tau: decode steps between refreshes.
        prompt_tokens: tokens of the prompt.
        resident_tokens: prompt tokens on the device after each refresh, mean over layers.
        recalled_bytes: bytes copied host -> device for each refresh, the first filling included.
        hit_rate: share of the chunks chosen by later refreshes that were resident already; None without any.
        fallbacks: refreshes that made everything resident because too much was chosen (in each layer, where layers
            choose for themselves).
        indexer: name and hash of the trained indexer; None without one.
        indexer_tau: interval that indexer was trained for.
        indexer_bytes: of the indexer's weights on the device: like the model's, they serve every sequence and are in no
            footprint.
    """

    tau: int
    prompt_tokens: int
    resident_tokens: tuple[int, ...]
    recalled_bytes: tuple[int, ...]
    hit_rate: float | None
    fallbacks: int
    indexer: str | None = None
    indexer_tau: int | None = None
    indexer_bytes: int = 0


class SequenceCache(ABC):
    """One sequence under one method: prompt KV opened, decoded KV appended.

    The model's own sliding-window layers are cloned here at opening, so that a fork never sees another's tokens.

    Attributes:
        says_reads: whether ``reads`` stands for ``attend``: not in a class that attends otherwise than the one that it
            has ``reads`` from.
    """

    bytes_recalled: int = 0
    says_reads: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        owners = [next(k for k, each in enumerate(cls.__mro__) if name in vars(each)) for name in ("reads", "attend")]
        cls.says_reads = owners[0] <= owners[1]

    def __init__(self, prompt: PromptKV, device: torch.device) -> None:
        self.shape = prompt.shape
        self.device = device
        self._dtype = prompt.dtype
        self.stock: dict[int, Any] = {
            layer: _clone_stock(state, prompt.shape.device_of(layer, device)) for layer, state in prompt.stock.items()
        }

    @property
    @abstractmethod
    def n_tokens(self) -> int:
        """Logical length: prompt tokens and tokens fed since, kept or not."""

    @property
    def model_cache(self) -> Any:
        """The transformers cache the model is called with, where the sequence brings its own; else None."""
        return None

    def call_model(self, model: Any, **arguments: Any) -> Any:
        """Call the model for a step of this sequence, which brings its own cache; return what the model returns."""
        return model(**arguments)

    @property
    def static_version(self) -> int:
        """Changes when tensors of a fixed step moved, so that what was captured must be captured again."""
        return 0

    def backends(self) -> tuple[str, ...]:
        """Return what computes the method's own parts beside attention, one text each, for the row."""
        if self.shape.kv is None:
            return ()
        from kvscope.methods.kernels.dispatch import unsupported_packed

        n_heads = {"n_q_heads": self.shape.n_q_heads, "n_kv_heads": self.shape.n_kv_heads}
        reasons = unsupported_packed(self.device, dtype=self._dtype, packing=self.shape.packing(), **n_heads)
        name = f"pages packed as {self.shape.kv.name}"
        return (f"torch: {name} ({'; '.join(reasons)})",) if reasons else (f"triton: {name}",)

    def scored(self) -> torch.Tensor | None:
        """Return a scalar on the device that is not finite where a score that was chosen by is not; None: no scores."""
        return None

    def static_reasons(self) -> list[str]:
        """Return every reason why steps cannot run at fixed addresses, as a CUDA graph needs; empty when they can."""
        return ["the method's step depends on counts that only the host knows"]

    def make_static(self, counters: StepCounters) -> None:
        """From here on, run steps at fixed addresses: ``begin_step`` writes what changes, ``attend`` changes nothing
        that Python knows, ``end_step`` counts. Call it before the first step, and not with ``static_reasons``.

        Args:
            counters: where what changes is written; the caller sends it to the device.

        Raises:
            ValueError: the sequence has no such steps; the message gives ``static_reasons``.
        """
        raise ValueError(f"steps cannot run at fixed addresses: {'; '.join(self.static_reasons())}")

    def step_reads(self, layer: int) -> StepReads | None:
        """Return where a step of fixed addresses stores its token in a managed layer and what it reads there, so that
        many sequences attend in one launch; None: the sequence attends by itself.
        """
        del layer
        return None

    def begin_step(self) -> None:  # noqa: B027 - most methods choose at opening, or when attending
        """A token is about to be fed."""

    def end_step(self) -> None:  # noqa: B027 - most methods count in attend
        """A token has been fed."""

    def observe(self, layer: int, hidden_BM: torch.Tensor) -> None:  # noqa: B027 - most methods choose without it
        """Take the hidden state of the current token as it enters ``layer`` (only layers the method asked for)."""

    def reads(self, layer: int, call: AttentionCall) -> tuple[Read, ...] | None:
        """Store the new token's K and V and return what its query attends to, so that the sequences of a step attend
        together; None: nothing was stored, and the sequence attends by itself.

        Args:
            layer, call: as of ``attend``, in whose place it is called where ``says_reads``.
        """
        del layer, call
        return None

    @abstractmethod
    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        """Store the new token's K and V, then attend, that token included.

        Args:
            layer: a managed layer; layers come in order, each once a step.
            call: of this sequence alone and one token: query [1, Q, 1, D], key and value [1, H, 1, D].

        Returns:
            [1, Q, 1, D], in the dtype of the query.
        """

    @abstractmethod
    def managed_footprint(self) -> Footprint:
        """Exact bytes of the live tensors of the managed layers, now."""

    def footprint(self) -> Footprint:
        """Exact bytes of every live cache tensor of this sequence, the model's own sliding layers included."""
        kv_bytes = sum(tensor_bytes((state.keys, state.values)) for state in self.stock.values())
        stock = Footprint(
            kv_bytes=kv_bytes,
            bytes_read_per_step=self.shape.stock_read_bytes(self.n_tokens),
            attention_flops_per_step=self.shape.stock_attention_flops(self.n_tokens),
        )
        return self.managed_footprint() + stock

    def bytes_by_kind(self) -> dict[str, int] | None:
        """Return ``footprint().kv_bytes`` by kind of entry; None where K and V of tokens are all there is."""
        return None

    def residency(self) -> Residency | None:
        """Return how the resident set changed; None where it is fixed at opening."""
        return None

    def close(self) -> None:
        """Drop every tensor. A subclass drops its own, then calls this."""
        for state in self.stock.values():
            # Whoever still holds the layer (the cache the model was called with) must not keep its tensors.
            state.keys = state.values = None
        self.stock.clear()


def _clone_stock(state: Any, device: torch.device) -> Any:
    """Copy one stock cache layer; its K and V are cut to what it keeps, not to the storage they are a view of."""
    clone = copy.copy(state)
    if state.is_initialized:
        clone.keys = state.keys.to(device, copy=True).contiguous()
        clone.values = state.values.to(device, copy=True).contiguous()
    return clone
