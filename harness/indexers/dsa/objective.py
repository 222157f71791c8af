"""What a lightning indexer is fitted to and measured by: the attention of the model's own heads, from shards.

KL(attention summed over heads || softmax I), I the indexer's scores through keys rounded to fp8. A stored token that
stands for several counts as many times in every sum.

Shapes: R rows (recorded steps), L layers, M hidden size, S stored tokens (of the prompt, then of the decode steps).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvscope.errors import UsageError
from kvscope.harness.indexers.collection.document import CollectionInfo
from kvscope.harness.indexers.collection.places import Place
from kvscope.harness.indexers.collection.reading import Collection
from kvscope.harness.indexers.training import TrainingOptions
from kvscope.methods.block_budget import default_budget_tokens
from kvscope.methods.dsa.lightning import Lightning, LightningLayer, lightning_scores
from kvscope.methods.fp8_keys import rounded

PAPER_BUDGET_TOKENS = 2048
COLLECT_AGAIN = "collect with kvscope lsa collect --token-samples 2048"


@dataclass(frozen=True, kw_only=True)
class DsaTrainConfig(TrainingOptions):
    """How to train: as every indexer, sizes as in ``methods.dsa.lightning.default_sizes``."""

    epochs: int = 10
    lr: float = 3e-4
    patience: int = 3


@dataclass(frozen=True)
class TokenExample:
    """A document as training sees it.

    Attributes:
        n_tokens: of the prompt.
        query_RLM: states entering the layers at the recorded steps.
        key_LSM: states of the stored tokens.
        target_RLS: attention, mean over heads; sums to 1 over a row, weights included.
        weight_S: tokens each stands for.
        visible_RS: whether a row's step comes at or after the token.
        position_S: of each token in the sequence.
        current_R: where each row's own token is among the stored.
    """

    n_tokens: int
    query_RLM: torch.Tensor
    key_LSM: torch.Tensor
    target_RLS: torch.Tensor
    weight_S: torch.Tensor
    visible_RS: torch.Tensor
    position_S: torch.Tensor
    current_R: torch.Tensor


def check_tokens(collections: Sequence[Collection]) -> None:
    """Check that collections store single tokens.

    Raises:
        UsageError: one does not.
    """
    for collection in collections:
        if not collection.info.token_samples:
            raise UsageError(
                f"Collection '{collection.folder}' stores no single tokens, which a lightning indexer learns from; "
                f"{COLLECT_AGAIN}."
            )
        foreign = sorted(set(collection.info.label_layers) - set(collection.info.layers))
        if foreign:
            raise UsageError(
                f"Collection '{collection.folder}' holds layers {', '.join(map(str, collection.info.layers))}, and a "
                f"lightning indexer needs all that kvscope manages ({', '.join(map(str, foreign))} are missing); "
                "collect without --layers."
            )


def example(place: Place, device: torch.device) -> TokenExample:
    """Load a document."""
    collection, index = place
    document = collection.load(index)
    tokens, weights, mass = document.tokens, document.token_weights, document.token_mass
    token_states, step_mass = document.token_states, document.step_mass
    assert tokens is not None
    assert weights is not None
    assert mass is not None
    assert token_states is not None
    assert step_mass is not None
    steps, n_steps = document.steps.long(), document.info.n_steps
    step_LTM = document.hidden[document.n_states :].transpose(0, 1)
    n_stored = len(tokens)
    visible = torch.ones((len(steps), n_stored + n_steps), dtype=torch.bool)
    visible[:, n_stored:] = torch.arange(n_steps) <= steps[:, None]
    target = torch.cat([mass, step_mass], 2).to(device).float()
    weight = torch.cat([weights, torch.ones(n_steps)]).to(device)
    # Sampling makes the sum miss 1 a little, and sink logits take a share that belongs to no token.
    target = target / (target * weight).sum(2, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return TokenExample(
        n_tokens=document.info.prompt_tokens,
        query_RLM=step_LTM[:, steps].transpose(0, 1).to(device),
        key_LSM=torch.cat([token_states, step_LTM], 1).to(device),
        target_RLS=target,
        weight_S=weight,
        visible_RS=visible.to(device),
        position_S=torch.cat([tokens.long(), document.info.prompt_tokens + torch.arange(n_steps)]).to(device),
        current_R=(n_stored + steps).to(device),
    )


def layer_scores(indexer: LightningLayer, query_RM: torch.Tensor, key_SM: torch.Tensor) -> torch.Tensor:
    """Return the scores of all tokens for all rows, [R, S], as decoding computes them: through stored keys."""
    q_RIE, weight_RI = indexer.queries(query_RM)
    return lightning_scores(q_RIE, rounded(indexer.keys(key_SM)), weight_RI)


def divergence(
    score_RS: torch.Tensor, target_RS: torch.Tensor, weight_S: torch.Tensor, visible_RS: torch.Tensor
) -> torch.Tensor:
    """Return KL(target || softmax score) of each row in nats, [R]."""
    log_weight = weight_S.log()
    log_all_R1 = torch.logsumexp((score_RS + log_weight).masked_fill(~visible_RS, -torch.inf), 1, keepdim=True)
    log_target = target_RS.clamp_min(torch.finfo(torch.float32).tiny).log()
    return (weight_S * target_RS * (log_target - (score_RS - log_all_R1))).sum(1)


def document_loss(
    indexer: Lightning, found: TokenExample, config: DsaTrainConfig, draws: torch.Generator
) -> torch.Tensor:
    """Return the divergence of some rows of a document, mean over rows and layers."""
    rows = torch.randperm(len(found.query_RLM), generator=draws)[: config.batch_rows].sort().values
    rows = rows.to(found.query_RLM.device)
    losses = []
    for at, layer in enumerate(indexer.config.layers):
        score = layer_scores(indexer.layer(layer), found.query_RLM[rows, at], found.key_LSM[at])
        losses.append(divergence(score, found.target_RLS[rows, at], found.weight_S, found.visible_RS[rows]).mean())
    return torch.stack(losses).mean()


def share_taken(order_score_RS: torch.Tensor, found: TokenExample, budget_tokens: int) -> torch.Tensor:
    """Return how much of each stored token the best ``budget_tokens`` hold, between 0 and 1, [R, S].

    The row's own token always comes first. A token that stands for several is taken in part where the budget ends.
    """
    score = order_score_RS.masked_fill(~found.visible_RS, -torch.inf)
    score = score.scatter(1, found.current_R[:, None], torch.inf)
    order = score.argsort(dim=1, descending=True, stable=True)
    weight = torch.where(found.visible_RS, found.weight_S, 0.0).gather(1, order)
    before = weight.cumsum(1) - weight
    taken = ((budget_tokens - before) / weight.clamp_min(1.0)).clamp(0, 1) * (weight > 0)
    return torch.zeros_like(score).scatter(1, order, taken)


@torch.inference_mode()
def measure(indexer: Lightning, held_out: Sequence[Place]) -> dict[str, Any]:
    """Return held-out measures over every recorded step, means over layers.

    ``mass_recall``: share of the attention that the tokens chosen within the default budget hold; ``oracle_recall``:
    that of the best choice.
    """
    device = next(indexer.parameters()).device
    sums = dict.fromkeys(("loss", "mass", "oracle", "rows"), 0.0)
    for place in held_out:
        found = example(place, device)
        budget = default_budget_tokens(found.n_tokens, PAPER_BUDGET_TOKENS)
        for at, layer in enumerate(indexer.config.layers):
            score = layer_scores(indexer.layer(layer), found.query_RLM[:, at], found.key_LSM[at])
            target = found.target_RLS[:, at]
            weighted = found.weight_S * target
            sums["loss"] += float(divergence(score, target, found.weight_S, found.visible_RS).sum())
            sums["mass"] += float((share_taken(score, found, budget) * weighted).sum())
            sums["oracle"] += float((share_taken(target, found, budget) * weighted).sum())
            sums["rows"] += len(target)
    return {
        "held_out_loss": round(sums["loss"] / sums["rows"], 5),
        "mass_recall": round(sums["mass"] / sums["rows"], 4),
        "oracle_recall": round(sums["oracle"] / sums["rows"], 4),
        "held_out_rows": int(sums["rows"]) // len(indexer.config.layers),
    }


def check_model(indexer: Any, info: CollectionInfo, *, folder: str) -> None:
    """Check that an indexer's configuration and a collection belong together.

    Raises:
        UsageError: they do not; the message names both.
    """
    pairs = (
        ("model", f"{indexer.model} ({indexer.model_revision})", f"{info.model} ({info.model_revision})"),
        ("layers", list(indexer.layers), list(info.layers)),
        ("hidden_size", indexer.hidden_size, info.hidden_size),
    )
    for key, mine, theirs in pairs:
        if mine != theirs:
            raise UsageError(f"Indexer '{folder}' and the collection differ in {key}: {mine} against {theirs}.")
