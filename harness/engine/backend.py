"""What the rest of the house asks of a kind of KV cache, and the table of which model has which.

Another kind of cache is one folder under ``harness/backends`` with a ``Backend`` in it, and one line in ``BACKENDS``.
A package outside the tree has the line as an entry point of the group ``kvscope.backends``:

    [project.entry-points."kvscope.backends"]
    my_model_type = "my_package.backend:MyBackend"

Nobody else tells kinds apart: a shape counts its own bytes, a form of a method opens its own prompt, and what is
neither is asked of the backend. No torch at import.

Shapes: N prompt tokens, B batch, M hidden size.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from kvscope.errors import UsageError
from kvscope.methods.at_share import AtShare
from kvscope.methods.base import CacheMethod, Collector
from kvscope.methods.shape import DEFAULT_PAGE_TOKENS, ModelShape

if TYPE_CHECKING:
    import torch

    from kvscope.harness.engine.rotation import RopeRotation, UnknownRotation
    from kvscope.methods.lsa.compressed import CompressedIndexer
    from kvscope.methods.store import PromptKV

BACKENDS: dict[str, str] = {
    "deepseek_v4": "kvscope.harness.backends.deepseek_v4.backend:DeepseekV4",
}
"""Model type of a transformers config -> its backend, as an import string that is resolved on use."""
PAGED = "kvscope.harness.backends.paged.backend:Paged"
"""The backend of every other model."""
ENTRY_POINTS = "kvscope.backends"

ShapeT = TypeVar("ShapeT", bound=ModelShape)


@dataclass(frozen=True, kw_only=True)
class ReadyModel:
    """A model as its backend made it ready to prefill and decode.

    Attributes:
        model: the transformers model, its attention switched to what the backend needs.
        shape: what the methods count with.
        device: of the embeddings: where tokens go in and logits come out. ``shape.devices`` says where the layers are,
            where they are on several.
        attention_backend: what computes attention, for the row.
        rotations: decoder layer -> its rotation, None without positions or where no method may ask for it.
    """

    model: Any
    shape: ModelShape
    device: torch.device
    dtype: torch.dtype
    attention_backend: str
    rotations: dict[int, RopeRotation | UnknownRotation | None]


class Backend(Protocol[ShapeT]):
    """One kind of KV cache. It has no state: one object serves any number of models.

    Class attributes:
        name: for messages.
        instead_of_tokens: what the cache keeps in place of K and V of single tokens, in two words; empty where it keeps
            these. What reads the attention over single tokens is refused elsewhere.
        packs_pages: whether its stores can be in fewer bits, as a method's ``kv=`` asks; else such methods are refused.
        spans_devices: whether layers may be on several devices, each one's cache beside it; else a map is refused.
        holds_one_sequence: whether a sequence brings the model's own cache, so that none steps with another.
    """

    name: ClassVar[str]
    instead_of_tokens: ClassVar[str] = ""
    holds_one_sequence: ClassVar[bool] = False
    packs_pages: ClassVar[bool] = False
    spans_devices: ClassVar[bool] = False

    @abstractmethod
    def shape(
        self, config: Any, *, element_bytes: int, page_tokens: int = DEFAULT_PAGE_TOKENS, revision: str = ""
    ) -> ShapeT:
        """Return the shape of a model from its config alone. Layers of constant state are counted in it like windows.

        Args:
            config: a transformers config.
            element_bytes: bytes of one cached element (4 for fp32, 2 for bf16).
            page_tokens: tokens of one page, where the backend leaves the choice.
            revision: identity of the weights.

        Raises:
            UsageError: a model of this config cannot be run; the message gives every reason.
        """

    def check_dtype(self, dtype: str) -> None:
        """Refuse what the backend cannot compute in.

        Raises:
            UsageError: for ``float32``, ``bfloat16`` or ``float16``.
        """

    def attention_text(self, shape: ShapeT, device: torch.device, dtype: torch.dtype) -> str | None:
        """Name what will compute attention; None where only the loaded model can tell."""
        del shape, device, dtype
        return None

    def try_code(self, model: Any, shape: ShapeT) -> None:
        """Refuse what the code of a model shows before its weights load.

        Args:
            model: built without storage. It is not used again but for names and shapes of its tensors.
            shape: as ``shape`` returned it.

        Raises:
            KvscopeError: it cannot be run; the message is a clause that ends a sentence.
        """
        del model, shape

    @abstractmethod
    def prepare(self, model: Any, shape: ShapeT) -> ReadyModel:
        """Switch a built model's attention and find out about it what its config does not say.

        Raises:
            KvscopeError: it cannot be run; the message is a clause that ends a sentence.
        """

    @abstractmethod
    def prefill(
        self,
        ready: ReadyModel,
        ids_N: torch.Tensor,
        *,
        listeners: Mapping[int, Sequence[Collector]],
        chunk_tokens: int,
        seed: int,
        prompt_sha256: str,
    ) -> PromptKV:
        """Prefill a prompt densely. ``engine.prefill`` has checked the arguments, begins and finishes collectors.

        Args:
            ids_N: may be empty.
            listeners: managed layer -> the collectors that hear it.
            chunk_tokens: tokens of one forward; whole pages.
            seed, prompt_sha256: go into the prompt.
        """

    @abstractmethod
    def form_of(self, method: CacheMethod[Any], shape: ShapeT) -> CacheMethod[Any]:
        """Return a method as it runs on this cache: itself, a form of it, or a ``NoForm`` that says why there is none.

        A form comes back as it is.
        """

    @abstractmethod
    def observe(
        self, model: Any, layers: tuple[int, ...], callback: Callable[[int, torch.Tensor], None]
    ) -> AbstractContextManager[None]:
        """Call ``callback(layer, hidden_BM)`` with the last position's hidden state as it enters each of ``layers``."""

    def watched_dense(self, model: Any, shape: ShapeT, layers: tuple[int, ...]) -> CacheMethod[Any] | None:
        """Return dense over compressed entries, whose sequences are ``WatchedEntries``; None where tokens are kept.

        Args:
            layers: whose states are noted.
        """
        del model, shape, layers
        return None

    def native_indexer(self, model: Any, layers: tuple[int, ...]) -> CompressedIndexer | None:
        """Return the indexer that the model itself has in some layers; None where it has none."""
        del model, layers
        return None

    @abstractmethod
    def prefill_peak_bytes(self, shape: ShapeT, n_tokens: int, *, chunk_tokens: int, intermediate_size: int) -> int:
        """Estimate device bytes of a prefill besides weights.

        Args:
            intermediate_size: width of the MLP.
        """

    def reach_tokens(self, shape: ShapeT) -> int:
        """Return how many tokens back a cache does anything new: a check of it takes a longer prompt."""
        return shape.sliding_window

    def synthetic_gap(self, shape: ShapeT) -> str | None:
        """Return what of the cache a prompt of random pages leaves empty; None where it fills all of it.

        The clause stands between "Model 'x' has" and "not filled with synthetic values".
        """
        del shape
        return None

    def tables(self, shape: ShapeT, methods: Sequence[CacheMethod[Any]], n_tokens: int) -> list[str]:
        """Return tables that a plan adds of this cache at ``n_tokens``, lines of text; none where its own say all.

        Args:
            methods: as ``form_of`` returned them, each one that runs.
        """
        del shape, methods, n_tokens
        return []

    def note(self, shape: ShapeT, n_tokens: int) -> str | None:
        """Return what a plan says of the bytes at ``n_tokens``; None where they speak for themselves."""
        del shape, n_tokens
        return None


