"""Diversity against its definition, exploration against what it says of itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.rules import chances, diversify, explore


def candidates(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    vectors = draw.normal(size=(size, 4))
    return np.sort(draw.normal(size=size))[::-1], vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@given(st.integers(1, 30), st.integers(1, 40), st.floats(0, 1), st.integers(0, 5))
def test_each_place_is_the_best_of_what_is_left(size: int, k: int, diversity: float, seed: int) -> None:
    scores, vectors = candidates(size, seed)
    order = diversify(scores, vectors, diversity, k)
    assert sorted(order) == list(range(size))
    assert list(order[k:]) == sorted(order[k:])
    relevance = (scores - scores.min()) / max(scores[0] - scores[-1], 1e-12)
    for place in range(min(k, size) if diversity and size > 2 else 0):
        above = vectors[order[:place]]

        def worth(item: int, above: np.ndarray = above) -> float:
            likeness = max((float(vectors[item] @ other) for other in above), default=0.0)
            return float((1 - diversity) * relevance[item] - diversity * likeness)

        assert worth(order[place]) >= max(map(worth, order[place:])) - 1e-9


def test_more_diversity_is_less_alike_and_none_is_the_order() -> None:
    def alike(diversity: float) -> float:
        """Mean likeness within lists of ten."""
        lists = [(vectors, diversify(scores, vectors, diversity, 10)[:10]) for scores, vectors in some]
        return float(np.mean([(vectors[order] @ vectors[order].T).mean() for vectors, order in lists]))

    some = [candidates(100, seed) for seed in range(20)]
    assert alike(0.0) > alike(0.1) > alike(0.3) and alike(1.0) < alike(0.0) / 2
    assert list(diversify(*candidates(9), 0.0, 3)) == list(range(9))


@given(st.integers(1, 60), st.integers(1, 40), st.floats(0, 1), st.integers(0, 9))
def test_an_explored_list_holds_k_different_candidates(size: int, k: int, share: float, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(size)
    chosen = explore(order, k, share, np.random.default_rng(seed))
    assert len(set(chosen)) == len(chosen) == min(k, size) and set(chosen) <= set(range(size))
    chance = chances(order, k, share)
    assert chance.sum() == pytest.approx(min(k, size))
    assert ((chance >= 0) & (chance <= 1 + 1e-12)).all() and (share == 0 or (chance[order] > 0).all() or share < 1e-9)
    if share == 0:
        assert list(chosen) == list(order[:k]) and set(chance[chosen]) == {1.0}


@pytest.mark.parametrize(("size", "k", "share"), [(30, 6, 0.2), (12, 10, 0.6), (8, 8, 0.5), (9, 3, 1.0)])
def test_the_chances_are_those_of_the_draw(size: int, k: int, share: float) -> None:
    """20,000 lists: how often each candidate came, within five standard errors."""
    order, draw, rounds = np.random.default_rng(1).permutation(size), np.random.default_rng(2), 20_000
    came = np.bincount(np.concatenate([explore(order, k, share, draw) for _ in range(rounds)]), minlength=size) / rounds
    chance = chances(order, k, share)
    assert (np.abs(came - chance) <= 5 * np.sqrt(chance * (1 - chance) / rounds) + 1e-9).all()
