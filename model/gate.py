"""Whether a candidate model may replace the serving one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model.evaluate import Ranks, expected_ranks
from model.learner import Learner
from model.model import Model
from model.sampling import Events, History, Past

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Slice:
    """Held-out events, newest of the stream, with what was known before each; rows are the candidate's."""

    events: Events  # (n,)
    histories: Sequence[History]  # (n,)
    consumed: Sequence[Rows]  # (n,) arrays: rows that must not be recommended


@dataclass(frozen=True)
class Verdict:
    accepted: bool
    reason: str
    metrics: dict[str, float] = field(default_factory=dict)


def hold_out(learner: Learner, events: Events) -> Slice:
    """Events that the learner has not seen, each with what its user had done before: what the learner knows,
    and the slice's own earlier events. Items that the learner does not know stay out of histories."""
    row_of = {item: row for row, item in enumerate(learner.ids)}
    pasts: dict[Hashable, tuple[list[Past], set[int]]] = {}
    histories, consumed = [], []
    columns = (events.users, events.items, events.weights.tolist(), events.ts_ms.tolist())
    for user, item, weight, ts_ms in zip(*columns, strict=True):
        past, taken = pasts.setdefault(user, learner.log.past(user, learner.config.history))
        rows, weights, stamps = zip(*past[-learner.config.history :], strict=True) if past else ((), (), ())
        histories.append(History(np.array(rows, np.int64), np.array(weights, np.float32), np.array(stamps, np.int64)))
        consumed.append(np.array(sorted(taken), np.int64))
        row = row_of.get(item)
        if row is not None:
            past.append((row, weight, ts_ms))
            taken |= {row} if weight > 0 else set()
    return Slice(events, histories, consumed)


def judge(candidate: Model, serving: Model | None, held_out: Slice, text: Floats) -> Verdict:
    """Accepts a candidate whose NDCG@10 on the slice is above the serving model's.

    Both rank the candidate's whole catalogue minus the consumed items. An item that the serving model does
    not know is scored by its text (N, E), as the fresh segment would serve it, and is missing in its
    histories. A weight or score that is not finite is refused whatever the rank. Without a serving model, or
    without a positive event on a known item in the slice, finite weights suffice.
    """
    if not candidate.finite() or not np.isfinite(candidate.item_vectors()).all():
        return Verdict(False, "a weight of the candidate is not finite")
    row_of = {item: row for row, item in enumerate(candidate.ids)}
    targets = np.array([row_of.get(item, -1) for item in held_out.events.items], np.int64)
    chosen = np.flatnonzero((targets >= 0) & (held_out.events.weights > 0))
    metrics = {"events": float(len(chosen))}
    if not len(chosen):
        return Verdict(True, "no event of the slice can be compared", metrics)
    own = _ndcg(candidate, candidate.item_vectors(), held_out.histories, held_out, targets, chosen)
    metrics["candidate_ndcg@10"] = own
    if not np.isfinite(own):
        return Verdict(False, "a score of the candidate is not finite", metrics)
    if serving is None:
        return Verdict(True, "first model", metrics)
    other = _ndcg(*_covering(serving, candidate, held_out.histories, text), held_out, targets, chosen)
    metrics["serving_ndcg@10"] = other
    verb = "above" if own > other else "not above"
    return Verdict(own > other, f"NDCG@10 {own:.4f} is {verb} the serving model's {other:.4f}", metrics)


def _ndcg(
    model: Model, items: Floats, histories: Sequence[History], held_out: Slice, targets: Rows, chosen: Rows
) -> float:
    """NDCG@10 of the chosen events over items (N, D); NaN when a score is not finite."""
    ranks = []
    for start in range(0, len(chosen), 256):  # 256 x N scores at a time
        part = chosen[start : start + 256]
        users = model.user_vectors([histories[i] for i in part], held_out.events.ts_ms[part].tolist())
        with np.errstate(over="ignore", invalid="ignore"):
            scores = users @ items.T  # (B, N)
        if not np.isfinite(scores).all():
            return float("nan")
        allowed = np.ones(scores.shape, np.bool_)
        for line, index in enumerate(part):
            allowed[line, held_out.consumed[index]] = False
        allowed[np.arange(len(part)), targets[part]] = True
        ranks.append(expected_ranks(scores, targets[part], allowed))
    joined = np.concatenate(ranks)
    return Ranks(joined, chosen, chosen, chosen).metrics()["ndcg@10"]


def _covering(
    serving: Model, candidate: Model, histories: Sequence[History], text: Floats
) -> tuple[Model, Floats, list[History]]:
    """The serving model with the candidate's newer items, its vectors (N, D) for the candidate's catalogue, and
    the histories in its rows."""
    known = set(serving.ids)
    new = [row for row, item in enumerate(candidate.ids) if item not in known]
    serving = serving.extended([candidate.ids[row] for row in new], text[new])
    place = {item: row for row, item in enumerate(serving.ids)}
    rows = np.array([place[item] for item in candidate.ids], np.int64)  # (N,)
    return serving, serving.item_vectors()[rows], [History(rows[h.rows], h.weights, h.ts_ms) for h in histories]
