"""What ``lsa collect --token-samples`` stores of single tokens: attention, states and keys of a sample of the prompt.

All tokens of long prompts would be gigabytes. The tokens that steps attend to most are few and stored as they are; a
random sample stands for the rest, which sums over all tokens (a softmax's denominator) need and nothing else does.

Shapes: S tokens of a prefill chunk, N prompt tokens, K stored ones, Q query heads, T tokens so far, R recorded steps, L
indexed layers, M hidden size, F features a key.
"""

from collections.abc import Sequence

import torch

from kvscope.harness.indexers.collection.document import STORED_DTYPE, TOP_TOKENS, CollectionInfo
from kvscope.methods.base import Collector
from kvscope.methods.store import PromptKV

LEAST_TOKEN_MASS = 1e-3


class TokenStates(Collector):
    """Keeps every token's hidden state and key, side by side, on the host: which are wanted is known after decoding."""

    name = "token_states"
    unrotated_keys = True

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self._rows: list[torch.Tensor] = []

    def chunk(self, k_BHSD: torch.Tensor, v_BHSD: torch.Tensor, hidden_BSM: torch.Tensor, *, start_tokens: int) -> None:
        k_SF = k_BHSD[0].transpose(0, 1).flatten(1)
        self._rows.append(torch.cat([hidden_BSM[0].to(STORED_DTYPE), k_SF.to(STORED_DTYPE)], 1).cpu())

    def finish(self) -> torch.Tensor:
        """Return [N, M + F]."""
        return torch.cat(self._rows) if self._rows else torch.empty(0)


def head_mean(logits_QT: torch.Tensor, sink_logits: torch.Tensor | None) -> torch.Tensor:
    """Return the attention each token gets, mean over query heads, [T] in fp16; a sink's share goes to no token."""
    lse_Q = torch.logsumexp(logits_QT, 1)
    if sink_logits is not None:
        lse_Q = torch.logaddexp(lse_Q, sink_logits.float())
    return torch.exp(logits_QT - lse_Q[:, None]).mean(0).half()


def token_tensors(
    prompt: PromptKV, masses: Sequence[torch.Tensor], info: CollectionInfo, *, n_steps: int, sample: int
) -> dict[str, torch.Tensor]:
    """Return what a document holds of single tokens: those the steps attend to most, and random ones for all others.

    Args:
        masses: of the recorded steps, from ``head_mean``, [L, tokens so far] each.
    """
    if not info.token_samples:
        return {}
    n_prompt, L = prompt.n_tokens, len(info.layers)
    mass_RLN = torch.stack([each[:, :n_prompt] for each in masses])
    step_mass = torch.zeros((len(masses), L, n_steps), dtype=torch.half)
    for row, each in enumerate(masses):
        later = each[:, n_prompt:].cpu()
        step_mass[row, :, : later.shape[1]] = later
    tokens, weights = choose_tokens(mass_RLN, info.token_samples, seed=info.seed * 1_000_003 + sample)
    states = [prompt.metadata[TokenStates.name][layer][tokens] for layer in info.layers]
    states_LKX = torch.stack(states) if n_prompt else torch.zeros((L, 0, info.hidden_size + info.key_features))
    return {
        "tokens": tokens.int(),
        "token_weights": weights,
        "token_states": states_LKX[..., : info.hidden_size].to(STORED_DTYPE),
        "token_keys": states_LKX[..., info.hidden_size :].to(STORED_DTYPE),
        "token_mass": mass_RLN[..., tokens.to(mass_RLN.device)].cpu(),
        "step_mass": step_mass,
    }


def choose_tokens(mass_RLN: torch.Tensor, n_random: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompt tokens to store, ascending on the CPU, and how many tokens each stands for, in fp32.

    Each step and layer names its ``TOP_TOKENS`` best, if they get ``LEAST_TOKEN_MASS``: those stand for themselves. Of
    all others ``n_random`` are drawn and share the others' number, so that weighted sums over what is stored estimate
    sums over the prompt without bias.
    """
    N = mass_RLN.shape[2]
    best = mass_RLN.topk(min(TOP_TOKENS, N), 2)
    named = torch.zeros(N, dtype=torch.bool)
    named[best.indices[best.values >= LEAST_TOKEN_MASS].cpu()] = True
    others = (~named).nonzero()[:, 0]
    weights = torch.ones(N)
    if len(others) > n_random:
        draw = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
        named[others[draw[:n_random]]] = True
        weights[others] = len(others) / n_random
    else:
        named[others] = True
    tokens = named.nonzero()[:, 0]
    return tokens, weights[tokens]
