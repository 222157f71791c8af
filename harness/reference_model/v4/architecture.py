"""The small DeepSeek-V4's shape, and what training makes of it.

After a trial with stock classes: 8 layers, four residual streams, four experts, AdamW at 2e-3. The first two layers
give a token its neighbours and put them into entries before the next one looks for a match.
"""

from typing import Any

import torch
from transformers import DeepseekV4Config, PreTrainedConfig, PreTrainedModel

from kvscope.errors import UsageError
from kvscope.harness.reference_model.backbone import Backbone, Losses
from kvscope.harness.reference_model.curriculum import Phase
from kvscope.harness.reference_model.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_TOKENS
from kvscope.harness.reference_model.v4.index_loss import index_losses
from kvscope.harness.reference_model.v4.layer import TrainingLayer, TrainingV4, compiled_parts
from kvscope.harness.reference_model.v4.phases import V4_PHASES

SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
LAYER_TYPES = (SLIDING, CSA, SLIDING, CSA, HCA, CSA, HCA, CSA)
MAX_TOKENS = 1 << 17
# Of 20 in the released model: sums of 4 x 4 matrices with logits of deviation 1 miss 1 by 0.005 in one case of a
# hundred then, and twenty would be half of all operations of a layer's compiled parts.
SINKHORN_ITERATIONS = 6
INDEX_TOPK = 128
"""Entries a query attends to once the indexer is trained; before, all it may see."""


def v4_config(**changes: Any) -> DeepseekV4Config:
    """Return the configuration: 16.1 M parameters, 33.2 MB as saved (mixing and norms stay in fp32).

    A quarter of a head rotates, so that most of an entry, and half of an indexer key, is matched by content alone.
    """
    values = {
        "vocab_size": VOCAB_TOKENS,
        "hidden_size": 320,
        "moe_intermediate_size": 256,
        "num_hidden_layers": len(LAYER_TYPES),
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "q_lora_rank": 192,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "o_groups": 2,
        "o_lora_rank": 96,
        "index_n_heads": 8,
        "index_head_dim": 32,
        "index_topk": MAX_TOKENS // 4,
        "sliding_window": 32,
        "hc_mult": 4,
        "hc_sinkhorn_iters": SINKHORN_ITERATIONS,
        "partial_rotary_factor": 0.25,
        "max_position_embeddings": MAX_TOKENS,
        "compress_rates": {CSA: 4, HCA: 32},
        "layer_types": list(LAYER_TYPES),
        "mlp_layer_types": ["moe"] * len(LAYER_TYPES),
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "tie_word_embeddings": True,
    }
    return DeepseekV4Config(**{**values, **changes})


class DeepseekV4(Backbone):
    """Objectives: ``answers`` with every entry in sight, ``indexer`` alone, and ``sparse``: both, with top-k on."""

    name = "deepseek_v4"
    phases = V4_PHASES
    stock_attention = "eager"
    # A rounding sends a token to another expert now and then, and that changes more than a rounding.
    check_tolerance = 0.2
    optimizer = "adamw"
    captured = True

    def __init__(self, *, topk: int = INDEX_TOPK) -> None:
        self.topk = topk

    def config(self) -> PreTrainedConfig:
        return v4_config()

    def build(self, config: PreTrainedConfig, *, seed: int) -> PreTrainedModel:
        torch.manual_seed(seed)
        config._attn_implementation = "eager"
        model: PreTrainedModel = TrainingV4(config).float()
        return model

    def compile(self, model: PreTrainedModel) -> None:
        parts = compiled_parts()
        for layer in model.model.layers:
            assert isinstance(layer, TrainingLayer)
            layer.parts = parts

    def entering(self, base: Any, ids_BT: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        # A plain selection, for the gradient of an embedding waits for the device, which a captured step cannot.
        x_NM = base.embed_tokens.weight.index_select(0, ids_BT.flatten())
        positions = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        rope = {kind: base.rotary_emb(x_NM, positions, layer_type=kind) for kind in ("main", "compress")}
        if torch.is_autocast_enabled(ids_BT.device.type):  # as the released model has them: they are most of a step
            x_NM = x_NM.to(torch.get_autocast_dtype(ids_BT.device.type))
        streams_NSM = x_NM[:, None].repeat(1, base.config.hc_mult, 1)
        return streams_NSM, {"rows": len(ids_BT), "rope": rope, "topk": base.config.index_topk}

    def leaving(self, base: Any, x: torch.Tensor, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTM: torch.Tensor = base.hc_head(x.view(*ids_BT.shape, *x.shape[1:]))
        return x_BTM

    def leaving_at(self, base: Any, x: torch.Tensor, at_N: torch.Tensor) -> torch.Tensor:
        x_1NM: torch.Tensor = base.hc_head(x.index_select(0, at_N)[None])
        return x_1NM[0]

    def by_muon(self, name: str, parameter: torch.nn.Parameter) -> bool:
        # Position biases and the weights that mix streams or route tokens are matrices in shape alone.
        small = ("position_bias", "_hc.fn", "mlp.gate.weight")
        return super().by_muon(name, parameter) and not name.endswith(small)

    def saved_in_fp32(self, name: str) -> bool:
        # As the stock classes load them. transformers 5.17 makes them in bf16 all the same, and rounds what is saved.
        return not TrainingV4.in_fp32.isdisjoint(name.split("."))

    def trains(self, name: str, objective: str) -> bool:
        return objective == "sparse" or (".indexer." in name) == (objective == "indexer")

    def begin(self, model: PreTrainedModel, phase: Phase) -> None:
        if phase.objective not in ("answers", "indexer", "sparse"):
            raise UsageError(f"Phase {phase.name!r} trains for {phase.objective!r}, which {self.name} has no part for.")
        # The saved configuration says what the weights are for. An indexer is trained on what all entries give.
        every = model.config.max_position_embeddings // model.config.compress_rates[CSA]
        model.config.index_topk = self.topk if phase.objective == "sparse" else every

    def measure(self, objective: str) -> str:
        return "mass_recall" if objective == "indexer" else super().measure(objective)

    def losses(self, model: PreTrainedModel, phase: Phase, answers: Losses) -> Losses:
        if phase.objective == "answers":
            return answers
        indexer = index_losses(self, model, topk=self.topk)
        if phase.objective == "indexer":
            return indexer

        def both(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            # States are detached before the indexer, and its choice has no gradient: the two meet nowhere.
            loss, right_N = answers(batch)
            return loss + indexer(batch)[0], right_N

        return both
