import numpy as np
from numpy.typing import NDArray

from model.config import PARTS
from model.mix import Mix, bucket


def noise(seed: int, events: int = 32, candidates: int = 40) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(len(PARTS), events, candidates)).astype(np.float32)


def learn(mix: Mix, part: int, seed: int, history: int, strength: float = 2.0) -> float:
    parts = noise(seed)
    targets = np.random.default_rng(seed + 10_000).integers(0, 40, 32)
    parts[part, np.arange(32), targets] += strength
    lengths = np.full(32, history)
    return float(mix.learn(parts, targets, np.zeros((32, 40), np.bool_), bucket(lengths)).mean())


def test_bucket_edges() -> None:
    assert bucket(np.array([0, 1, 4, 5, 19, 20, 50])).tolist() == [0, 1, 1, 2, 2, 3, 3]


def test_weight_moves_to_the_part_that_knows_the_target() -> None:
    for part in range(len(PARTS)):
        mix = Mix(rate=0.1, candidates=40)
        losses = [learn(mix, part, seed, history=30) for seed in range(200)]
        weights = mix.weights()[3]
        assert weights.argmax() == part and weights[part] > 4 * np.abs(np.delete(weights, part)).max()
        assert np.mean(losses[-50:]) < 2.05  # the optimum is about 1.97, chance 3.69


def test_buckets_learn_apart_and_share() -> None:
    mix = Mix(rate=0.1, candidates=40)
    for seed in range(100):
        learn(mix, 0, 2 * seed, history=0)
        learn(mix, 1, 2 * seed + 1, history=30)
    weights = mix.weights()
    assert weights[0, 0] > weights[0, 1] + 1 and weights[3, 1] > weights[3, 0] + 1
    assert weights[1, 0] > 0.3 and weights[1, 1] > 0.3  # a bucket without events profits from both


def test_loss_is_cross_entropy_over_the_allowed_candidates() -> None:
    mix, parts = Mix(rate=0.1, candidates=1000), noise(0, events=3, candidates=9)
    excluded = np.random.default_rng(1).random((3, 9)) < 0.4
    targets, buckets = np.array([2, 0, 8]), np.array([0, 1, 3])
    total = np.einsum("fbc,bf->bc", parts, mix.weights()[buckets])
    losses = mix.learn(parts, targets, excluded, buckets)
    for line, target in enumerate(targets):
        rivals = [c for c in range(9) if c == target or not excluded[line, c]]
        expected = np.log(np.exp(total[line, rivals]).sum()) - total[line, target]
        np.testing.assert_allclose(losses[line], expected, rtol=1e-5)


def test_restore_goes_on_from_the_weights() -> None:
    mix, again = Mix(0.1, 40), Mix(0.1, 40)
    learn(mix, 2, 0, history=3)
    again.restore(mix.weights())
    np.testing.assert_allclose(again.weights(), mix.weights(), atol=1e-6)


def test_a_part_that_fills_the_best_is_not_blamed_for_targets_outside_them() -> None:
    """Popular items are taken more often, but most targets are not among the ten most popular."""
    random, popularity = np.random.default_rng(0), -np.log(np.arange(1, 2001)).astype(np.float32)
    mix, odds = Mix(rate=0.1, candidates=10), np.exp(popularity) / np.exp(popularity).sum()
    for _ in range(300):
        parts = np.zeros((len(PARTS), 32, 2000), np.float32)
        parts[-1] = popularity
        targets = random.choice(2000, 32, p=odds)
        mix.learn(parts, targets, np.zeros((32, 2000), np.bool_), np.zeros(32, np.int64))
    assert 0.7 < mix.weights()[0, -1] < 1.3  # 1 is the truth; it starts at 0.5
