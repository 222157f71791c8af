"""``lsa`` over compressed entries: those an indexer predicts, chosen again every tau steps."""

import math
from typing import Any

import torch

from kvscope.errors import UsageError
from kvscope.harness.backends.deepseek_v4.methods import OverEntries
from kvscope.harness.backends.deepseek_v4.prefill import CompressedPrompt
from kvscope.harness.backends.deepseek_v4.sequence import Choice, CompressedSequence
from kvscope.harness.backends.deepseek_v4.shape import CompressedModelShape
from kvscope.methods.lsa.compressed import CompressedIndexer, CompressedSelector
from kvscope.methods.lsa.compressed_files import compressed_indexer_hash, load_compressed_indexer
from kvscope.methods.lsa.counts import ChunkCounts
from kvscope.methods.lsa.indexer_config import COMPRESSED_KEY, IndexerConfig
from kvscope.methods.lsa.indexer_files import CONFIG_FILE, FILES
from kvscope.methods.lsa.indexer_selection import SyntheticSelector
from kvscope.methods.lsa.method import Lsa
from kvscope.methods.lsa.printed import N_INDEXED_LAYERS
from kvscope.methods.lsa.schedule import Schedule
from kvscope.methods.lsa.selection import Selector
from kvscope.methods.shape import Footprint, ModelShape
from kvscope.paths import user_path


