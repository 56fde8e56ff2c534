"""Whether a candidate model may replace the serving one.

Legend: n events, N items, E text, D vector, B events ranked at once.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from model.learner import Learner
from model.model import Model
from model.outcome import Ranks, expected_ranks
from model.sampling import Events, Floats, History, Past, Rows

SHOWN = 20  # of the list for a stranger; what the worker sends by default
MUCH = 0.02  # share of the slice's clicks from which an item is looked at, shown or not
MIN_COMPARED = 10  # events; fewer are no evidence, and refuse every candidate but a first model
DEEPEST = 200  # ranks beyond it are equally bad: the mix is taught among the best 200, what comes after is noise
# Share of an item's users who have consumed something else too, relative to that share over all items. Lowest among
# the twenty most popular items, half-lives of 300 to 20,000 events, at eleven places each of online-retail, ml-100k,
# movietweetings, beauty and ptt: 0.43 where an item had 20 users or more.
MIN_SUPPORT, MIN_USERS = 0.25, 20


@dataclass(frozen=True)
class Slice:
    """Held-out events, newest of the stream, with what was known before each; rows are the candidate's."""

    events: Events  # (n,)
    histories: Sequence[History]  # (n,)
    consumed: Sequence[Rows]  # (n,) arrays: rows that must not be recommended
    users: Rows  # (N,) users who had consumed each item before the slice
    busy_users: Rows  # (N,) those of them who had consumed another item as well


@dataclass(frozen=True)
class Verdict:
    """Of `judge`, with its reason; metrics: events compared, NDCG@10 and mean rank of both as far as it got to them."""

    accepted: bool
    reason: str
    metrics: dict[str, float] = field(default_factory=dict)


def hold_out(learner: Learner, events: Events) -> Slice:
    """Events that the learner has not seen, each with what its user had done before: what the learner knows,
    and the slice's own earlier events. Items that the learner does not know stay out of histories."""
    pasts: dict[Hashable, tuple[list[Past], set[int]]] = {}
    histories, consumed = [], []
    columns = (events.users, events.items, events.weights.tolist(), events.ts_ms.tolist())
    for user, item, weight, ts_ms in zip(*columns, strict=True):
        if user not in pasts:
            pasts[user] = learner.log.past(user, learner.config.history)
        past, taken = pasts[user]
        histories.append(History.of(*zip(*past[-learner.config.history :], strict=True)))
        consumed.append(np.array(sorted(taken), np.int64))
        row = learner.rows.get(item)
        if row is not None:
            past.append((row, weight, ts_ms))
            taken |= {row} if weight > 0 else set()
    return Slice(events, histories, consumed, *learner.log.consumers(len(learner.ids)))


