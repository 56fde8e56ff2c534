from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from model.arms.catalogue import Setting, make_arm
from model.arms.counts import PopularityArm
from model.evaluate import Arm, Mode, replayed
from model.outcome import Ranks, bootstrap, expected_ranks, spread
from model.sampling import Events, History, Rows

ITEMS = [f"item {row}" for row in range(12)]


@given(
    scores=st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=6),
    seed=st.integers(0, 99),
)
def test_expected_rank_is_the_mean_over_all_orders_of_ties(scores: list[list[int]], seed: int) -> None:
    random = np.random.default_rng(seed)
    table, targets = np.array(scores, np.float64), random.integers(0, 5, len(scores))
    allowed = random.random(table.shape) < 0.7
    for line, rank in enumerate(expected_ranks(table, targets, allowed)):
        own = targets[line]
        rivals = [c for c in range(5) if c != own and allowed[line, c]]
        above = sum(table[line, c] > table[line, own] for c in rivals)
        ties = sum(table[line, c] == table[line, own] for c in rivals)
        places = [1 + above + shift for shift in range(ties + 1)]  # each is as likely as the others
        assert rank == (np.mean(places) if allowed[line, own] else np.inf)


def test_metrics_of_known_ranks() -> None:
    ranks = Ranks(np.array([1.0, 3.0, 11.0, np.inf]), np.arange(4), np.arange(4), np.arange(4))
    assert ranks.metrics() == pytest.approx(
        {"hr@10": 0.5, "hr@20": 0.75, "ndcg@10": (1 + 0.5) / 4, "mrr": (1 + 1 / 3 + 1 / 11) / 4}
    )
    assert ranks.after(2).metrics()["hr@10"] == 0.0


def test_bootstrap_resamples_users_with_all_their_events() -> None:
    random = np.random.default_rng(0)
    users = np.repeat(np.arange(200), 10)
    by_user = np.repeat(random.random(200) < 0.5, 10).astype(np.float64)  # a user's events agree
    low, high = bootstrap(by_user, users)
    spread = 1.96 * by_user.std() / np.sqrt(200)  # as if 200 events, not 2,000
    assert high - low == pytest.approx(2 * spread, rel=0.15) and low < by_user.mean() < high


def test_without_events_every_figure_is_0() -> None:
    nobody = np.zeros(0, np.int64)
    ranks = Ranks(np.zeros(0), nobody, nobody, nobody)
    assert set(ranks.metrics().values()) == {0.0} and bootstrap(ranks.gains()["hr@10"], ranks.users) == (0.0, 0.0)


class Spy:
    """Scores by what it has learned and writes down what it was shown."""

    def __init__(self, batch: int) -> None:
        self.batch, self.learned = batch, 0
        self.shown: list[tuple[int, list[int], int]] = []  # events learned before, history, time

    def score(
        self, users: NDArray[np.int64], histories: Sequence[History], now_ms: Sequence[int]
    ) -> NDArray[np.float64]:
        for history, now in zip(histories, now_ms, strict=True):
            self.shown.append((self.learned, history.rows.tolist(), now))
        return np.zeros((len(histories), len(ITEMS)))

    def learn(self, events: Events, rows: NDArray[np.int64]) -> None:
        self.learned += len(events)


STREAM = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 11), st.integers(0, 1)), min_size=1, max_size=40)


@given(stream=STREAM, batch=st.integers(1, 7), mode=st.sampled_from(["line", "strict"]))
def test_nothing_is_shown_before_its_time(stream: list[tuple[int, int, int]], batch: int, mode: Mode) -> None:
    stamps = np.cumsum([step for *_, step in stream])
    users, items = [user for user, *_ in stream], [ITEMS[item] for _, item, _ in stream]
    spy = Spy(batch)
    replayed(spy, Events(users, items, np.ones(len(stream), np.float32), stamps), ITEMS, mode)
    assert spy.learned == len(spy.shown) == len(stream)
    for position, (learned, history, now) in enumerate(spy.shown):
        past = [p for p in range(position) if mode == "line" or stamps[p] < stamps[position]]
        assert history == [stream[p][1] for p in past if users[p] == users[position]]
        assert now == stamps[position] and learned <= (len(past) if mode == "strict" else position)


def test_a_long_stamp_is_ranked_in_parts_as_it_is_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).integers(0, 12, 60)
    events = Events(list(range(60)), [ITEMS[row] for row in rows], np.ones(60, np.float32), np.repeat([0, 1], 30))
    whole = replayed(PopularityArm(12), events, ITEMS, "strict")
    monkeypatch.setattr("model.evaluate.MOST_CELLS", 7 * len(ITEMS))
    asked, score = list[int](), PopularityArm.score

    def counted(arm: PopularityArm, users: Rows, *rest: Any) -> Any:
        asked.append(len(users))
        return score(arm, users, *rest)

    monkeypatch.setattr(PopularityArm, "score", counted)
    parts = replayed(PopularityArm(12), events, ITEMS, "strict")
    assert asked == [7, 7, 7, 7, 2] * 2 and np.array_equal(parts.ranks, whole.ranks)
    assert np.array_equal(parts.position, whole.position) and np.array_equal(parts.open_ranks, whole.open_ranks)


