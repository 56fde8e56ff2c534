"""Our ISGD and BPR beside River's and FluRS's own, in one loop on one stream. They are no part of the lock:

.venv/bin/uv pip install --target .cache/peers --no-deps river==0.26.1 flurs==0.0.5 narwhals mmh3 cloudpickle
PYTHONPATH=.cache/peers .venv/bin/python -m tests.model.peers ml-100k 20000
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.arms.factors import BprArm, IsgdArm
from model.evaluate import Arm, replayed
from model.sampling import Events, History, Rows
from stream.datasets import load_dataset

Doubles = NDArray[np.float64]
WIDTH, RATE, DECAY = 40, 0.05, 0.01  # both peers step along the gradient of a square: half the rate, twice the decay


class FunkMf:
    """River's FunkMF on positive events, each a 1; it starts from `ours`."""

    batch = 1

    def __init__(self, ours: IsgdArm) -> None:
        rate = import_module("river.optim").SGD(RATE / 2)
        self.model = import_module("river.reco").FunkMF(WIDTH, optimizer=rate, l2=2 * DECAY)
        self.model.u_latents.default_factory = None  # a user is known when `learn` has met him
        self.model.i_latents.update(enumerate(ours.items.copy()))
        self._start = IsgdArm(len(ours.items), WIDTH)

    def score(self, users: Rows, histories: Sequence[History], now_ms: Sequence[int]) -> Doubles:
        items = np.stack([self.model.i_latents[row] for row in range(len(self._start.items))])
        nobody = np.zeros(WIDTH)
        return np.stack([items @ self.model.u_latents.get(user, nobody) for user in users.tolist()])

    def learn(self, events: Events, rows: Rows) -> None:
        for user, row, weight in zip(events.users, rows.tolist(), events.weights, strict=True):
            if weight > 0:
                if user not in self.model.u_latents:
                    self.model.u_latents[user] = self._start.user(user).copy()  # type: ignore[arg-type]  # numbers
                self.model.learn_one(user, row, 1.0)


class Flurs:
    """A recommender of FluRS on positive events: its own start, its own ranking."""

    batch = 1

    def __init__(self, name: str, sign: float, items: int, rate: float, decay: float) -> None:
        np.random.seed(0)
        self._entity, self._sign, self._all = import_module("flurs.data.entity"), sign, np.arange(items)
        self._model: Any = getattr(import_module("flurs.recommender"), name)(WIDTH, decay, rate)
        self._model.initialize()
        for row in range(items):
            self._model.register(self._entity.Item(row))

    def score(self, users: Rows, histories: Sequence[History], now_ms: Sequence[int]) -> Doubles:
        return np.stack([self._scores(user) for user in users.tolist()])

    def _scores(self, user: int) -> Doubles:
        if self._model.is_new_user(user):
            return np.zeros(len(self._all))
        return np.asarray(self._sign * self._model.score(self._entity.User(user), self._all))

    def learn(self, events: Events, rows: Rows) -> None:
        for number, row, weight in zip(events.users, rows.tolist(), events.weights, strict=True):
            user = self._entity.User(number)
            if weight > 0:
                if self._model.is_new_user(number):
                    self._model.register(user)
                self._model.users[number]["known_items"].add(row)
                self._model.update(self._entity.Event(user, self._entity.Item(row)))


def main(stream: str, limit: int) -> None:
    clicks = load_dataset(stream).events[:limit]
    items = list(dict.fromkeys(click.item_id for click in clicks))
    stamps = np.array([click.ts_ms for click in clicks], np.int64)
    users = [click.user_id for click in clicks]
    events = Events(users, [click.item_id for click in clicks], np.ones(len(clicks), np.float32), stamps)
    isgd = IsgdArm(len(items), WIDTH, RATE, DECAY)
    funk = FunkMf(isgd)
    arms: dict[str, Callable[[], Arm]] = {
        "ISGD, ours": lambda: isgd,
        "ISGD, River FunkMF": lambda: funk,
        "ISGD, FluRS MFRecommender": lambda: Flurs("MFRecommender", -1.0, len(items), RATE / 2, DECAY),
        "BPR, ours, 10 negatives": lambda: BprArm(len(items)),
        "BPR, ours, as FluRS": lambda: BprArm(len(items), WIDTH, decay=0.0, negatives=1),
        "BPR, FluRS BPRMFRecommender": lambda: Flurs("BPRMFRecommender", 1.0, len(items), 0.05, 0.0),
    }
    for name, make in arms.items():
        found = replayed(make(), events, items, "line").new().after(limit // 5).metrics()
        print(f"{name:28} HR@10 {found['hr@10']:.4f} NDCG@10 {found['ndcg@10']:.4f}")
    theirs = np.stack([funk.model.i_latents[row] for row in range(len(items))])
    apart = np.abs(theirs - isgd.items).max()
    print(f"item factors, ours and River's after {limit} events: {apart:.1e} apart at most")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
