"""Why an item is in a list: what each click adds to its score, as far as the score is a sum over the clicks.

B users, T history, M items. Co-visitation and text are such sums, divided by one length for all clicks; the tower is
not, and popularity knows no clicks: they are the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from model.config import PARTS
from model.mix import situation
from model.model import Model, recency
from model.sampling import History, pad

LINEAR = {"covisitation": ("covisitation.left", "covisitation.right"), "text": ("text.items", "text.items")}


class Contributions(NamedTuple):
    """`amounts[b, m, t]` is what click t of user b adds to the score of its item m."""

    rows: NDArray[np.int64]  # (B, T) rows of the clicked items, -1 where there is none
    amounts: NDArray[np.float32]  # (B, M, T)


@torch.no_grad()
def contributions(
    model: Model, histories: Sequence[History], now_ms: Sequence[int], items: NDArray[np.int64]
) -> Contributions:
    """For rows of items (B, M): summed over the clicks, the co-visitation and text parts of their scores."""
    history, at = pad(histories, model.config.history), np.asarray(now_ms, np.int64)
    clicked = torch.from_numpy(history.rows).to(model.device)
    weights = recency(torch.from_numpy(history.weights).to(model.device) * (clicked >= 0))  # (B, T)
    mix = model.arrays["mix"][torch.from_numpy(situation(history, at)).to(model.device)]  # (B, F)
    amounts = torch.zeros(*items.shape, clicked.shape[1], device=model.device)
    for part, (left, right) in LINEAR.items():
        steps = weights.unsqueeze(2) * model.arrays[left][clicked.clamp_min(0)]  # (B, T, K)
        length = steps.sum(dim=1).norm(dim=1).clamp_min(1e-12)  # (B,) as F.normalize has it
        scale = mix[:, PARTS.index(part)] / length
        wanted = model.arrays[right][torch.from_numpy(items).to(model.device)]  # (B, M, K)
        amounts += scale[:, None, None] * (wanted @ steps.transpose(1, 2))
    return Contributions(history.rows, amounts.cpu().numpy())


class Reasons(NamedTuple):
    """What speaks for one item: clicked rows with their shares, largest first, and how much of it all they are."""

    rows: list[int]
    shares: list[float]  # of the sum of all clicks that speak for the item; those that speak against it have none
    explained: float  # that sum, beside it and the rest of the score where the rest speaks for the item too


def reasons(
    rows: NDArray[np.int64], amounts: NDArray[np.float32], scores: NDArray[np.floating], most: int
) -> list[Reasons]:
    """At most so many reasons of each of a user's items, from the clicks' rows (T,), their amounts (M, T) and the
    items' scores (M,). Clicks on one item add up."""
    clicked, place = np.unique(rows[rows >= 0], return_inverse=True)
    sums = amounts[:, rows >= 0] @ (place[:, None] == np.arange(len(clicked)))  # (M, C)
    speaking = np.maximum(sums, 0.0)
    totals = speaking.sum(axis=1)
    rest = np.maximum(scores - sums.sum(axis=1), 0.0)
    best = np.argsort(-speaking, axis=1, kind="stable")[:, :most]
    found = []
    for total, other, line, order in zip(totals, rest, speaking, best, strict=True):
        order = order[line[order] > 0]
        shares = line[order] / max(total, 1e-12)
        found.append(Reasons(clicked[order].tolist(), shares.tolist(), float(total / max(total + other, 1e-12))))
    return found
