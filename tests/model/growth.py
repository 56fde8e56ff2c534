"""What an event costs as the catalogue grows: .venv/bin/python -m tests.model.growth 1700 10000 100000

A made-up stream (64 shelves of random texts, 5,000 users of two shelves each, Zipf within a shelf): costs do not depend
on what is learned. Every item is seen once and 100,000 events are absorbed before the clock starts.
"""

import sys
import time
from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_limits

from model.config import ModelConfig
from model.learner import Learner
from model.sampling import Events, History, Rows

SHELVES, USERS, ABSORBED, TIMED = 64, 5000, 100_000, 2048


def spent(work: Callable[[], object]) -> float:
    """Its CPU seconds."""
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(items: int) -> None:
    random = np.random.default_rng(0)
    homes = random.integers(0, SHELVES, (USERS, 2))

    def drawn(start: int, count: int) -> Events:
        users = random.integers(0, USERS, count)
        size = items // SHELVES
        ranks = (size + 1.0) ** random.random(count) - 1  # Zipf
        rows = homes[users, random.integers(0, 2, count)] * size + np.minimum(ranks, size - 1).astype(np.int64)
        return events(users, rows, start)

    def events(users: Rows, rows: Rows, start: int) -> Events:
        stamps = (start + np.arange(len(rows))) * 1000
        return Events(users.tolist(), [str(row) for row in rows], np.ones(len(rows), np.float32), stamps)

    learner = Learner(ModelConfig(warmup_steps=0))
    texts = random.normal(size=(items, 384)).astype(np.float32)
    learner.add_items([str(row) for row in range(items)], texts / np.linalg.norm(texts, axis=1, keepdims=True))
    learner.absorb(events(random.integers(0, USERS, items), random.permutation(items), 0))
    learner.absorb(drawn(items, ABSORBED))
    learning = spent(lambda: learner.learn(drawn(items + ABSORBED, TIMED))) / TIMED
    refresh = spent(lambda: learner._refresh(True)) / max(1000, items // 8)
    building = spent(learner.model)
    model = learner.model()
    vectors = model.item_vectors()
    past = [History(random.integers(0, items, 50), np.ones(50, np.float32), np.arange(50)) for _ in range(64)]
    scoring = spent(lambda: model.user_vectors(past, [10**9] * 64) @ vectors.T) / 64
    print(
        f"{items:7} items: learning {1e6 * learning:5.0f} µs an event, with about {1e6 * refresh:4.0f} of factorising"
    )
    print(f"{'':14} scoring all items {1e6 * scoring:4.0f} µs; freezing a model {1e3 * building:4.0f} ms", flush=True)


if __name__ == "__main__":
    threadpool_limits(1)
    for argument in sys.argv[1:]:
        measure(int(argument))
