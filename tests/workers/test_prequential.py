"""The live baseline against its definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.user_state import digest
from workers import metrics, prequential
from workers.prequential import (
    HALF_LIFE_EVENTS,
    TRIAL,
    TRIAL_CLICKS,
    TRIAL_MIN,
    DecayedPopularity,
    LiveScore,
    Trial,
    hide_trial,
)

items = st.integers(0, 12).map(str)


@given(st.lists(items, max_size=60), items, st.sets(items, max_size=5), st.integers(1, 4))
def test_a_hit_is_a_place_among_the_k_most_popular_unseen(past: list[str], target: str, seen: set[str], k: int) -> None:
    popularity = DecayedPopularity()
    for item in past:
        popularity.learn(item)
    scores: dict[str, float] = {}
    for age, item in enumerate(reversed(past)):
        scores[item] = scores.get(item, 0) + 2 ** (-age / HALF_LIFE_EVENTS)
    seen = seen - {target}
    above = sum(1 for item, score in scores.items() if item not in seen and score > scores.get(target, 0) * (1 - 1e-12))
    expected = target in scores and above - 1 < k  # the target itself is among those above
    place = popularity.place(target, b"".join(map(digest, seen)))
    assert (place is not None and place < k) == expected


def test_weights_are_rescaled_before_they_overflow() -> None:
    popularity = DecayedPopularity()
    popularity.learn("old")
    popularity._weight = 1e100
    for item in ("a", "b", "b"):
        popularity.learn(item)
    assert popularity.place("b", b"") == 0
    assert popularity.place("a", b"") == 1


def test_what_has_decayed_to_nothing_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that are clicked once, of strangers' making too, must not add up; the others keep their places."""
    monkeypatch.setattr(prequential, "HALF_LIFE_EVENTS", 10)
    popularity = DecayedPopularity()
    for number in range(3000):
        popularity.learn(f"once {number}" if number % 3 else f"often {number % 2}")
        assert len(popularity._rows) <= 400 and len(popularity._scores) <= 1024
    assert [popularity.place(item, b"") for item in ("often 1", "often 0", "once 2999", "once 2")] == [0, 1, 2, None]
    assert popularity.place("once 2990", b"".join(map(digest, ("often 1", "once 2999")))) == 6


def test_the_gauges_are_of_the_newest_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prequential, "WINDOW", 4)
    score = LiveScore()
    for served in (["x"], ["x"], ["a"], ["x"], ["y", "z", "a"], ["a"]):
        score.add("a", b"", served)
    assert metrics.hit_rate.labels("served")._value.get() == 0.75  # of a x a a
    assert metrics.live_ndcg.labels("served")._value.get() == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert metrics.hit_rate.labels("popularity")._value.get() == 0.0


def test_a_trial_tells_worse_from_equal() -> None:
    """Equal rankings of chance never lose; one that has lost half of its hits does, and soon."""
    draw = np.random.default_rng(0)
    lost = 0
    for _ in range(200):
        trial = Trial("new", "old")
        for new, old in draw.random((TRIAL_MIN, 2)) < 0.2:
            trial.add("a", ["a"] if new else [], ["a"] if old else [])
        lost += trial.worse
    assert lost <= 2
    trial = Trial("new", "old")
    while not trial.worse and not trial.over:
        new, old = draw.random(2) < (0.1, 0.2)
        trial.add("a", ["a"] if new else [], ["a"] if old else [])
    assert trial.worse
    assert TRIAL_MIN <= trial.clicks < TRIAL_CLICKS


def test_a_trial_s_gauges_are_of_its_clicks_and_go_with_it() -> None:
    def shown() -> dict[str, list[float]]:
        gauges = metrics.hit_rate, metrics.live_ndcg
        return {ranking: [gauge.labels(ranking)._value.get() for gauge in gauges] for ranking in TRIAL}

    trial = Trial("new", "old")
    for new, old in ((["a"], ["b", "a"]), (["b"], ["b", "a"])):
        trial.add("a", new, old)
    assert shown() == {"trial": [0.5, 0.5], "previous": [1.0, pytest.approx(1 / np.log2(3))]}
    hide_trial()
    hide_trial()
    named = {sample.labels["ranking"] for gauge in (metrics.hit_rate, metrics.live_ndcg)
             for family in gauge.collect() for sample in family.samples}  # fmt: skip
    assert not named & set(TRIAL)


def test_a_trial_of_twins_ends_undecided() -> None:
    trial = Trial("new", "old")
    while not trial.over:
        trial.add("a", ["a"], ["a"])
        assert not trial.worse
    assert trial.clicks == TRIAL_CLICKS
