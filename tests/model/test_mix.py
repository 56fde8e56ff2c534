import numpy as np
from numpy.typing import NDArray

from model.config import PARTS, PERSONAL, SITUATIONS
from model.mix import Mix, situation
from model.sampling import History, pad

STRANGER, PAGE, LONG = 2, 9, 11  # no history; 20+ events, the last seconds or days ago


def noise(seed: int, events: int = 32, candidates: int = 40) -> NDArray[np.float32]:
    parts = np.random.default_rng(seed).normal(size=(len(PARTS), events, candidates)).astype(np.float32)
    parts[PERSONAL:] = parts[PERSONAL:, :1]  # the same for everyone
    return parts


def learn(mix: Mix, part: int, seed: int, where: int, strength: float = 2.0) -> float:
    parts = noise(seed)
    targets = np.random.default_rng(seed + 10_000).integers(0, 40, 32)
    parts[part, np.arange(32), targets] += strength
    return float(mix.learn(parts, targets, np.zeros((32, 40), np.bool_), np.full(32, where)).mean())


def test_situations_are_history_length_by_pause() -> None:
    def found(length: int, pause_ms: int) -> int:
        past = History(np.arange(length), np.ones(length, np.float32), np.full(length, 1000))
        return int(situation(pad([past], 50), np.array([1000 + pause_ms]))[0])

    assert [found(length, 0) for length in (1, 4, 5, 19, 20, 50)] == [3, 3, 6, 6, 9, 9]
    assert [found(20, pause) for pause in (59_999, 60_000, 86_399_999, 86_400_000)] == [9, 10, 10, 11]
    assert found(0, 5) == STRANGER and SITUATIONS == 12


def test_weight_moves_to_the_part_that_knows_the_target() -> None:
    for part in range(PERSONAL):
        mix = Mix(candidates=40, half_life=10_000.0)
        losses = [learn(mix, part, seed, PAGE) for seed in range(200)]
        weights = mix.weights()[PAGE]
        assert weights.argmax() == part and weights[part] > 4 * np.abs(np.delete(weights, part)).max()
        assert np.mean(losses[-50:]) < 2.05  # the optimum is about 1.97, chance 3.69


def test_situations_learn_apart_and_share() -> None:
    mix = Mix(candidates=40, half_life=10_000.0)
    for seed in range(100):
        learn(mix, 0, 2 * seed, STRANGER)
        learn(mix, 1, 2 * seed + 1, PAGE)
    weights = mix.weights()
    assert weights[STRANGER, 0] > weights[STRANGER, 1] + 1 and weights[PAGE, 1] > weights[PAGE, 0] + 1
    assert weights[8, 0] > 0.3 and weights[8, 1] > 0.3  # a situation without events profits from both
    assert weights[LONG, 1] > weights[8, 1]  # the more so from one of its history length


def test_the_past_fades() -> None:
    mix = Mix(candidates=40, half_life=500.0)
    for seed in range(400):
        learn(mix, 0 if seed < 200 else 1, seed, PAGE)
    weights = mix.weights()[PAGE]
    assert weights[1] > 1.5 and abs(weights[0]) < 0.3


def test_loss_is_cross_entropy_over_the_allowed_candidates() -> None:
    mix, parts = Mix(candidates=1000, half_life=10_000.0), noise(0, events=3, candidates=9)
    excluded = np.random.default_rng(1).random((3, 9)) < 0.4
    targets, situations = np.array([2, 0, 8]), np.array([STRANGER, PAGE, LONG])
    total = np.einsum("fbc,bf->bc", parts, mix.weights()[situations])
    losses = mix.learn(parts, targets, excluded, situations)
    for line, target in enumerate(targets):
        rivals = [c for c in range(9) if c == target or not excluded[line, c]]
        expected = np.log(np.exp(total[line, rivals]).sum()) - total[line, target]
        np.testing.assert_allclose(losses[line], expected, rtol=1e-5)


def test_restore_goes_on_from_the_weights() -> None:
    mix, again = Mix(40, 10_000.0), Mix(40, 10_000.0)
    for seed in range(100):
        learn(mix, 2, seed, PAGE)
    again.restore(mix.weights())
    np.testing.assert_allclose(again.weights(), mix.weights(), atol=1e-6)
    learn(again, 0, 1000, STRANGER)
    change = np.abs(again.weights() - mix.weights())
    assert 0 < change.max() < 0.5  # one batch does not overrule a hundred


def test_a_part_that_fills_the_best_is_not_blamed_for_targets_outside_them() -> None:
    """Popular items are taken more often, but most targets are not among the ten most popular."""
    random, popularity = np.random.default_rng(0), -np.log(np.arange(1, 2001)).astype(np.float32)
    mix, odds = Mix(candidates=10, half_life=10_000.0), np.exp(popularity) / np.exp(popularity).sum()
    for _ in range(300):
        parts = np.zeros((len(PARTS), 32, 2000), np.float32)
        parts[PARTS.index("popular")] = popularity
        targets = random.choice(2000, 32, p=odds)
        mix.learn(parts, targets, np.zeros((32, 2000), np.bool_), np.full(32, STRANGER))
    assert 0.7 < mix.weights()[STRANGER, PARTS.index("popular")] < 1.3  # 1 is the truth; it starts at 0.5


def test_users_who_have_the_popular_items_do_not_turn_popularity_around_for_strangers() -> None:
    """What the first 320 events of ml-100k did: an inverted order of popularity for users without history."""
    mix, popular = Mix(candidates=40, half_life=10_000.0), slice(PERSONAL, PERSONAL + 3)
    for seed in range(3):
        parts = noise(seed)
        parts[popular] = np.log1p(np.arange(40) // 10)  # the same order at all half-lives, as in a young stream
        targets = np.random.default_rng(seed).integers(0, 25, 32)  # of the unpopular
        mix.learn(parts, targets, np.zeros((32, 40), np.bool_), np.full(32, PAGE))
    assert mix.weights()[STRANGER, popular].sum() > 0


def test_an_event_that_stands_for_three_counts_and_forgets_as_three() -> None:
    thin, whole = (Mix(candidates=40, half_life=200.0) for _ in range(2))
    for seed in range(20):
        parts, targets = noise(seed), np.random.default_rng(seed).integers(0, 40, 32)
        parts[seed // 10, np.arange(32), targets] += 2.0
        barred, where = np.zeros((32, 40), np.bool_), np.full(32, PAGE)
        thin.learn(parts, targets, barred, where, stands_for=3)
        whole.learn(np.tile(parts, (1, 3, 1)), np.tile(targets, 3), np.tile(barred, (3, 1)), np.tile(where, 3))
    np.testing.assert_allclose(thin.weights(), whole.weights(), rtol=1e-4, atol=1e-5)