class NoForm(CacheMethod[Any]):
    """A method that does not run on a backend: it describes itself as ever, and ``unsupported`` says why not."""

    def __init__(self, method: CacheMethod[Any], reason: str) -> None:
        super().__init__(method.config, label=method.label)
        # What the method's class says of itself (name, stays, saving_kind, ...) is said here by the instance.
        vars(self).update({each: getattr(method, each) for each in CacheMethod.__annotations__})
        self.selection = getattr(method, "selection", "free")
        self._method, self._reason = method, reason

    def unsupported(self, shape: ModelShape, device: torch.device | str) -> list[str]:
        return [self._reason]

    def require(self, shape: ModelShape) -> None:
        self._method.require(shape)

    def predict(self, shape: ModelShape, n_tokens: int, n_new_tokens: int = 0) -> Any:
        raise ValueError(self._reason)

    def open(self, prompt: PromptKV, device: torch.device | str, **options: Any) -> Any:
        raise ValueError(self._reason)

    def is_noop(self, n_tokens: int, shape: ModelShape | None = None) -> bool:
        return self._method.is_noop(n_tokens, shape)

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        return self._method.effective_config(n_tokens, shape)


def form_on(backend: Backend[Any], method: CacheMethod[Any], shape: Any) -> CacheMethod[Any]:
    """Return a method as it runs on a backend's cache; a ``NoForm`` where it wants packed pages and there are none, or
    where it does not keep layers apart and they are on several devices.
    """
    if isinstance(method, AtShare):
        base = form_on(backend, method.base, shape)
        return base if isinstance(base, NoForm) else method.over(base, dense=form_on(backend, method.dense, shape))
    form = backend.form_of(method, shape)
    if isinstance(form, NoForm):
        return form
    if shape.devices and not method.spans_devices:
        return NoForm(method, "it keeps the whole sequence on one device, and this model's layers are on several")
    if method.kv is None or backend.packs_pages:
        return form
    return NoForm(method, f"kv={method.kv.name} packs pages of K and V, and this model's cache has none")


