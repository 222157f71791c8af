"""Lookahead Sparse Attention (FlashMemory, arXiv 2606.09079) on models with an ordinary KV cache."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from kvscope.errors import UsageError
from kvscope.methods.base import CacheMethod, Collector, Rehearsal, SequenceCache
from kvscope.methods.fp8_keys import pack, quantize
from kvscope.methods.indexer_source import IndexerSource
from kvscope.methods.lsa.collectors import ChunkKeys, LastStates
from kvscope.methods.lsa.counts import ChunkCounts
from kvscope.methods.lsa.hindsight import NotingSelector, PlaybackSelector
from kvscope.methods.lsa.indexer import chunk_features, weight_bytes
from kvscope.methods.lsa.indexer_config import ENCODER_FEATURES, IndexerConfig, default_sizes
from kvscope.methods.lsa.indexer_files import FILES, HOW_TO_TRAIN, mismatch
from kvscope.methods.lsa.indexer_selection import IndexerSelector, SyntheticSelector, metadata_bytes, refresh_bytes
from kvscope.methods.lsa.landmark import (
    LandmarkSelector,
    landmark_collectors,
    landmark_metadata_bytes,
    landmark_refresh_bytes,
    landmark_refresh_flops,
)
from kvscope.methods.lsa.layout import ChunkLayout
from kvscope.methods.lsa.options import ATTENTION, HINDSIGHT, LANDMARK, PAGES, LsaConfig
from kvscope.methods.lsa.rule import Rule
from kvscope.methods.lsa.schedule import LsaSequence, Schedule
from kvscope.methods.lsa.selection import MassSelector, NothingToChoose, Selector
from kvscope.methods.lsa.sequence import RecallingSequence
from kvscope.methods.shape import Footprint, ModelShape
from kvscope.methods.store import PromptKV


class Lsa(CacheMethod[LsaConfig]):
    """Predicted chunks, sinks, recency window and decoded tokens; re-chosen every ``tau`` steps."""

    name = "lsa"
    stays = "chunks an indexer predicts to be needed in the next tau steps, sinks, the last tokens, every decoded token"
    saves = "bytes and reads follow what is needed; the rest waits in host memory and is recalled when predicted"
    source = "Lookahead Sparse Attention (FlashMemory-DeepSeek-V4), arXiv 2606.09079"
    cost = "resident = read = S + R + chosen chunks * C + decoded tokens a layer; (E + 4) bytes a key and indexed layer"
    saving_kind = "offloaded"
    spans_devices = True
    kv_refusal = ""
    budget_sets_window = False
    needs_training = "an indexer"
    through_decode = True
    Config = LsaConfig

    def __init__(self, config: LsaConfig | None = None, *, label: str | None = None) -> None:
        super().__init__(config, label=label)
        chunk = f" for chunks of {self.config.chunk_tokens} tokens" if self.config.chunk_tokens else ""
        self._source = IndexerSource(
            FILES,
            spec=self.config.indexer if self.config.indexed else None,
            synthetic=self.config.selection == "synthetic",
            seed=self.config.seed,
            untrained=self._untrained,
            misfit=self._misfit,
            missing=f"No trained indexer{chunk} comes with kvscope for this model: "
            f"{HOW_TO_TRAIN}; or take indexer=landmark, which needs none; or selection=synthetic with a budget (bytes "
            "and times only).",
        )

    @property
    def selection(self) -> str:
        """What chooses, as rows name it: ``trained``, ``synthetic`` or ``free`` (the model's own attention)."""
        return self.config.selection if self.config.indexed else "free"

    # -- the indexer and the model it belongs to

    @classmethod
    def shipped_indexers(cls) -> list[str]:
        found = ((name, FILES.read_config(FILES.folder(name))) for name in FILES.shipped_names())
        return [f"{name} (model {each.model}: chunks of {each.chunk_tokens}, tau {each.tau})" for name, each in found]

    def require(self, shape: ModelShape) -> None:
        self._indexer_config(shape)

    def unsupported(self, shape: ModelShape, device: torch.device | str) -> list[str]:
        try:
            config = self._indexer_config(shape)
        except UsageError as error:
            return [str(error).rstrip(".")]
        reasons = self.unsupported_kv(shape, device)
        if uneven := self.uneven_pages():
            reasons.append(uneven)
        unknown = sorted(set(config.layers if config else ()) & set(shape.unknown_rotation_layers))
        if not unknown:
            return reasons
        layers = ", ".join(map(str, unknown))
        return [
            *reasons,
            f"the position encoding of layers {layers} cannot be undone, which the indexer's chunk keys need",
        ]

    def kv_refusal_of_options(self) -> str:
        if self.config.indexed or self.config.indexer == LANDMARK:
            return ""
        return f"indexer={self.config.indexer} weighs the raw keys of the prompt, which packed pages do not hold"

    def observed_layers(self, shape: ModelShape) -> tuple[int, ...]:
        config = self._indexer_config(shape)
        return config.layers if config else ()

    def collectors(self, layer: int) -> list[Collector]:
        if self.config.indexer == LANDMARK:
            return landmark_collectors(layer, self.chunk_tokens())
        if not self.config.indexed:
            return []
        if self.config.selection == "trained":
            config = FILES.read_config(self._source.folder())
            if layer not in config.layers:
                return []
            width = config.lookback_tokens
            key_tokens = config.segment_tokens or config.chunk_tokens
        else:
            shape = self._source.shape
            if shape is not None and layer not in synthetic_layers(shape):
                return []
            width = 1
            key_tokens = self.chunk_tokens()
        collectors: list[Collector] = [
            ChunkKeys(self._keys_name(), layer, chunk_tokens=key_tokens, encode=self._encode)
        ]
        return collectors if width == 1 else [*collectors, LastStates(layer, n_states=width)]

    def _misfit(self, config: IndexerConfig, shape: ModelShape) -> str | None:
        return mismatch(config, shape, chunk_tokens=self.config.chunk_tokens)

    def _untrained(self, shape: ModelShape) -> IndexerConfig:
        heads, key_dim, rank = default_sizes(shape.hidden_size)
        return IndexerConfig(
            model="synthetic",
            model_revision=shape.revision,
            layers=synthetic_layers(shape),
            chunk_tokens=self.chunk_tokens(),
            tau=self.tau(),
            hidden_size=shape.hidden_size,
            key_features=shape.n_kv_heads * shape.head_dim,
            heads=heads,
            key_dim=key_dim,
            rank=rank,
        )

    def _indexer_config(self, shape: ModelShape) -> IndexerConfig | None:
        """Return the configuration of the indexer that chooses on this model; None without one.

        Raises:
            UsageError: there is none, or it belongs to another model, layer or chunk size.
        """
        return self._source.config(shape) if self.config.indexed else None

    @torch.inference_mode()
    def _encode(self, layer: int, k_nCF: torch.Tensor) -> torch.Tensor:
        """Encode segments of keys as packed fp8, for the collectors."""
        indexer = self._source.module(k_nCF.device)
        features = chunk_features(k_nCF, ENCODER_FEATURES[indexer.config.encoder])
        return pack(*quantize(indexer.layer(layer).memory(features)))

    def _keys_name(self) -> str:
        chunk = f"_{self.chunk_tokens()}" if self.config.selection == "synthetic" else ""
        return f"lsa_keys_{self._source.keys_id}{chunk}"

    # -- counts

    @property
    def counts(self) -> ChunkCounts:
        """The numbers that the options and the trained indexer settle."""
        return ChunkCounts(self.config, self._trained)

    def chunk_tokens(self) -> int:
        """Return C."""
        return self.counts.chunk_tokens

    def tau(self) -> int:
        """Return the decode steps between refreshes."""
        return self.counts.tau

    def layout(self, n_tokens: int) -> ChunkLayout:
        """Return how a prompt of ``n_tokens`` is cut."""
        return self.counts.layout(n_tokens)

    def uneven_pages(self) -> str | None:
        """Return why pages cannot be made of chunks; None where they can."""
        return self.counts.uneven_pages()

    def rule(self, layout: ChunkLayout) -> Rule:
        """Return which candidates are kept of a prompt cut like this."""
        return self.counts.rule(layout)

    def _trained(self) -> IndexerConfig | None:
        """Return the trained indexer's configuration; None where none chooses, or no model was seen yet."""
        if self.config.selection == "synthetic" or not self.config.indexed:
            return None
        if self.config.indexer is not None and self.config.indexer.endswith((".safetensors", ".pt")):
            return None  # weights of a deepseek_v4 model, which say nothing of themselves
        if self._source.given_folder is None and self._source.shape is None:
            return None
        return FILES.read_config(self._source.folder())

    def is_noop(self, n_tokens: int, shape: ModelShape | None = None) -> bool:
        self._source.see(shape)
        layout = self.layout(n_tokens)
        rule = self.rule(layout)
        return layout.n_candidates == (rule.n_kept(0) if rule.n_chunks is None else rule.n_chunks)

    def predict(self, shape: ModelShape, n_tokens: int, n_new_tokens: int = 0) -> Footprint:
        """Return the footprint; exact with a budget and ``refresh=sync``.

        A threshold keeps what it keeps: then the share the indexer kept on held-out documents counts, or everything
        if that is not known. With ``stale1`` it is an upper bound: every chunk chosen may be new.
        """
        config, layout, shape = self._indexer_config(shape), self.layout(n_tokens), self.stored(shape)
        rule = self.rule(layout)
        n_chosen = rule.n_chunks
        if n_chosen is None:
            share = 1.0 if config is None or config.kept_fraction is None else config.kept_fraction
            n_chosen = rule.n_kept(math.ceil(share * layout.n_candidates))
        C, tau = layout.chunk_tokens, self.tau()
        n_held = min(layout.n_candidates, 2 * n_chosen) if self.config.effective_refresh == "stale1" else n_chosen
        static_tokens, n_total = layout.static_tokens + n_new_tokens, n_tokens + n_new_tokens
        n_read, n_layers, unit = static_tokens + n_chosen * C, len(shape.layers), layout.unit_tokens(shape.page_tokens)
        scored = Footprint()
        if config is not None and layout.n_candidates:
            scored = Footprint(
                metadata_bytes=metadata_bytes(config, layout.n_candidates, element_bytes=shape.element_bytes),
                bytes_read_per_step=-(-refresh_bytes(config, layout.n_candidates) // tau),
                attention_flops_per_step=-(-config.scoring_flops(layout.n_candidates) // tau),
            )
        elif self.config.indexer == LANDMARK and layout.n_candidates:
            scored = Footprint(
                metadata_bytes=landmark_metadata_bytes(shape, layout.n_candidates),
                bytes_read_per_step=-(-landmark_refresh_bytes(shape, layout.n_candidates) // tau),
                attention_flops_per_step=-(-landmark_refresh_flops(shape, layout.n_candidates) // tau),
            )
        return scored + Footprint(
            kv_bytes=shape.paged_kv_bytes(static_tokens)
            + n_layers * shape.packed_bytes(n_held * C, unit_tokens=unit)
            + shape.stock_kv_bytes(n_tokens, n_new_tokens),
            host_bytes=n_layers * shape.packed_bytes(shape.pages(n_tokens) * shape.page_tokens, unit_tokens=unit),
            bytes_read_per_step=shape.read_bytes(static_tokens)
            + n_layers * shape.packed_bytes(n_chosen * C, unit_tokens=unit)
            + shape.stock_read_bytes(n_total),
            attention_flops_per_step=shape.attention_flops(n_read) + shape.stock_attention_flops(n_total),
        )

    def trained_part(self, shape: ModelShape) -> str | None:
        return self._source.files_hash(shape) if self.config.indexed else None

    def trained_prompts(self, shape: ModelShape) -> str | None:
        return self._source.trained_prompts(shape) if self.config.indexed else None

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        self._source.see(shape)
        layout, config = self.layout(n_tokens), self.config
        rule = self.rule(layout)
        values: dict[str, Any] = {
            "tau": self.tau(),
            "mode": "budget" if config.budgeted else "threshold",
            "threshold": rule.threshold,
            "budget_tokens": config.budget_tokens,
            "budget_fraction": config.effective_fraction,
            "cap_tokens": None if rule.n_most is None else self.counts.cap_tokens(n_tokens),
            "chunks_chosen": rule.n_chunks,
            "chunks_to_choose_from": layout.n_candidates,
            "chunk_tokens": layout.chunk_tokens,
            "sink_tokens": min(config.effective_sink_tokens, n_tokens),
            "recency_tokens": min(layout.recency_tokens, n_tokens),
            "always_resident_tokens": layout.static_tokens,
            "refresh": config.effective_refresh,
            "fallback_ratio": config.fallback_ratio,
            "selection": self.selection,
            "seed": config.seed,
        }
        if config.indexer in (ATTENTION, HINDSIGHT, LANDMARK):  # of a trained one the residency tells name and hash
            values["indexer"] = config.indexer
        if config.policy == PAGES:  # rows of the threshold say what they said before there was a choice
            values |= {
                "mode": PAGES,
                "page_tokens": config.page_tokens,
                "pages": (rule.n_chunks or 0) // layout.page_chunks,
            }
        if rule.n_least:
            values["least_tokens"] = self.counts.least_tokens(n_tokens)
        if config.selection == "synthetic":
            values["churn"] = self.counts.churn
        if self._source.shape is None and config.selection == "trained" and config.indexer is None:
            # Asked without a model, and the model decides which indexer there is: counts are those of 64 tokens.
            left = {name for name in ("tau", "chunk_tokens") if getattr(config, name) is None}
            values.update({name: f"the indexer's or {values[name]}" for name in left})
        return values

    # -- opening

    def rehearsal(self) -> Rehearsal | None:
        if self.config.indexer != HINDSIGHT:
            return None
        first = _FirstDecode(self.config, label=self.label)
        return Rehearsal(
            method=first, learnt=lambda: _SecondDecode(self.config, sets=first.noted.sets(), label=self.label)
        )

    def open(self, prompt: PromptKV, device: torch.device | str, *, reserve_tokens: int = 0) -> SequenceCache:
        layout = self.layout(prompt.n_tokens)
        selector = self.selector(prompt, torch.device(device), layout)
        return self.open_with(prompt, device, selector, layout=layout, reserve_tokens=reserve_tokens)

    def open_with(
        self,
        prompt: PromptKV,
        device: torch.device | str,
        selector: Selector,
        *,
        layout: ChunkLayout,
        reserve_tokens: int = 0,
    ) -> LsaSequence:
        """Open a prompt with a selector of one's own (the label gate scripts one)."""
        return RecallingSequence(
            self.stored_prompt(prompt),
            torch.device(device),
            layout=layout,
            selector=selector,
            schedule=self.schedule(prompt.shape, selector),
            reserve_tokens=reserve_tokens,
        )

    def schedule(self, shape: ModelShape, selector: Selector) -> Schedule:
        """Return when this selector's choices are made and how they arrive."""
        config = self._indexer_config(shape) if isinstance(selector, IndexerSelector | SyntheticSelector) else None
        trained = config is not None and self.config.selection == "trained"
        return Schedule(
            tau=self.tau(),
            stale=self.config.effective_refresh == "stale1",
            fallback_ratio=self.config.fallback_ratio,
            indexer=self._source.name if trained else None,
            indexer_tau=config.tau if config is not None and trained else None,
            indexer_bytes=0 if config is None else weight_bytes(config),
        )

    def selector(self, prompt: PromptKV, device: torch.device, layout: ChunkLayout) -> Selector:
        """Return what chooses for one sequence of a prompt."""
        if not layout.n_candidates:
            return NothingToChoose()
        if self.config.indexer == HINDSIGHT:
            raise UsageError(
                f"Method '{self.label}' plays back what a first decode of the prompt attended to, and only answers are "
                "decoded twice: no memory and no times can be measured of it (--no-footprint)."
            )
        rule = self.rule(layout)
        if self.config.indexer == LANDMARK:
            return LandmarkSelector(prompt, device, layout=layout, rule=rule)
        if not self.config.indexed:
            return MassSelector(rule)
        self._source.config(prompt.shape)
        indexer = self._source.module(device)
        width = indexer.config.lookback_tokens
        states_name = None if width == 1 else f"last_states_{width}"
        found = IndexerSelector(
            indexer, prompt, device, layout=layout, rule=rule, keys_name=self._keys_name(), states_name=states_name
        )
        if self.config.selection != "synthetic":
            return found
        # Of the prompt, not of the opening: what is opened twice chooses the same twice.
        return SyntheticSelector(found, layout=layout, churn=self.counts.churn, seed=self.config.seed + prompt.seed)


class _FirstDecode(Lsa):
    """Every token is resident and read; what its steps attend to is noted."""

    noted: NotingSelector

    def rehearsal(self) -> Rehearsal | None:
        return None

    def selector(self, prompt: PromptKV, device: torch.device, layout: ChunkLayout) -> Selector:
        del prompt, device
        self.noted = NotingSelector(self.rule(layout), tau=self.tau())
        return self.noted

    def schedule(self, shape: ModelShape, selector: Selector) -> Schedule:
        return replace(super().schedule(shape, selector), tau=1, fallback_ratio=None)


class _SecondDecode(Lsa):
    """What was noted is resident, interval by interval."""

    def __init__(self, config: LsaConfig, *, sets: Sequence[torch.Tensor], label: str) -> None:
        super().__init__(config, label=label)
        self._sets = sets

    def rehearsal(self) -> Rehearsal | None:
        return None

    def selector(self, prompt: PromptKV, device: torch.device, layout: ChunkLayout) -> Selector:
        del prompt, device
        return PlaybackSelector(self._sets) if layout.n_candidates else NothingToChoose()


def synthetic_layers(shape: ModelShape) -> tuple[int, ...]:
    """Return the layers a synthetic indexer reads: up to three, about as deep as the paper's 10, 12 and 20 of 43."""
    n = len(shape.layers)
    return tuple(shape.layers[i] for i in sorted({n // 4, n * 3 // 10, n // 2}) if i < n)
