"""The backend of a stock ``deepseek_v4`` model: compressed entries in place of K and V of single tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformers
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RMSNorm

from kvscope.errors import UsageError
from kvscope.harness.backends.deepseek_v4.itemised import released_tables
from kvscope.harness.backends.deepseek_v4.lsa import LsaEntries
from kvscope.harness.backends.deepseek_v4.methods import DenseEntries, OverEntries, RandomEntries, RecencyEntries
from kvscope.harness.backends.deepseek_v4.prefill import CompressedPrompt, compressed_prefill, use_own_attention
from kvscope.harness.backends.deepseek_v4.shape import (
    CompressedModelShape,
    compressed_model_shape,
    released_bytes_note,
)
from kvscope.harness.backends.deepseek_v4.watched import WatchedDense, native_indexer
from kvscope.harness.engine.backend import Backend, NoForm, ReadyModel
from kvscope.harness.engine.glue import observing_attention
from kvscope.methods.base import CacheMethod, Collector
from kvscope.methods.dense.method import Dense
from kvscope.methods.lsa.compressed import CompressedIndexer
from kvscope.methods.lsa.method import Lsa
from kvscope.methods.random.method import RandomChunks
from kvscope.methods.recency.method import Recency
from kvscope.methods.shape import DEFAULT_PAGE_TOKENS

FORMS: dict[type[CacheMethod[Any]], type[OverEntries]] = {
    Dense: DenseEntries,
    Recency: RecencyEntries,
    RandomChunks: RandomEntries,
    Lsa: LsaEntries,
}
"""Method -> its form over compressed entries. A subclass of a method is another method and has none."""


class DeepseekV4(Backend[CompressedModelShape]):
    """Compressed entries and indexer keys as the stock transformers classes keep them."""

    name = "deepseek_v4"
    instead_of_tokens = "compressed entries"
    holds_one_sequence = True

    def shape(
        self, config: Any, *, element_bytes: int, page_tokens: int = DEFAULT_PAGE_TOKENS, revision: str = ""
    ) -> CompressedModelShape:
        """Return the shape; a page is one entry, whatever is asked for."""
        return compressed_model_shape(config, element_bytes=element_bytes, revision=revision)

    def check_dtype(self, dtype: str) -> None:
        """Refuse float16: some projections of the stock classes stay in fp32 then, and their inputs do not."""
        if dtype == "float16":
            raise UsageError("The stock deepseek_v4 classes do not run in float16; use --dtype bfloat16 or float32.")

    def prepare(self, model: Any, shape: CompressedModelShape) -> ReadyModel:
        use_own_attention(model)
        parameter = next(model.parameters())
        return ReadyModel(
            model=model,
            shape=shape,
            device=parameter.device,
            dtype=parameter.dtype,
            attention_backend=f"torch {torch.__version__}: stock deepseek_v4 classes, eager attention with mask"
            + _norms_in_the_models_dtype(model, parameter.dtype),
            rotations=dict.fromkeys(range(shape.n_layers)),
        )

    def prefill(
        self,
        ready: ReadyModel,
        ids_N: torch.Tensor,
        *,
        listeners: Mapping[int, Sequence[Collector]],
        chunk_tokens: int,
        seed: int,
        prompt_sha256: str,
    ) -> CompressedPrompt:
        if listeners:
            raise ValueError("compressed entries have no K and V of tokens for a collector to hear")
        return compressed_prefill(ready, ids_N, chunk_tokens=chunk_tokens, seed=seed, prompt_sha256=prompt_sha256)

    def form_of(self, method: CacheMethod[Any], shape: CompressedModelShape) -> CacheMethod[Any]:
        if isinstance(method, OverEntries | NoForm):
            return method
        form = FORMS.get(type(method))
        if form is None:
            reason = (
                f"{method.name} works on the K and V of single tokens, and deepseek_v4 keeps one entry for "
                f"{shape.page_tokens} of them; {', '.join(each.name for each in FORMS)} run there"
            )
            return NoForm(method, reason)
        return form(method.config, label=method.label, shape=shape)

    def observe(
        self, model: Any, layers: tuple[int, ...], callback: Callable[[int, torch.Tensor], None]
    ) -> AbstractContextManager[None]:
        """Its decoder layers take several residual streams, so it is the state entering attention that is heard."""
        return observing_attention(model, layers, callback)

    def watched_dense(
        self, model: Any, shape: CompressedModelShape, layers: tuple[int, ...]
    ) -> CacheMethod[Any] | None:
        return WatchedDense(model, shape, layers)

    def native_indexer(self, model: Any, layers: tuple[int, ...]) -> CompressedIndexer | None:
        return native_indexer(model, layers)

    def prefill_peak_bytes(
        self, shape: CompressedModelShape, n_tokens: int, *, chunk_tokens: int, intermediate_size: int
    ) -> int:
        return shape.prefill_peak_bytes(n_tokens, chunk_tokens=chunk_tokens)

    def reach_tokens(self, shape: CompressedModelShape) -> int:
        """Return the longer of the window and the tokens of one HCA entry."""
        return max(shape.cache.window_tokens, shape.cache.hca_rate)

    def synthetic_gap(self, shape: CompressedModelShape) -> str:
        return "compressed entries, which are"

    def tables(self, shape: CompressedModelShape, methods: Sequence[CacheMethod[Any]], n_tokens: int) -> list[str]:
        return released_tables(shape, [each for each in methods if isinstance(each, OverEntries)], n_tokens)

    def note(self, shape: CompressedModelShape, n_tokens: int) -> str | None:
        return released_bytes_note(shape, n_tokens)


def _norms_in_the_models_dtype(model: Any, dtype: torch.dtype) -> str:
    """Bring norm weights to the model's type where its norms need it; return what the row says of that.

    transformers keeps norm weights in fp32. Where its norms then return fp32 in a bf16 model (5.17 does, 5.23 casts),
    the projections behind them fail.
    """
    norms = [module for module in model.modules() if isinstance(module, DeepseekV4RMSNorm)]
    promoting = [norm for norm in norms if norm(norm.weight.new_ones(1, len(norm.weight), dtype=dtype)).dtype != dtype]
    if not promoting:
        return ""
    for norm in promoting:
        norm.to(dtype)
    name = str(dtype).removeprefix("torch.")
    return f"; norm weights in {name}, which transformers {transformers.__version__} needs to run it"
