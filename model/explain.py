"""Why an item is in a list: what each click adds to its score, as far as the score is a sum over the clicks.

B users, T history, M items. Co-visitation and text are such sums, divided by one length for all clicks; the tower is
not, and popularity knows no clicks: they are the rest.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from model.config import PARTS
from model.mix import situation
from model.model import Model
from model.sampling import History, pad
from model.serving import recency, steps, taken

LINEAR = {"covisitation": ("covisitation.left", "covisitation.right"), "text": ("text.items", "text.items")}


class Contributions(NamedTuple):
    """`amounts[b, m, t]` is what click t of user b adds to the score of its item m."""

    rows: NDArray[np.int64]  # (B, T) rows of the clicked items, -1 where there is none
    amounts: NDArray[np.float32]  # (B, M, T)


def contributions(
    model: Model, histories: Sequence[History], now_ms: Sequence[int], items: NDArray[np.int64]
) -> Contributions:
    """For rows of items (B, M): summed over the clicks, the co-visitation and text parts of their scores."""
    history, at = pad(histories, model.config.history), np.asarray(now_ms, np.int64)
    clicked, weights = np.maximum(history.rows, 0), recency(history.weights * (history.rows >= 0))  # (B, T)
    mix = model.served["mix"][situation(history, at)]  # (B, F)
    amounts = np.zeros((*items.shape, clicked.shape[1]), np.float32)
    for part, (left, right) in LINEAR.items():
        added = steps(taken(model.served[left], clicked), weights, history.disliked)  # (B, T, K)
        length = np.maximum(np.linalg.norm(added.sum(axis=1), axis=1), 1e-12)  # (B,) as F.normalize has it
        scale = mix[:, PARTS.index(part)] / length
        amounts += scale[:, None, None] * (taken(model.served[right], items) @ added.transpose(0, 2, 1))
    return Contributions(history.rows, amounts)


class Reasons(NamedTuple):
    """What speaks for each item, the strongest first: R clicked items, and how much of it all the clicks are."""

    rows: NDArray[np.int64]  # (B, M, R), -1 where there are no more
    shares: NDArray[np.float32]  # (B, M, R) of the sum over all clicks that speak for the item; the others have none
    explained: NDArray[np.float32]  # (B, M) that sum, beside it and the rest of the score where that is above 0


def reasons(found: Contributions, scores: NDArray[np.floating], most: int) -> Reasons:
    """At most so many of each item, whose scores are (B, M). Clicks on one item add up."""
    same = found.rows[:, :, None] == found.rows[:, None, :]  # (B, T, T)
    first = ~np.tril(same, -1).any(axis=2) & (found.rows >= 0)  # (B, T) each clicked item once
    speaking = np.maximum(found.amounts @ same.astype(np.float32), 0.0) * first[:, None]  # (B, M, T)
    totals = speaking.sum(axis=2)
    rest = np.maximum(scores - found.amounts.sum(axis=2), 0.0)
    best = np.argsort(-speaking, axis=2, kind="stable")[:, :, :most]  # (B, M, R)
    strongest = np.take_along_axis(speaking, best, axis=2)
    rows = np.take_along_axis(np.broadcast_to(found.rows[:, None], speaking.shape), best, axis=2)
    shares = strongest / np.maximum(totals, 1e-12)[:, :, None]
    explained = totals / np.maximum(totals + rest, 1e-12)
    return Reasons(np.where(strongest > 0, rows, -1), shares.astype(np.float32), explained.astype(np.float32))
