"""DSA, the token-sparse attention of DeepSeek-V3.2: the best tokens of each query, one set for all heads.

The tokens are chosen by a lightning indexer, trained for the model with the model frozen (DSA-style: DeepSeek trains
the model along with it), or by the attention oracle: the tokens the model's own heads attend to most, chosen anew at
each step and layer. No set of the same size holds more of the attention, which is what an indexer is trained to tell;
answers are another matter, and may be better under other sets.

Shapes: H KV heads, G query heads a KV head, T tokens, D head size, S tokens of a chunk, M hidden size.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvscope.errors import UsageError
from kvscope.methods.base import Collector
from kvscope.methods.block_budget import BlockPlan, check_blocks
from kvscope.methods.block_query import Query, Scored
from kvscope.methods.block_sparse import BlockSparse
from kvscope.methods.dsa.indexer_files import FILES, HOW_TO_TRAIN, mismatch
from kvscope.methods.dsa.keys import Index, TokenKeys, TokenKeyStore
from kvscope.methods.dsa.lightning import LightningConfig, default_sizes, lightning_scores
from kvscope.methods.fp8_keys import pack, quantize
from kvscope.methods.gather import cap, page_logits
from kvscope.methods.indexer_source import IndexerSource
from kvscope.methods.shape import ModelShape
from kvscope.methods.store import PromptKV
from kvscope.methods.summaries import MetadataStore
from kvscope.units import Tokens

ORACLE = "oracle"
# Keys are scored in fp32, this many at a time, so that a long prompt costs no fp32 copy of all of them.
_SCORED_AT_ONCE = 2**17


@dataclass(frozen=True, kw_only=True)
class DSAConfig:
    """Options of ``dsa``.

    Attributes:
        budget_tokens: tokens a query reads, the current one included; none: min(2048, max(128, length / 16)).
        indexer: what chooses. A folder or shipped name of a trained lightning indexer, or oracle (the attention of all
            heads at the same step, added up, which reads every key to choose: no set holds more of it); none: the one
            shipped for this model.
        selection: trained, or synthetic (an indexer of random weights: right bytes and times, meaningless accuracy).
        seed: of the synthetic indexer.
    """

    budget_tokens: Tokens | None = None
    indexer: str | None = None
    selection: str = "trained"
    seed: int = 0

    def __post_init__(self) -> None:
        check_blocks(None, self.budget_tokens)
        if self.selection not in ("trained", "synthetic"):
            raise ValueError(f"selection must be trained or synthetic, got {self.selection!r}")
        if self.selection == "synthetic" and self.indexer is not None:
            raise ValueError("selection=synthetic draws its own indexer, so indexer cannot be given")


class DSA(BlockSparse[DSAConfig]):
    """Top tokens, one set for all heads of a layer."""

    name = "dsa"
    stays = "every token, and a small index key of each"
    saves = "reads and FLOPs; the footprint grows by the index keys (with indexer=oracle every key is read to choose)"
    reads = (
        "the current token and the tokens with the highest score, one set for every head of a layer; and the index key "
        "of every token to choose by (oracle: every key; the score is the attention summed over all heads)"
    )
    needs_training = "an indexer"
    source = (
        "DeepSeek-V3.2 (transformers' deepseek_v32); DSA-style: the indexer is trained with the model frozen, sized to "
        "the model, and takes no positions"
    )
    cost = (
        "resident = N tokens + N index keys of E + 4 bytes a layer; read = min(2048, max(128, N/16)) tokens + the "
        "index keys and the indexer's weights (oracle: resident = N tokens; read + the keys, half the bytes, of all N)"
    )
    paper_block_tokens = 1
    score_kernel = False
    one_choice = True
    paper_options: ClassVar[dict[str, Any]] = {"budget_tokens": 2048}
    Config = DSAConfig

    def __init__(self, config: DSAConfig | None = None, *, label: str | None = None) -> None:
        super().__init__(config, label=label)
        self._source = IndexerSource(
            FILES,
            spec=None if self.oracle else self.config.indexer,
            synthetic=self.config.selection == "synthetic",
            seed=self.config.seed,
            untrained=untrained_config,
            misfit=mismatch,
            missing="No trained lightning indexer comes with kvscope for this model: "
            f"{HOW_TO_TRAIN}; or use indexer=oracle (attention itself), or selection=synthetic (bytes and times only).",
        )

    @property
    def oracle(self) -> bool:
        """Whether the model's own attention chooses."""
        return self.config.indexer == ORACLE

    @property
    def scores_room(self) -> bool:  # type: ignore[override]
        """Whether keys behind the last token may be scored: not by the oracle, whose mass they would take."""
        return not self.oracle

    @property
    def selection(self) -> str:
        """What chooses, as rows name it: ``trained``, ``synthetic`` or ``free`` (the oracle: nothing trained)."""
        return "free" if self.oracle else self.config.selection

    # -- the indexer and the model it belongs to

    @classmethod
    def shipped_indexers(cls) -> list[str]:
        return [f"{name} (model {FILES.read_config(FILES.folder(name)).model})" for name in FILES.shipped_names()]

    def _indexer_config(self, shape: ModelShape) -> LightningConfig | None:
        """Return the configuration of the indexer that chooses; None for the oracle.

        Raises:
            UsageError: there is none, or it belongs to another model or other layers.
        """
        return None if self.oracle else self._source.config(shape)

    def require(self, shape: ModelShape) -> None:
        self._indexer_config(shape)

    def unsupported(self, shape: ModelShape, device: torch.device | str) -> list[str]:
        try:
            self._indexer_config(shape)
        except UsageError as error:
            return [str(error).rstrip(".")]
        return self.unsupported_kv(shape, device)

    def kv_refusal_of_options(self) -> str:
        if not self.oracle:
            return ""
        return f"indexer={ORACLE} weighs the raw keys of every token, which packed pages do not hold"

    def observed_layers(self, shape: ModelShape) -> tuple[int, ...]:
        config = self._indexer_config(shape)
        return () if config is None else config.layers

    def _keys_name(self) -> str:
        return f"dsa_keys_{self._source.keys_id}"

    def collectors(self, layer: int) -> list[Collector]:
        return [] if self.oracle else [TokenKeys(self._keys_name(), layer, encode=self._encode)]

    @torch.inference_mode()
    def _encode(self, layer: int, hidden_SM: torch.Tensor) -> torch.Tensor:
        """Encode hidden states as packed fp8 keys, for the collectors."""
        return pack(*quantize(self._source.module(hidden_SM.device).layer(layer).keys(hidden_SM)))

    # -- storage and choice

    def open_store(self, prompt: PromptKV, device: torch.device, *, reserve_tokens: int) -> MetadataStore | None:
        config = self._indexer_config(prompt.shape)
        if config is None:
            return None
        indexers = {
            layer: self._source.module(prompt.shape.device_of(layer, device)).layer(layer) for layer in config.layers
        }
        return TokenKeyStore(indexers, prompt, config=config, name=self._keys_name(), reserve_tokens=reserve_tokens)

    def metadata_bytes(self, shape: ModelShape, n_tokens: int, plan: BlockPlan) -> int:
        config = self._indexer_config(shape)
        return 0 if config is None else shape.pages(n_tokens) * shape.page_tokens * config.token_key_bytes

    def score(self, query: Query) -> Scored:
        return self._score_by_mass(query) if query.kept is None else self._score_by_index(query)

    def _score_by_index(self, query: Query) -> Scored:
        index = query.kept
        assert isinstance(index, Index)
        parts = [
            # The scale of a key is positive, so it passes the relu.
            lightning_scores(index.q_IE, keys, index.weight_I) * scale
            for keys, scale in zip(
                torch.split(index.keys_NE, _SCORED_AT_ONCE), torch.split(index.scale_N, _SCORED_AT_ONCE), strict=True
            )
        ]
        # What is read and computed follows from the tensors themselves, not from the plan.
        n_bytes, n_flops = index.config.scan_reads(len(index.keys_NE))
        return Scored(torch.cat(parts)[None, None], n_bytes, n_flops)

    def _score_by_mass(self, query: Query) -> Scored:
        logits_HGT = page_logits(query.q_HGD, query.pages, n_tokens=query.n_tokens)
        call = query.call
        mass_T = head_sum(logits_HGT * call.scale, softcap=call.softcap, sink_logits=call.sink_logits)
        H, G, D = query.q_HGD.shape
        n_bytes = query.n_tokens * H * D * query.pages.element_size()
        return Scored(mass_T[None, None, : query.n_before], n_bytes, 2 * query.n_tokens * H * G * D)

    def scan_reads(self, shape: ModelShape, n_tokens: int, plan: BlockPlan) -> tuple[int, int]:
        config = self._indexer_config(shape)
        if config is not None:
            return config.scan_reads(n_tokens - 1)
        n_bytes = n_tokens * shape.n_kv_heads * shape.head_dim * shape.element_bytes
        return n_bytes, 2 * n_tokens * shape.n_q_heads * shape.head_dim

    def trained_part(self, shape: ModelShape) -> str | None:
        return None if self.oracle else self._source.files_hash(shape)

    def trained_prompts(self, shape: ModelShape) -> str | None:
        return None if self.oracle else self._source.trained_prompts(shape)

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        values = {**super().effective_config(n_tokens, shape), "indexer": self._indexer_name(shape)}
        if self.config.selection == "synthetic":
            values["seed"] = self.config.seed
        return values

    def _indexer_name(self, shape: ModelShape | None) -> str:
        """Name the indexer as rows do: with the hash of its files, where they are known."""
        if self.oracle or self.config.selection == "synthetic":
            return ORACLE if self.oracle else "synthetic"
        if shape is not None:
            self._source.config(shape)
        try:
            return self._source.name
        except UsageError:  # asked without a model, and the model decides
            return "the one shipped for the model"


def untrained_config(shape: ModelShape) -> LightningConfig:
    """Return the configuration of an indexer of random weights, of the size one would train."""
    heads, key_dim = default_sizes(shape.n_q_heads, shape.head_dim)
    return LightningConfig(
        model="synthetic",
        model_revision=shape.revision,
        layers=shape.layers,
        hidden_size=shape.hidden_size,
        heads=heads,
        key_dim=key_dim,
    )


def head_sum(
    logits_HGT: torch.Tensor, *, softcap: float | None = None, sink_logits: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the attention each token gets, added up over heads, fp32 [T].

    Args:
        logits_HGT: scaled.
        sink_logits: [H * G], one logit a head that takes mass and has no token.
    """
    logits_HGT = cap(logits_HGT.float(), softcap)
    lse_HG = torch.logsumexp(logits_HGT, -1)
    if sink_logits is not None:
        lse_HG = torch.logaddexp(lse_HG, sink_logits.float().view_as(lse_HG))
    return torch.exp(logits_HGT - lse_HG[..., None]).sum((0, 1))
