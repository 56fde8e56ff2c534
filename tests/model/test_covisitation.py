import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.covisitation import Covisitation, Factors
from model.sampling import EventLog

ITEMS, LENGTH, HALF_LIFE = 6, 4, 9.0
Stream = list[tuple[int, int, float]]  # user, item, weight
STREAMS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, ITEMS - 1), st.sampled_from([1.0, 1.0, -0.5])), min_size=1, max_size=40
)


def slow_counts(stream: Stream) -> NDArray[np.float64]:
    counts, pasts = np.zeros((ITEMS, ITEMS)), dict[int, list[tuple[int, float]]]()
    for user, item, weight in stream:
        counts *= 0.5 ** (1 / HALF_LIFE)
        past = pasts.setdefault(user, [])
        for distance, (older, strength) in enumerate(reversed(past[-LENGTH:])):
            if older != item:
                counts[older, item] += np.exp(-distance / 8) * strength * weight
                counts[item, older] += np.exp(-distance / 8) * strength * weight
        past.append((item, weight))
    return counts


def fed(stream: Stream, size: int = 5, max_pairs: int = 1000) -> Covisitation:
    log, covisitation = EventLog(10_000, True), Covisitation(HALF_LIFE, max_pairs)
    covisitation.grow(ITEMS)
    for start in range(0, len(stream), size):
        users, items, weights = zip(*stream[start : start + size], strict=True)
        rows, strengths = np.array(items, np.int64), np.array(weights, np.float32)
        numbers = log.append(users, rows, strengths, np.zeros(len(rows), np.int64))
        covisitation.add(rows, strengths, log.before(numbers, LENGTH))
    return covisitation


@given(stream=STREAMS, size=st.integers(1, 7))
@settings(deadline=None)
def test_counts_equal_a_loop_over_events(stream: Stream, size: int) -> None:
    np.testing.assert_allclose(fed(stream, size).counts().toarray(), slow_counts(stream), rtol=1e-5, atol=1e-7)


def test_counts_survive_a_thousand_half_lives() -> None:
    stream = [(0, row % ITEMS, 1.0) for row in range(1000 * int(HALF_LIFE))]
    np.testing.assert_allclose(fed(stream, 64).counts().toarray(), slow_counts(stream), rtol=1e-4)


def test_a_negative_event_lowers_the_items_neighbours() -> None:
    together: Stream = [(user, item, 1.0) for user in range(3) for item in (0, 1, 2)]
    liked, disliked = (fed([*together, (9, 0, 1.0), (9, 1, weight)]).counts().toarray() for weight in (1.0, -1.0))
    assert disliked[0, 1] < liked[0, 1]
    assert disliked[0, 1] < fed([*together, (9, 0, 1.0)]).counts().toarray()[0, 1]


def factors(stream: Stream, rank: int, rounds: int) -> tuple[Factors, NDArray[np.float64]]:
    covisitation, touched = fed(stream), np.ones(ITEMS)
    for _ in range(rounds):  # every round starts from the last basis, as on the stream
        found = covisitation.factorise(touched, rank, seed=0)
    return found, covisitation.damped(touched).toarray()


STREAM: Stream = [(user, int(item), 1.0) for user in range(30) for item in np.roll(np.arange(ITEMS), user)[:4]]


def test_counts_are_damped_by_how_often_either_item_is_touched() -> None:
    """Else whatever is popular is everything's neighbour."""
    covisitation, touched = fed(STREAM), np.linspace(0, 50, ITEMS)
    expected = covisitation.counts().toarray() / (touched[:, None] + 1) ** 0.3 / (touched + 10) ** 0.5
    np.testing.assert_allclose(covisitation.damped(touched).toarray(), expected, rtol=1e-6)


@pytest.mark.parametrize("rank", [2, 4, ITEMS, ITEMS + 3])
def test_factors_are_the_best_of_their_rank(rank: int) -> None:
    found, damped = factors(STREAM, rank, rounds=20)
    left, values, right = np.linalg.svd(damped)
    kept = min(rank, ITEMS)
    best = (left[:, :kept] * values[:kept]) @ right[:kept]
    assert found.left.shape == found.right.shape == (ITEMS, rank)
    assert np.linalg.norm(found.left @ found.right.T - damped) <= np.linalg.norm(best - damped) + 1e-5


def test_items_without_pairs_have_zero_factors_and_the_others_unit_mean_square() -> None:
    found, _ = factors([(0, 0, 1.0), (0, 1, 1.0), (1, 2, 1.0)], 3, rounds=1)
    norms = np.square(found.right).sum(axis=1)
    np.testing.assert_allclose(norms[2:], 0, atol=1e-6)
    np.testing.assert_allclose(norms[:2].mean(), 1, rtol=1e-4)


def test_nothing_seen_factorises_to_zeros() -> None:
    covisitation = Covisitation(HALF_LIFE, 10)
    covisitation.grow(3)
    found = covisitation.factorise(np.zeros(3), 2, seed=0)
    assert not found.left.any() and not found.right.any()


def test_only_the_largest_pairs_are_kept() -> None:
    stream: Stream = [(user, item, 1.0) for user in range(5) for item in (0, 1)]
    stream += [(7, item, 1.0) for item in (2, 3, 4, 5)]
    counts = fed(stream, size=len(stream), max_pairs=1).counts()
    assert counts.nnz == 2 and counts[0, 1] == counts[1, 0] > 0


def test_a_dislike_is_as_large_a_pair_as_a_like() -> None:
    pairs: Stream = [(0, 0, 1.0), (0, 1, 1.0), (1, 2, 1.0), (1, 3, -5.0)]
    counts = fed(pairs, size=len(pairs), max_pairs=1).counts()
    assert counts.nnz == 2 and counts[2, 3] == counts[3, 2] < 0
