"""The tower's loss. Legend: P predictions, C candidates."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def softmax_loss(scores: Tensor, targets: Tensor, excluded: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross-entropy of each target among the candidates; scalar. Overwrites the excluded `scores`.

    scores (P, C); targets (P,) candidate columns; excluded (P, C) bool, candidates that must not act as
    negatives (consumed items); weights (P,) >= 0. With log(1 / P(candidate is drawn)) added to the scores of a sample,
    0 for the targets, its denominator is unbiased (Bengio & Senecal 2008).
    """
    places = targets.unsqueeze(1)
    with torch.no_grad():  # what is excluded has no share, so no gradient: autograd need not know
        own = scores.gather(1, places)  # the target always competes
        scores.masked_fill_(excluded, float("-inf")).scatter_(1, places, own)
    losses = F.cross_entropy(scores, targets, reduction="none")  # (P,)
    return (losses * weights).sum() / weights.sum().clamp_min(1e-6)
