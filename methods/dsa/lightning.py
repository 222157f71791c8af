"""The lightning indexer's score of DeepSeek-V3.2, for an indexer that has been trained.

Shapes: I index heads, T tokens, D index head size.
"""

import torch


def lightning_scores(q_ID: torch.Tensor, k_TD: torch.Tensor, weight_I: torch.Tensor) -> torch.Tensor:
    """Return sum_h w_h relu(q_h . k_s / sqrt(D)) / sqrt(I) of each token, fp32 [T].

    Args:
        q_ID: index queries of one token, rotation applied.
        k_TD: index keys, one a token, shared by the index heads.
        weight_I: head weights of the token.
    """
    n_heads, D = q_ID.shape
    logits_IT = torch.relu(q_ID.float() @ k_TD.float().T * D**-0.5)
    scores_T: torch.Tensor = weight_I.float() * n_heads**-0.5 @ logits_IT
    return scores_T
