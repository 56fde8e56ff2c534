import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.popularity import Popularity

EVENTS = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([1.0, 2.0, -0.5])), min_size=1, max_size=60)


def slow_counts(events: list[tuple[int, float]], half_life: float) -> NDArray[np.float64]:
    counts = np.zeros(5)
    for row, weight in events:
        counts *= 0.5 ** (1 / half_life)
        counts[row] += weight
    return np.maximum(counts, 0)


@given(events=EVENTS, cut=st.integers(0, 60), half_life=st.sampled_from([0.3, 7.0, 1e9]))
def test_equals_counts_that_shrink_at_every_event(events: list[tuple[int, float]], cut: int, half_life: float) -> None:
    popularity = Popularity((half_life, 3.0))
    popularity.grow(5)
    for part in (events[:cut], events[cut:]):
        popularity.add(np.array([e[0] for e in part], np.int64), np.array([e[1] for e in part], np.float32))
    expected = np.stack([slow_counts(events, half_life), slow_counts(events, 3.0)], axis=1)
    np.testing.assert_allclose(popularity.values(), expected, rtol=1e-6, atol=1e-9)


def test_survives_more_half_lives_than_a_float_has_powers_of_two() -> None:
    popularity = Popularity((1.0,))
    popularity.grow(2)
    for _ in range(80):
        popularity.add(np.zeros(64, np.int64), np.ones(64, np.float32))
    np.testing.assert_allclose(popularity.values()[:, 0], [2.0, 0.0])


def test_any_number_of_events_may_come_at_once() -> None:
    """Of one stamp in strict mode, a whole day: the unit grew past what a float holds within the call."""
    at_once, in_parts = Popularity((125.0,)), Popularity((125.0,))
    rows, weights = np.arange(130_000) % 3, np.ones(130_000, np.float32)
    for popularity, size in ((at_once, 130_000), (in_parts, 64)):
        popularity.grow(3)
        for start in range(0, len(rows), size):
            popularity.add(rows[start : start + size], weights[start : start + size])
    np.testing.assert_allclose(at_once.values(), in_parts.values(), rtol=1e-6)


def test_a_new_item_has_log_popularity_zero() -> None:
    popularity = Popularity((5.0,))
    popularity.grow(1)
    popularity.add(np.array([0]), np.array([3.0], np.float32))
    popularity.grow(2)
    np.testing.assert_allclose(popularity.log()[:, 0], [np.log(4.0), 0.0])