def judge(candidate: Model, serving: Model | None, held_out: Slice, text: Floats) -> Verdict:
    """Accepts a candidate that ranks the slice's events better than the serving model: NDCG@10 above, and the
    geometric mean of the ranks (200 at most) below. NDCG@10 is what users see, but it hears hits alone, some 40 of 400
    events: the mean rank hears every other one, so that luck at the top does not pass for learning. Where neither hits,
    as in a large, young catalogue, the mean rank alone decides, if it is no luck: see `_surely_before`.

    Both rank the candidate's whole catalogue minus the consumed items; an event on one of those tells nothing. An
    item that the serving model does not know is scored by its text (N, E), as the fresh segment would serve it, and
    stands in its histories by that. Refused whatever the ranks: a weight or score that is not finite, and an item,
    shown to strangers or much clicked, that only strangers click; and a slice with fewer than MIN_COMPARED events to
    compare. Without a serving model finite weights and scores suffice.
    """
    if not candidate.finite() or not np.isfinite(items := candidate.item_vectors()).all():
        return Verdict(False, "a weight of the candidate is not finite")
    row_of = {item: row for row, item in enumerate(candidate.ids)}
    targets = np.array([row_of.get(item, -1) for item in held_out.events.items], np.int64)
    positive = (targets >= 0) & (held_out.events.weights > 0)
    new = np.array([row not in taken for row, taken in zip(targets, held_out.consumed, strict=True)], np.bool_)
    chosen = np.flatnonzero(positive & new)
    metrics = {"events": float(len(chosen))}
    own = _ranks(candidate, items, held_out.histories, held_out, targets, chosen)
    if own is None:
        return Verdict(False, "a score of the candidate is not finite", metrics)
    if len(chosen):
        metrics |= {"candidate_ndcg@10": _ndcg(own), "candidate_mean_rank": _mean_rank(own)}
    if serving is None:
        return Verdict(True, "first model", metrics)
    if pushed := _pushed(candidate, items, held_out, targets[positive]):
        return Verdict(False, pushed, metrics)
    if len(chosen) < MIN_COMPARED:
        reason = f"only {len(chosen)} of the {len(held_out.events)} newest events can be compared"
        return Verdict(False, f"{reason}, {MIN_COMPARED} are needed", metrics)
    other = _ranks(*_covering(serving, candidate, held_out.histories, text), held_out, targets, chosen)
    if other is None:
        return Verdict(True, "a score of the serving model is not finite", metrics)
    metrics |= {"serving_ndcg@10": _ndcg(other), "serving_mean_rank": _mean_rank(other)}
    silent = _ndcg(own) == _ndcg(other) == 0
    before = _surely_before(own, other) if silent else _ndcg(own) > _ndcg(other)
    better = before and _mean_rank(own) < _mean_rank(other)
    said = "surely better in rank, without a hit in either" if silent else "better in both"
    figures = (f"NDCG@10 {_ndcg(ranks):.4f} and mean rank {_mean_rank(ranks):.1f}" for ranks in (own, other))
    return Verdict(better, f"{'' if better else 'not '}{said}: {' against '.join(figures)}", metrics)


def _pushed(candidate: Model, items: Floats, held_out: Slice, clicked: Rows) -> str:
    """Names an item whose users have consumed nothing else, clicks that no taste explains: one of those SHOWN to a
    user without history, or MUCH of the clicked rows (c,). Empty when there is none."""
    scores = items @ candidate.user_vectors([History.of()], [0])[0]  # (N,)
    looked_at = np.argsort(-scores, kind="stable")[:SHOWN]
    looked_at = np.append(looked_at, np.flatnonzero(np.bincount(clicked) >= MUCH * len(clicked)))
    users, busy = held_out.users, held_out.busy_users
    usual = busy.sum() / max(1, users.sum())
    for row in looked_at:
        if users[row] >= MIN_USERS and busy[row] < MIN_SUPPORT * usual * users[row]:
            share = f"{busy[row]} of its {users[row]} users have consumed anything else"
            return f"clicks on item {candidate.ids[row]} look made up: {share}"
    return ""


def _ndcg(ranks: NDArray[np.float64]) -> float:
    return Ranks(ranks, *(np.arange(len(ranks)),) * 3).metrics()["ndcg@10"]


def _mean_rank(ranks: NDArray[np.float64]) -> float:
    return float(np.exp(np.log(np.minimum(ranks, DEEPEST)).mean()))


def _surely_before(own: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Whether the own ranks are lower, event by event, by three deviations of a sign test. By the mean alone
    random ranks among 10,000 items would pass half the time where what serves has 2 % of the events in its best 200."""
    signs = np.sign(np.minimum(other, DEEPEST) - np.minimum(own, DEEPEST))
    return bool(signs.sum() > 3 * np.sqrt(np.abs(signs).sum()))


def _ranks(
    model: Model, items: Floats, histories: Sequence[History], held_out: Slice, targets: Rows, chosen: Rows
) -> NDArray[np.float64] | None:
    """Ranks (c,) of the chosen events over items (N, D); None when a score is not finite."""
    ranks = []
    for start in range(0, len(chosen), 256):  # 256 x N scores at a time
        part = chosen[start : start + 256]
        users = model.user_vectors([histories[i] for i in part], held_out.events.ts_ms[part].tolist())
        with np.errstate(over="ignore", invalid="ignore"):
            scores = users @ items.T  # (B, N)
        if not np.isfinite(scores).all():
            return None
        allowed = np.ones(scores.shape, np.bool_)
        for line, index in enumerate(part):
            allowed[line, held_out.consumed[index]] = False
        ranks.append(expected_ranks(scores, targets[part], allowed))
    return np.concatenate([*ranks, np.zeros(0)])


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
