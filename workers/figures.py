"""What the outcomes of the arms of one mode come to, as results.json says it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.arms.catalogue import PRODUCT
from model.outcome import Outcome, bootstrap, spread

HISTORY = (("0", 0, 0), ("1-4", 1, 4), ("5-19", 5, 19), ("20+", 20, 10**9))
AGE = (("0", 0, 0), ("1-4", 1, 4), ("5-19", 5, 19), ("20-99", 20, 99), ("100+", 100, 10**9))
SLICES = 20  # of the test part, for the plot over time

Figures = dict[str, Any]


def mode_figures(
    found: dict[str, tuple[Outcome, NDArray[np.float64]]], warmup: int, touched: NDArray[np.int64]
) -> Figures:
    """Every arm's figures from event `warmup` on, and what the product is ahead of each of the others.

    found: outcome and seconds (calls, 2) as in workers/evaluate.py; touched (N,) events of each item.
    """
    tests = {name: outcome.after(warmup) for name, (outcome, _) in found.items()}
    arms = {name: _arm_figures(tests[name], found[name][1], touched) for name in found}
    if PRODUCT not in tests:
        return {"arms": arms}
    others = {name: _paired(tests[PRODUCT].new(), test.new()) for name, test in tests.items() if name != PRODUCT}
    return {"arms": arms, "upwell_minus": others}


def _paired(one: Outcome, other: Outcome) -> Figures:
    """Mean difference of the same events and its 95 % interval over users."""
    ours, theirs = one.gains(), other.gains()
    differences = {name: ours[name] - theirs[name] for name in ("hr@10", "ndcg@10")}
    count = max(len(one.users), 1)  # a test part may hold repeats alone
    return {name: [float(value.sum()) / count, *bootstrap(value, one.users)] for name, value in differences.items()}


def _arm_figures(test: Outcome, seconds: NDArray[np.float64], touched: NDArray[np.int64]) -> Figures:
    new, opened = test.new(), test.open()
    slices = np.array_split(np.arange(len(new.ranks)), SLICES)
    gains = new.gains()
    return {
        "events": len(new.ranks),
        **new.metrics(),
        "us_per_event": float(1e6 * seconds[:, 1].sum() / seconds[:, 0].sum()),
        "intervals": {name: bootstrap(gains[name], new.users) for name in ("hr@10", "ndcg@10")},
        **spread(new.top, touched),
        "repeats": {"events": len(opened.ranks), "repeated": int(test.repeat.sum()), **opened.metrics()},
        "by_history": _buckets(new, new.histories, HISTORY),
        "by_item_age": _buckets(new, new.earlier, AGE),
        "cold_auc": {name: _cold(new, low, high) for name, low, high in AGE[:2]}
        | {f"0, history {name}": _cold(part, 0, 0) for name, part in _parts(new, new.histories, HISTORY).items()},
        "over_time": [[int(new.position[at[-1]]), float(gains["hr@10"][at].mean())] for at in slices if len(at)],
        "cost_over_time": _cost(seconds),
    }


def _buckets(new: Outcome, of: NDArray[np.int64], edges: Sequence[tuple[str, int, int]]) -> Figures:
    return {
        name: {"events": len(part.ranks), **{key: part.metrics()[key] for key in ("hr@10", "ndcg@10")}}
        for name, part in _parts(new, of, edges).items()
    }


def _parts(new: Outcome, of: NDArray[np.int64], edges: Sequence[tuple[str, int, int]]) -> dict[str, Outcome]:
    return {name: new.where((of >= low) & (of <= high)) for name, low, high in edges}


def _cold(new: Outcome, low: int, high: int) -> Figures:
    """Mean AUC of the events on items with so many earlier ones, among items as cold."""
    cold = new.where((new.earlier >= low) & (new.earlier <= high) & ~np.isnan(new.auc))
    if not len(cold.auc):
        return {"events": 0}
    return {"events": len(cold.auc), "auc": float(cold.auc.mean()), "interval": bootstrap(cold.auc, cold.users)}


def _cost(seconds: NDArray[np.float64]) -> list[list[float]]:
    """Events told so far and microseconds an event, of SLICES stretches of the stream."""
    told, stretches = np.cumsum(seconds[:, 0]), np.array_split(np.arange(len(seconds)), SLICES)
    return [
        [float(told[at[-1]]), float(1e6 * seconds[at, 1].sum() / seconds[at, 0].sum())] for at in stretches if len(at)
    ]