class LsaEntries(OverEntries, Lsa):
    """Entries an indexer predicts, by the paper's own score function over the model's indexer keys."""

    stays = "CSA entries an indexer predicts, sinks, the last tokens, every decoded token; HCA entries and windows"
    cost = (
        "resident = (S + R)/4 + chosen entries and indexer keys a CSA layer + decoded, N/128 an HCA layer, windows; "
        "E + 4 bytes a candidate entry and indexed layer"
    )

    def __init__(self, config: Any = None, *, label: str | None = None, shape: CompressedModelShape) -> None:
        super().__init__(config, label=label, shape=shape)
        self._loaded: CompressedIndexer | None = None
        self._on: dict[torch.device, CompressedIndexer] = {}

    @property
    def _of_weights(self) -> bool:
        """Whether the indexer is given as weights alone, as those of FlashMemory are: they say nothing of themselves.

        A folder that ``kvscope lsa train`` wrote, or a shipped name, has a configuration.
        """
        given = self.config.indexer
        if given is None:
            return False
        place = user_path(given, what="indexer")
        is_named = given in FILES.shipped_names() or (place / CONFIG_FILE).is_file()
        return not is_named

    def _trained(self) -> IndexerConfig | None:
        if self._of_weights or self.config.selection == "synthetic" or not self.config.indexed:
            return None
        self._source.see(self.entry_shape)
        try:
            return self._source.config(self.entry_shape)
        except UsageError:
            return None  # ``require`` and ``unsupported`` say why

    def require(self, shape: ModelShape) -> None:
        self.compressed_indexer()

    def unsupported(self, shape: ModelShape, device: torch.device | str) -> list[str]:
        options, rate = self.config, self.entry_shape.page_tokens
        reasons = []
        if options.chunk_tokens not in (None, rate):
            reasons.append(f"chunk_tokens={options.chunk_tokens}: on deepseek_v4 a chunk is an entry of {rate} tokens")
        if uneven := self.uneven_pages():
            reasons.append(uneven)
        if not options.indexed:
            reasons.append(
                f"indexer={options.indexer} is not available over compressed entries: the stock classes hand "
                "their queries and attention weights to nobody"
            )
        else:
            try:
                self.compressed_indexer()
            except UsageError as error:
                reasons.append(str(error).rstrip("."))
        return reasons

    def compressed_indexer(self) -> CompressedIndexer | None:
        """Return the indexer on the CPU, made or loaded once; None where there is to be none, which is refused.

        Raises:
            UsageError: none was given, it cannot be read, or it belongs to another model.
        """
        options, shape = self.config, self.entry_shape
        if self._loaded is None and options.indexed:
            if options.selection == "synthetic":
                self._loaded = CompressedIndexer.random(
                    shape.layers[:N_INDEXED_LAYERS], hidden_size=shape.hidden_size, rank=max(1, shape.hidden_size // 2),
                    heads=shape.index_heads, key_dim=shape.index_key_dim, seed=options.seed,
                )  # fmt: skip
            elif options.indexer is not None and self._of_weights:
                self._loaded = load_compressed_indexer(options.indexer, csa_layers=shape.layers)
            else:
                if options.indexer is None and FILES.find_shipped(lambda each: self._misfit(each, shape)) is None:
                    raise UsageError(
                        f"Method '{self.label}' needs an indexer on deepseek_v4: pass indexer=FOLDER of kvscope lsa "
                        "train, or indexer=FILE with the weights of its query side, or use selection=synthetic with a "
                        "budget (bytes and times only)."
                    )
                self._source.config(shape)
                self._loaded = CompressedIndexer.of(self._source.module(torch.device("cpu")))
            _check(self._loaded, shape)
        return self._loaded

    def _misfit(self, config: IndexerConfig, shape: ModelShape) -> str | None:
        found = super()._misfit(config, shape)
        if found is None and config.encoder != COMPRESSED_KEY:
            found = f"its encoder is {config.encoder}, and the entries of this model have keys of their own"
        return found

    def trained_part(self, shape: ModelShape) -> str | None:
        if self.config.selection != "trained" or not self.config.indexed:
            return None
        return self._indexer_name().rpartition("@")[2] if self._of_weights else super().trained_part(shape)

    def trained_prompts(self, shape: ModelShape) -> str | None:
        return None if self._of_weights else super().trained_prompts(shape)

    def _indexer_name(self) -> str:
        """Return name and hash of the trained indexer, for a row."""
        return compressed_indexer_hash(str(self.config.indexer)) if self._of_weights else self._source.name

    def observed_layers(self, shape: ModelShape) -> tuple[int, ...]:
        indexer = self.compressed_indexer()
        return tuple(indexer.layers) if indexer else ()

    @property
    def counts(self) -> ChunkCounts:
        return ChunkCounts(self.config, self._trained, chunk_tokens=self.entry_shape.page_tokens)

    def n_fixed(self, n_tokens: int) -> int:
        return n_tokens // self.chunk_tokens() - self.layout(n_tokens).n_candidates

    def n_kept(self, n_tokens: int) -> int:
        layout = self.layout(n_tokens)
        rule, config = self.rule(layout), self._trained()
        share = 1.0 if config is None or config.kept_fraction is None else config.kept_fraction
        n_chosen = rule.n_kept(math.ceil(share * layout.n_candidates)) if rule.n_chunks is None else rule.n_chunks
        return self.n_fixed(n_tokens) + n_chosen

    def is_noop(self, n_tokens: int, shape: ModelShape | None = None) -> bool:
        return Lsa.is_noop(self, n_tokens, shape)  # a threshold leaves out what it leaves out

    def predict(self, shape: ModelShape, n_tokens: int, n_new_tokens: int = 0) -> Footprint:
        """Return the footprint; exact with a budget.

        A threshold keeps what it keeps: then the share that a trained indexer kept on held-out documents counts, or
        everything where that is not known.
        """
        held = super().predict(shape, n_tokens, n_new_tokens)
        return held + Footprint(host_bytes=self.entry_shape.paged_kv_bytes(n_tokens))

    def choosing(self, n_tokens: int) -> Footprint:
        indexer, n_candidates = self.compressed_indexer(), self.layout(n_tokens).n_candidates
        if indexer is None or not n_candidates:
            return Footprint()
        tau = self.tau()
        return Footprint(
            metadata_bytes=indexer.metadata_bytes(n_candidates, element_bytes=self.entry_shape.element_bytes),
            bytes_read_per_step=math.ceil(indexer.refresh_bytes(n_candidates) / tau),
            attention_flops_per_step=math.ceil(indexer.scoring_flops(n_candidates) / tau),
        )

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        return {**super().effective_config(n_tokens, shape), "encoder": CompressedIndexer.encoder}

    def open_entries(
        self, prompt: CompressedPrompt, device: torch.device, *, reserve_tokens: int
    ) -> CompressedSequence:
        layout, indexer = self.layout(prompt.n_tokens), self.compressed_indexer()
        if indexer is None:
            raise UsageError(f"Method '{self.label}' cannot run: {'; '.join(self.unsupported(prompt.shape, device))}.")
        fixed = self._entries(layout.static_ranges, prompt)
        trained = self.config.selection == "trained"
        config = self._trained()
        schedule = Schedule(
            tau=self.tau(),
            stale=self.config.effective_refresh == "stale1",
            fallback_ratio=self.config.fallback_ratio,
            indexer=self._indexer_name() if trained else None,
            indexer_tau=None if config is None else config.tau,
            indexer_bytes=indexer.weight_bytes,
        )
        scoring = CompressedSelector(
            self._placed_on(indexer, device),
            {layer: prompt.host[layer]["indexer"][0, layout.first : layout.last].to(device)
             for layer in indexer.layers},
            {layer: prompt.last_hidden[layer] for layer in indexer.layers if layer in prompt.last_hidden},
            rule=self.rule(layout),
            n_tokens=prompt.n_tokens,
            angles=prompt.angles,
        )  # fmt: skip
        selector: Selector = scoring
        if self.config.selection == "synthetic" and layout.n_candidates:
            # Of the prompt, not of the opening: what is opened twice chooses the same twice.
            seed = self.config.seed + prompt.seed
            selector = SyntheticSelector(scoring, layout=layout, churn=self.counts.churn, seed=seed)
        choice = Choice(first=layout.first, last=layout.last, selector=selector, schedule=schedule)
        return CompressedSequence(prompt, device, fixed=fixed, choice=choice, reserve_tokens=reserve_tokens)

    def _placed_on(self, indexer: CompressedIndexer, device: torch.device) -> CompressedIndexer:
        if device not in self._on:
            self._on[device] = indexer.to(device)
        return self._on[device]


def _check(indexer: CompressedIndexer, shape: CompressedModelShape) -> None:
    foreign = sorted(set(indexer.layers) - set(shape.layers))
    if foreign:
        raise UsageError(
            f"The indexer reads layers {', '.join(map(str, foreign))}, which are not among this model's "
            f"compressed-sparse layers ({', '.join(map(str, shape.layers))})."
        )
    for layer, weights in indexer.layers.items():
        mine, theirs = (weights.w_dq_RM.shape[1], weights.key_dim), (shape.hidden_size, shape.index_key_dim)
        if mine != theirs:
            raise UsageError(
                f"The indexer of layer {layer} takes hidden states of {mine[0]} and keys of {mine[1]}, this model has "
                f"{theirs[0]} and {theirs[1]}."
            )
