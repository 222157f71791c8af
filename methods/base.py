"""The contract of a cache method: a residency (what is physically on the device) and a read (what a query attends to).

A method opens a ``SequenceCache`` of a prompt, whose prefill its ``Collector`` objects listened to.
``methods`` never imports ``harness``: the model reaches a method only through the arguments below.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from kvscope.errors import UsageError
from kvscope.methods.call import AttentionCall, Rotation
from kvscope.methods.collector import Collector
from kvscope.methods.kv_format import KvFormat
from kvscope.methods.options import canonical_label, effective_values
from kvscope.methods.sequence_cache import Residency, SequenceCache
from kvscope.methods.shape import Footprint, ModelShape
from kvscope.results.schema import SavingKind

if TYPE_CHECKING:
    import torch

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
