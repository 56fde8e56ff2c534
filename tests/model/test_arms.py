"""Every arm on a chain with a known answer, on noise, and the counting ones against slow twins."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.arms.catalogue import ARMS, Setting, check_names, make_arm
from model.arms.counts import CovisitationArm
from model.arms.factors import BprArm, IsgdArm
from model.arms.neighbours import UserKnnArm
from model.arms.neural import RetrainedArm
from model.arms.text import TextArm
from model.arms.variants import NEVER, Delayed
from model.covisitation import Covisitation
from model.evaluate import Arm, Mode, replayed
from model.popularity import Popularity
from model.sampling import Events, History, Rows, pad
from tests.model.test_learner import ITEMS, chain

N = 40


def tastes(events: int, seed: int = 0) -> Events:
    """100 users, each of one of four tastes: ten items each."""
    random = np.random.default_rng(seed)
    users = random.integers(0, 100, events)
    return log(users.tolist(), (users % 4 * 10 + random.integers(0, 10, events)).tolist())


def log(users: Sequence[int], rows: Sequence[int], stamps: Sequence[int] | None = None) -> Events:
    times = np.array(stamps if stamps is not None else range(len(rows)), np.int64) * 1000
    return Events(list(users), [ITEMS[row] for row in rows], np.ones(len(rows), np.float32), times)


def hit_rate(arm: Arm, events: Events, exclude_seen: bool = False, mode: Mode = "line") -> float:
    outcome = replayed(arm, events, ITEMS, mode)
    ranks = outcome.new() if exclude_seen else outcome.open()
    return ranks.after(2 * len(events) // 3).metrics()["hr@10"]


def sequential() -> dict[str, Arm]:
    return {
        "markov": make_arm("markov", setting(900)),
        "covisitation": CovisitationArm(N),
        "gru4rec": RetrainedArm("gru4rec", N, 300, steps=90, width=32, length=8, exclude_seen=False),
        "sasrec": RetrainedArm("sasrec", N, 300, steps=90, width=32, length=8, exclude_seen=False),
    }


def personal() -> dict[str, Arm]:
    return {"user-knn": UserKnnArm(N, neighbours=20), "isgd": IsgdArm(N), "bpr": BprArm(N)}


def setting(events: int, mode: Mode = "line") -> Setting:
    random = np.random.default_rng(3)
    return Setting(ITEMS, random.normal(size=(N, 16)).astype(np.float32), mode, events, events // 5)


@pytest.mark.parametrize("name", sequential())
def test_a_chain_is_followed(name: str) -> None:
    assert hit_rate(sequential()[name], chain(900, 0.0)) > 0.9


@pytest.mark.parametrize("name", personal())
def test_tastes_are_told_apart(name: str) -> None:
    """A user who has seen n of the ten items of a taste meets one of the others: popularity would hit 10 of 40."""
    assert hit_rate(personal()[name], tastes(2400), exclude_seen=False) > 0.6


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_what_a_user_has_consumed_is_no_negative(exclude_seen: bool) -> None:
    """Users who have consumed everything teach nothing then; the bias moves with any loss."""
    arm = RetrainedArm("gru4rec", 5, 20, steps=2, width=8, length=8, exclude_seen=exclude_seen)
    rows = np.tile(np.arange(5), 4)
    arm.learn(log(np.repeat(np.arange(4), 5).tolist(), rows.tolist()), rows)
    assert bool(arm._bias.detach().any()) is not exclude_seen


def test_sasrec_is_asked_at_a_place_that_is_trained() -> None:
    """After the newest of as many events as it reads."""
    arm = RetrainedArm("sasrec", N, 300, steps=1, width=32, length=8)
    arm.learn(chain(300, 0.2), np.array([ITEMS.index(item) for item in chain(300, 0.2).items]))
    positions = arm._net.positions
    assert isinstance(positions, torch.Tensor) and positions.grad is not None
    assert positions.grad.norm(dim=1).min() > 0


@pytest.mark.parametrize("kind", ["gru4rec", "sasrec"])
def test_a_user_is_told_the_same_whoever_else_is_asked(kind: str) -> None:
    """The others' longer histories pad this one's."""
    arm = RetrainedArm(kind, N, 300, width=32)
    few, many = seen([3, 5, 8]), seen([*range(N)])
    together = arm.score(np.array([0, 1]), [few, many], [0, 0])
    np.testing.assert_allclose(together[:1], arm.score(np.array([0]), [few], [0]), atol=1e-5)


def test_gru4rec_passes_over_a_dislike() -> None:
    arm, rows = RetrainedArm("gru4rec", N, 300, width=32), np.array([3, 5, 8])
    disliked = History(rows, np.array([1, -1, 1], np.float32), np.zeros(3, np.int64))
    found = arm.score(np.array([0, 1]), [disliked, seen([3, 8])], [0, 0])
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_text_finds_what_reads_alike() -> None:
    random = np.random.default_rng(0)
    text = np.repeat(random.normal(size=(4, 16)), 10, axis=0) + 0.1 * random.normal(size=(N, 16))
    assert hit_rate(TextArm(text.astype(np.float32)), tastes(600)) > 0.9


@pytest.mark.parametrize("name", [*sequential(), *personal(), "popularity", "popularity-decayed", "text"])
def test_noise_stays_at_chance(name: str) -> None:
    arm = (sequential() | personal()).get(name) or make_arm(name, setting(1200))
    assert abs(hit_rate(arm, chain(1200, 1.0)) - 10 / N) < 0.06


def test_exact_covisitation_is_the_sparse_one_of_the_model() -> None:
    events = chain(200, 0.5)
    rows = np.array([ITEMS.index(item) for item in events.items], np.int64)
    arm, counts, touched = CovisitationArm(N, 100.0), Covisitation(100.0, 10_000), Popularity((100.0,))
    counts.grow(N)
    touched.grow(N)
    past: dict[object, list[int]] = {}
    for at in range(200):
        arm.learn(events.slice(at, at + 1), rows[at : at + 1])
        history = past.setdefault(events.users[at], [])
        counts.add(rows[at : at + 1], np.ones(1, np.float32), pad([seen(history)], 50))
        touched.add(rows[at : at + 1], np.ones(1, np.float32))
        history.append(int(rows[at]))
    damped = counts.damped(touched.values()[:, 0]).toarray()
    asked = [past[user] for user in (3, 7)]
    expected = [np.exp(-np.arange(len(rows))[::-1] / 5.0) @ damped[rows] for rows in asked]
    found = arm.score(np.array([3, 7]), [seen(rows) for rows in asked], [0, 0])
    np.testing.assert_allclose(found, expected, atol=3e-6, rtol=1e-4)


def seen(rows: Sequence[int]) -> History:
    return History(np.array(rows, np.int64), np.ones(len(rows), np.float32), np.zeros(len(rows), np.int64))


@pytest.mark.parametrize("neighbours", [7, 1000])
def test_user_knn_is_the_sum_over_the_nearest_users(neighbours: int) -> None:
    events = tastes(150)
    rows = [ITEMS.index(item) for item in events.items]
    arm = UserKnnArm(N, length=5, neighbours=neighbours)
    arm.learn(events, np.array(rows, np.int64))
    done: dict[int, list[int]] = {}
    for user, row in zip(events.users, rows, strict=True):
        mine = done.setdefault(user, [])  # type: ignore[arg-type]
        mine += [row] if row not in mine else []
    query = [11, 14, 12, 17, 13]
    recency = {row: math.exp((at - 4) / 5) for at, row in enumerate(query)}
    alike = {user: sum(recency.get(row, 0.0) for row in mine) for user, mine in done.items() if user != 99}
    votes = arm._vote(99, np.array(query, np.int64))
    edge = sorted(alike.values(), reverse=True)[min(neighbours, len(alike)) - 1]
    sure = np.zeros(N)
    for user, value in alike.items():
        if value > edge or (value and neighbours > len(alike)):  # whatever the ties at the edge
            mine = done[user]
            shared = mine.index(max(set(mine) & set(query), key=query.index))
            for at, row in enumerate(mine):
                sure[row] += value * math.exp(-abs(at - shared) / 12)
    assert sure.any() and (votes >= sure - 1e-9).all()
    if neighbours > len(alike):
        np.testing.assert_allclose(votes, sure)


def test_isgd_moves_a_score_towards_one_by_the_rule() -> None:
    arm = IsgdArm(3, width=4, rate=0.1, decay=0.05)
    user, item = arm.user(0).copy(), arm.items[1].copy()
    arm.learn(log([0], [1]), np.array([1]))
    error = 1 - user @ item
    np.testing.assert_allclose(arm.user(0), user + 0.1 * (error * item - 0.05 * user))
    np.testing.assert_allclose(arm.items[1], item + 0.1 * (error * user - 0.05 * item))


def baskets(count: int) -> Events:
    """Every basket: a random item, then its partner (+ 20), at one stamp, each by a new user."""
    random = np.random.default_rng(0)
    rows = np.repeat(random.integers(0, 20, count), 2) + np.tile([0, 20], count)
    return log(np.repeat(np.arange(count), 2).tolist(), rows.tolist(), np.repeat(np.arange(count), 2).tolist())


@pytest.mark.parametrize("name", ["markov", "covisitation", "user-knn", "gru4rec", "upwell"])
def test_strict_mode_does_not_leak_within_a_basket(name: str) -> None:
    """The partner is obvious to whoever sees the first half; line by line they all do."""
    found = {}
    for mode in ("line", "strict"):
        short = RetrainedArm("gru4rec", N, 125, mode == "line", steps=220, length=8)
        arm = short if name == "gru4rec" else make_arm(name, setting(500, mode))
        late = replayed(arm, baskets(250), ITEMS, mode).new().after(350)
        found[mode] = float((late.ranks[late.position % 2 == 1] == 1).mean())
    assert found["line"] > 0.8 and found["strict"] < 0.25


@pytest.mark.parametrize("part", ["tower", "covisitation"])
def test_a_removed_part_has_no_weight_and_the_rest_learns(part: str) -> None:
    arm = make_arm(f"upwell-without-{part}", setting(600))
    assert hit_rate(arm, chain(600, 0.0), exclude_seen=True) > 0.6
    weights = arm._model.arrays["mix"].numpy()  # type: ignore[attr-defined]
    assert (weights[:, ("tower", "covisitation").index(part)] == 0).all() and np.abs(weights).sum() > 0


class Spy:
    def __init__(self, batch: int = 1) -> None:
        self.batch = batch
        self.learned: list[int] = []
        self.at: list[tuple[int, list[int]]] = []

    def score(self, users: Rows, histories: Sequence[History], now_ms: Sequence[int]) -> NDArray[np.float64]:
        self.at += [(len(self.learned), history.rows.tolist()) for history in histories]
        return np.zeros((len(histories), N))

    def learn(self, events: Events, rows: Rows) -> None:
        self.learned += rows.tolist()


@pytest.mark.parametrize(
    ("state_ms", "weights_ms", "known", "told"),
    [
        (0, 0, [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]),
        (2000, 0, [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]),
        (0, 2000, [0, 1, 2, 3, 4], [0, 1, 2, 2, 4, 4]),
        (0, NEVER, [0, 1, 2, 3, 4], [0, 1, 2, 2, 2, 2]),
    ],
)
def test_late_state_and_late_weights(state_ms: int, weights_ms: int, known: list[int], told: list[int]) -> None:
    spy = Spy()
    replayed(Delayed(spy, state_ms, weights_ms, warmup=2), log([1] * 6, range(6)), ITEMS, "line")
    assert [learned for learned, _ in spy.at] == told  # before each event, one a second
    assert spy.at[5][1] == known


def test_a_batch_across_the_end_of_a_period_is_cut_there() -> None:
    """Batches of 4 events, periods of 3: event 6 begins a period, 4 and 5 are told only with their batch."""
    spy = Spy(batch=4)
    replayed(Delayed(spy, 0, 3000, warmup=0), log([1] * 12, range(12)), ITEMS, "line")
    assert [learned for learned, _ in spy.at] == [0, 0, 0, 0, 3, 3, 4, 4, 6, 8, 8, 8]


def test_names() -> None:
    check_names([*ARMS, "upwell-state-minute-weights-hour", "upwell-weights-never"])
    for name in ("nobody", "upwell-state-never", "upwell-"):
        with pytest.raises(ValueError, match="no arm"):
            make_arm(name, setting(10))


@pytest.mark.parametrize("name", ["bpr", "sasrec", "upwell"])
def test_a_seed_fixes_a_run(name: str) -> None:
    events, found = chain(300, 0.3), list[NDArray[np.float64]]()
    for _ in range(2):
        short = RetrainedArm("sasrec", N, 100, steps=5, length=8)
        arm = short if name == "sasrec" else make_arm(name, setting(300))
        found.append(replayed(arm, events, ITEMS, "line").ranks)
        torch.rand(3)  # the global generator plays no part
    assert np.array_equal(found[0], found[1])