def test_strict_mode_learns_no_trust_from_within_a_stamp() -> None:
    """Each of an item and its partner gives the other away, at one stamp; from one stamp to the next a history says
    nothing and popularity all. A learner whose own histories held what shares the stamp would trust histories."""
    random, half, count = np.random.default_rng(0), 30, 400
    odds = 1 / np.arange(1, half + 1)
    first, users = random.choice(half, count, p=odds / odds.sum()), random.integers(0, count // 4, count)
    items = [f"item {row}" for row in range(2 * half)]
    names = [items[row] for row in (np.repeat(first, 2) + np.tile([0, half], count))]
    stamps = np.repeat(np.arange(count) * 1000, 2)
    events = Events(np.repeat(users, 2).tolist(), names, np.ones(2 * count, np.float32), stamps)
    setting = Setting(items, np.zeros((2 * half, 8), np.float32), "strict", len(events), 0)
    arms: list[Arm] = [make_arm("upwell", setting), PopularityArm(2 * half)]
    own, popular = (replayed(arm, events, items, "strict").new().after(count).metrics()["ndcg@10"] for arm in arms)
    assert own > 0.95 * popular


def stream(rows: list[int], users: list[int], weights: list[float] | None = None) -> Events:
    strengths = np.array(weights or [1.0] * len(rows), np.float32)
    return Events(users, [ITEMS[row] for row in rows], strengths, np.arange(len(rows)) * 1000)


def test_popularity_ranks_by_what_came_before() -> None:
    outcome = replayed(PopularityArm(12), stream([0, 0, 1, 0, 1], [1, 2, 3, 4, 5]), ITEMS, "line")
    assert outcome.ranks.tolist() == [np.inf, 1.0, np.inf, 1.0, 2.0]  # an item never seen is a miss


def test_decayed_popularity_forgets() -> None:
    events = stream([0] * 20 + [1] * 5 + [0], list(range(26)))
    now, ever = (replayed(PopularityArm(12, half), events, ITEMS, "line").ranks[-1] for half in (2.0, 1e9))
    assert (now, ever) == (2.0, 1.0)


def test_repeats_are_scored_only_when_seen_items_may_be_recommended() -> None:
    outcome = replayed(PopularityArm(12), stream([0, 0, 1, 2], [1, 1, 1, 2], [1, 1, 1, -1]), ITEMS, "line")
    assert len(outcome.new().ranks) == 2 and len(outcome.open().ranks) == 3


def test_what_was_only_disliked_is_neither_seen_nor_consumed() -> None:
    """As served: a dislike keeps no item out of the evaluation's lists, and offers none that nobody has liked."""
    own = replayed(PopularityArm(12), stream([0, 0], [1, 1], [-1.0, 1.0]), ITEMS, "line")
    assert len(own.new().ranks) == 1 and own.ranks.tolist() == [np.inf]


def test_repeats_have_a_figure_of_their_own() -> None:
    outcome = replayed(PopularityArm(12), stream([0, 1, 0, 0, 2], [1, 1, 2, 1, 2]), ITEMS, "line")
    assert outcome.repeat.tolist() == [False, False, False, True, False]
    assert outcome.new().position.tolist() == [0, 1, 2, 4]
    assert outcome.ranks[3] == np.inf and outcome.open_ranks[3] == 1.0  # item 0 is the most popular


def test_a_cold_item_is_ranked_among_items_as_cold() -> None:
    class ByRow(Spy):
        def score(
            self, users: NDArray[np.int64], histories: Sequence[History], now_ms: Sequence[int]
        ) -> NDArray[np.float64]:
            return np.broadcast_to(np.arange(12.0), (len(histories), 12))

    outcome = replayed(ByRow(1), stream([3, 5, 3, *[5] * 6], list(range(9))), ITEMS, "line")
    assert outcome.auc[0] == 3 / 11  # of 11 untouched items three stand below item 3
    assert outcome.auc[1] == 4 / 10
    assert outcome.auc[2] == 0.0  # among touched ones: item 5 alone, above it
    assert np.isnan(outcome.auc[8]) and outcome.earlier.tolist() == [0, 0, 1, 1, 2, 3, 4, 5, 6]


def test_what_is_shown_leaves_out_what_was_consumed() -> None:
    outcome = replayed(PopularityArm(12), stream([0, 1, 2, 3], [1, 2, 1, 1]), ITEMS, "line")
    assert [sorted(top[top >= 0]) for top in outcome.top] == [[], [0], [1], [1]]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_an_arm_that_diverges_is_stopped(wrong: float) -> None:
    """NaN ties with nothing: counted as a rank, it would be half a place before the first."""

    class Diverges(PopularityArm):
        def score(
            self, users: NDArray[np.int64], histories: Sequence[History], now_ms: Sequence[int]
        ) -> NDArray[np.float64]:
            return np.where(np.array(now_ms)[:, None] == 2000, wrong, super().score(users, histories, now_ms))

    with pytest.raises(FloatingPointError, match="at event 2"):
        replayed(Diverges(12), stream([0, 1, 2, 3], [1, 2, 1, 2]), ITEMS, "line")


def test_an_arm_may_rule_an_item_out() -> None:
    class Rules(PopularityArm):
        def score(
            self, users: NDArray[np.int64], histories: Sequence[History], now_ms: Sequence[int]
        ) -> NDArray[np.float64]:
            return np.where(np.arange(12) == 0, -np.inf, super().score(users, histories, now_ms))

    outcome = replayed(Rules(12), stream([0, 1, 1], [1, 2, 3]), ITEMS, "line")
    assert outcome.ranks[2] == 1.0 and outcome.top[2].tolist() == [1] + [-1] * 9


def test_spread_of_what_is_shown() -> None:
    touched = np.array([4, 2, 2, 0])
    even = spread(np.array([[0, 1], [2, -1]]), touched)
    assert even == pytest.approx({"coverage": 1.0, "gini": 0.0, "novelty": (1 + 2 + 2) / 3})
    one = spread(np.array([[0, -1], [0, -1]]), touched)
    assert one == pytest.approx({"coverage": 1 / 3, "gini": 2 / 3, "novelty": 1.0})
