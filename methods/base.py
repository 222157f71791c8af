"""The contract of a cache method: a residency (what is physically on the device) and a read (what a query attends to).

Shapes: B batch (1), S new tokens, T cached tokens, Q query heads, H KV heads, D head size, M hidden size.
``methods`` never imports ``harness``: the model reaches a method only through the arguments below.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from kvscope.errors import UsageError
from kvscope.methods.call import AttentionCall, Rotation
from kvscope.methods.kv_format import KvFormat
from kvscope.methods.options import canonical_label, effective_values
from kvscope.methods.shape import Footprint, ModelShape, tensor_bytes
from kvscope.results.schema import SavingKind

if TYPE_CHECKING:
    import torch

    from kvscope.methods.joined import Read
    from kvscope.methods.step_batch import StepReads
    from kvscope.methods.step_counters import StepCounters
    from kvscope.methods.store import PromptKV

__all__ = [
    "AttentionCall",
    "CacheMethod",
    "Collector",
    "Footprint",
    "ModelShape",
    "Rehearsal",
    "Residency",
    "Rotation",
    "SavingKind",
    "SequenceCache",
    "union_collectors",
]

ConfigT = TypeVar("ConfigT")
ShapeT = TypeVar("ShapeT", bound="ModelShape | None")


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """A decode of the same prompt that goes before the one that is measured.

    Attributes:
        method: what it runs under.
        learnt: returns, once it has ended, what the measured decode runs under.
    """

    method: CacheMethod[Any]
    learnt: Callable[[], CacheMethod[Any]]


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


class Collector(ABC):
    """Reads K, V and hidden states of one layer as the shared prefill passes, and leaves one metadata tensor.

    Attributes:
        name: what it collects, with its settings (``"chunk_mean_64"``); collectors of equal name and layer run once.
        layer: the layer it listens to.
        unrotated_keys: K comes with the layer's rotation undone.
        hears_attention: it goes by queries, too, and ``attention`` is called.
    """

    name: str
    layer: int
    unrotated_keys: bool = False
    hears_attention: bool = False

    def begin(self, n_tokens: int) -> None:  # noqa: B027 - most collectors do the same at any length
        """Learn the prompt's length before its first chunk: settings may depend on it."""

    def attention(self, call: AttentionCall, *, start_tokens: int) -> None:  # noqa: B027 - most go by keys alone
        """Take the queries of the next chunk, before ``chunk``, where ``hears_attention``.

        Args:
            call: of one prompt: queries [1, Q, S, D], rotation applied; K and V of every token up to the chunk's last.
            start_tokens: position of the chunk's first token.
        """

    @abstractmethod
    def chunk(self, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, hidden_BSM: torch.Tensor, *, start_tokens: int) -> None:
        """Take the next chunk of the prompt, beginning at token ``start_tokens``.

        K comes as the cache holds it, rotation applied, unless ``unrotated_keys``.
        """

    @abstractmethod
    def finish(self) -> torch.Tensor:
        """Return the metadata tensor: on the device the chunks were on or, what grows with the prompt, in host memory.

        A prompt of no tokens had no chunk: the tensor is empty then, of any shape.
        """


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


