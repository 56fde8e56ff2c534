"""The tower's loss. Legend: P predictions, C candidates."""

from __future__ import annotations

import torch
from torch import Tensor


def softmax_loss(scores: Tensor, targets: Tensor, excluded: Tensor, weights: Tensor, log_expansion: Tensor) -> Tensor:
    """Weighted mean cross-entropy of each target among the candidates; scalar.

    scores (P, C); targets (P,) candidate columns; excluded (P, C) bool, candidates that must not act as
    negatives (consumed items); weights (P,) >= 0. log_expansion (C,) is log(1 / P(candidate is drawn)): 0 for
    a full softmax, and it makes the sampled denominator unbiased (Bengio & Senecal 2008).
    """
    excluded = excluded.scatter(1, targets[:, None], False)  # the target always competes
    own = scores.gather(1, targets[:, None]).squeeze(1)  # (P,)
    logits = (scores + log_expansion).masked_fill(excluded, float("-inf"))  # (P, C)
    losses = torch.logsumexp(logits, dim=1) - own  # (P,)
    return (losses * weights).sum() / weights.sum().clamp_min(1e-6)