def backend_of(config: Any) -> Backend[Any]:
    """Return the backend of a transformers config's model type.

    Raises:
        UsageError: an installed package's entry point that cannot be loaded, or that two claim the model type.
    """
    model_type = getattr(config, "model_type", "")
    outside = [point for point in _installed(tuple(sys.path)) if point.name == model_type]
    if outside:
        return _from_outside(model_type, outside)
    module, _, name = BACKENDS.get(model_type, PAGED).partition(":")
    backend: Backend[Any] = getattr(import_module(module), name)()
    return backend


@cache
def _installed(search_path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Return the backends of installed packages: reading every package's metadata takes as long as a small prefill."""
    del search_path  # what they depend on
    return tuple(entry_points(group=ENTRY_POINTS))


def _from_outside(model_type: str, found: Sequence[EntryPoint]) -> Backend[Any]:
    # One package may be found twice on the path; two of different values are a conflict.
    claims = sorted({each.value for each in found} | {BACKENDS[key] for key in (model_type,) if key in BACKENDS})
    if len(claims) > 1:
        raise UsageError(
            f"Model type '{model_type}' has {len(claims)} backends ({', '.join(claims)}): uninstall all but one."
        )
    try:
        backend: Backend[Any] = found[0].load()()
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"The backend '{claims[0]}' of model type '{model_type}' cannot be loaded ({error}): mend or uninstall its "
            "package."
        ) from error
    return backend


def require_token_attention(backend: Backend[Any], *, model: str, what: str) -> None:
    """Refuse what reads the attention over single tokens where the cache does not keep them.

    Args:
        model: its name.
        what: reads it, as the subject of a sentence in the plural.

    Raises:
        UsageError: saying what the cache keeps instead.
    """
    if backend.instead_of_tokens:
        raise UsageError(
            f"Model '{model}' keeps {backend.instead_of_tokens}, and {what} read the attention over single tokens: not "
            f"available for {backend.name}."
        )