class CacheMethod(ABC, Generic[ConfigT]):
    """A cache method with its frozen options. One object serves a whole run.

    Class attributes:
        name: the registry name.
        stays: one clause, what stays on the GPU.
        saves: one clause, what that saves and what it does not.
        source: the citation.
        cost: bytes resident and read, as a formula in text.
        saving_kind: ``resident`` (nothing leaves the device), ``freed`` or ``offloaded`` (to pinned host memory).
        reads: one clause, what one query attends to, and what it reads beside that to choose.
        reads_vary: whether the reads of a step depend on the data; ``predict`` gives the most they can be then.
        budget_sets_window: whether a byte budget sizes the recency window (else it buys something beside it).
        needs_training: what has to be trained for a model, in two words; ``no`` where nothing has.
        through_decode: whether what a query reads is chosen anew while decoding; else it is fixed when the prompt ends.
        kv_refusal: why the method's store cannot be packed (``kv=int8``), as a clause; empty where it can.
        paper_options: what ``--paper-settings`` sets the automatic options to.
        spans_devices: whether it keeps what is of a layer on that layer's device (``ModelShape.device_of``), so that
            it runs on a model whose layers are on several.
        Config: frozen dataclass of the options, with defaults, validated in ``__post_init__``.
    """

    name: ClassVar[str]
    stays: ClassVar[str]
    saves: ClassVar[str]
    source: ClassVar[str]
    cost: ClassVar[str]
    saving_kind: ClassVar[SavingKind]
    reads: ClassVar[str] = "every resident token"
    reads_vary: bool = False
    budget_sets_window: ClassVar[bool] = True
    needs_training: ClassVar[str] = "no"
    through_decode: ClassVar[bool] = False
    kv_refusal: ClassVar[str] = "its store was written for K and V at the model's precision"
    paper_options: ClassVar[Mapping[str, Any]] = {}
    spans_devices: ClassVar[bool] = False
    Config: ClassVar[type[Any]]

    #: Format of the store, the option ``kv`` of every method; None: the model's dtype.
    kv: KvFormat | None = None

    def __init__(self, config: ConfigT | None = None, *, label: str | None = None) -> None:
        self.config: ConfigT = self.Config() if config is None else config
        self.label = label or canonical_label(self.name, self.config)

    @property
    def kind(self) -> type[Any]:
        """The class that makes it what it is."""
        return type(self)

    def use_kv(self, kv: KvFormat) -> None:
        """Store in this format; asked once, before anything is opened.

        Raises:
            UsageError: nothing of this method, or of one with these options, can be stored so.
        """
        if refusal := self.kv_refusal or self.kv_refusal_of_options():
            raise UsageError(f"Method '{self.name}' cannot store kv={kv.name}: {refusal}; leave kv out.")
        self.kv = kv

    def kv_refusal_of_options(self) -> str:
        """Return why the store cannot be packed with the options as they are, as a clause; empty where it can."""
        return ""

    def stored(self, shape: ShapeT) -> ShapeT:
        """Return the shape with the format this method's store has: bytes are counted by it."""
        return shape if self.kv is None or shape is None or shape.kv is not None else replace(shape, kv=self.kv)

    @property
    def recalls_raw_pages(self) -> bool:
        """Whether the prompt's own pages are what it recalls; else they are of no use once it is opened."""
        return self.saving_kind == "offloaded" and self.kv is None

    def stored_prompt(self, prompt: PromptKV) -> PromptKV:
        """Return the prompt as this method opens it: the same pages, a shape that says how they are to be stored."""
        return prompt.stored_as(self.stored(prompt.shape))

    def unsupported_kv(self, shape: ModelShape, device: torch.device | str) -> list[str]:
        """Return every reason why the store cannot have this method's format on this model; part of ``unsupported``."""
        if self.kv is None:
            return []
        return self.stored(shape).packing().unsupported()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.label})"

    @classmethod
    def shipped_indexers(cls) -> list[str]:
        """Return the trained indexers that come with kvscope: name, model and settings of each in one phrase."""
        return []

    def require(self, shape: ModelShape) -> None:
        """Check that what the user asked for exists for this model; asked once, before anything runs.

        Raises:
            UsageError: a trained part is missing or belongs to another model.
        """

    def trained_part(self, shape: ModelShape) -> str | None:
        """Return the hash of the trained files that choose on this model; None where none do, or none are there.

        A run folder keeps it: files changed in place make other rows.
        """
        del shape
        return None

    def trained_prompts(self, shape: ModelShape) -> str | None:
        """Return what the prompts were, in words, that the trained part learnt from; None where that is not known."""
        del shape
        return None

    def unsupported(self, shape: ModelShape, device: torch.device | str) -> list[str]:
        """Return every reason why the method cannot run on this model and device; empty when it can."""
        return self.unsupported_kv(shape, device)

    def observed_layers(self, shape: ModelShape) -> tuple[int, ...]:
        """Return the layers whose entering hidden states ``observe`` wants at each step."""
        del shape
        return ()

    def collectors(self, layer: int) -> list[Collector]:
        """Return fresh collectors for one prompt at one managed layer."""
        del layer
        return []

    def at(self, n_tokens: int, shape: ModelShape) -> CacheMethod[Any]:
        """Return the method with its budget for a prompt of ``n_tokens``: itself, but where a share sets that."""
        del n_tokens, shape
        return self

    @abstractmethod
    def predict(self, shape: ModelShape, n_tokens: int, n_new_tokens: int = 0) -> Footprint:
        """Return the footprint after a prompt of ``n_tokens`` and ``n_new_tokens`` decode steps."""

    @abstractmethod
    def is_noop(self, n_tokens: int, shape: ModelShape | None = None) -> bool:
        """Return whether, at opening, everything stays resident and is read. ``dense`` is one by definition."""

    @abstractmethod
    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        """Return the options as they act on a prompt of ``n_tokens``: automatic values filled in.

        ``shape`` is needed only where a budget is given in bytes.
        """

    @abstractmethod
    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> SequenceCache:
        """Start a sequence from a prefilled prompt. Cheap and repeatable: a fork is ``open`` again.

        Args:
            prompt: read only; nothing in it changes.
            device: where the resident set lives; of a model on several (``prompt.shape.devices``) what is of no layer.
            reserve_tokens: decode steps to preallocate for; past them storage grows page by page.
        """

    def rehearsal(self) -> Rehearsal | None:
        """Return a fresh decode that has to go before each measured one; None where the prompt is enough.

        A method that has one cannot be opened without it.
        """
        return None

    def kv_values(self) -> dict[str, Any]:
        """Return the format of the store as a row's ``config`` holds it; empty where it is the model's dtype."""
        return {} if self.kv is None else {"kv": self.kv.name}

    def describe(self) -> dict[str, Any]:
        """Return what reports print about the method: label, name, options, and the texts above."""
        return {
            "label": self.label,
            "name": self.name,
            "options": effective_values(self.config) | self.kv_values(),
            "stays": self.stays,
            "saves": self.saves,
            "source": self.source,
            "cost": self.cost,
            "saving_kind": self.saving_kind,
        }


def union_collectors(methods: Iterable[CacheMethod[Any]], layers: Sequence[int]) -> list[Collector]:
    """Return the collectors a sweep's methods ask for, each (name, layer) once."""
    found: dict[tuple[str, int], Collector] = {}
    for method in methods:
        for layer in layers:
            for collector in method.collectors(layer):
                found.setdefault((collector.name, collector.layer), collector)
    return list(found.values())


def _clone_stock(state: Any, device: torch.device) -> Any:
    """Copy one stock cache layer; its K and V are cut to what it keeps, not to the storage they are a view of."""
    clone = copy.copy(state)
    if state.is_initialized:
        clone.keys = state.keys.to(device, copy=True).contiguous()
        clone.values = state.values.to(device, copy=True).contiguous()
    return clone
