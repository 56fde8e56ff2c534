from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.gate import Slice, hold_out, judge
from model.learner import Learner
from model.model import Model
from model.sampling import Events, History

CONFIG = ModelConfig(
    text_dim=16, tower_dim=8, covisitation_rank=8, projected_text_dim=8, history=8, warmup_steps=0, replay=4
)
ITEMS = [f"item {row}" for row in range(30)]
TEXT = np.random.default_rng(7).normal(size=(30, 16)).astype(np.float32)
ONES = np.ones(30, np.float32)
MANY = np.full(30, 60)


def learner(items: int = 30) -> Learner:
    made = Learner(CONFIG)
    made.add_items(ITEMS[:items], TEXT[:items])
    return made


def pairs(made: Learner) -> Model:
    """A model that has seen 2k and 2k + 1 together, many times."""
    for user in range(60):
        order = [ITEMS[(item + 2 * user) % 30] for item in range(16)]
        made.learn(Events([user] * 16, order, ONES[:16], np.arange(16) * 1000))
    return made.model()


@cache
def trained() -> Model:
    return pairs(learner())


def good() -> Model:
    return trained().frozen()


def held_out() -> Slice:
    """Strangers click an even item; the next one is its partner."""
    events = Events([f"new {row}" for row in range(15)], ITEMS[1::2], ONES[:15], np.full(15, 99_000))
    pasts = [History(np.array([row]), ONES[:1], np.array([98_000])) for row in range(0, 30, 2)]
    return Slice(events, pasts, [np.array([row]) for row in range(0, 30, 2)], MANY, MANY)


def test_a_better_candidate_is_accepted_and_a_worse_one_refused() -> None:
    blank = learner().model()
    accepted, refused = judge(good(), blank, held_out(), TEXT), judge(blank, good(), held_out(), TEXT)
    assert accepted.accepted and accepted.metrics["candidate_ndcg@10"] > 0.5
    assert not refused.accepted and "not better" in refused.reason
    assert refused.metrics["serving_ndcg@10"] == accepted.metrics["candidate_ndcg@10"]


def test_a_candidate_as_good_as_the_serving_model_is_refused() -> None:
    assert not judge(good(), good(), held_out(), TEXT).accepted


def test_a_weight_that_is_not_finite_is_refused_even_without_a_serving_model() -> None:
    model = good()
    model.arrays["tower.ids"].view(-1)[3] = float("inf")
    verdict = judge(model, None, held_out(), TEXT)
    assert not verdict.accepted and "finite" in verdict.reason


def test_the_user_tower_is_looked_at_too() -> None:
    model = good()
    model.tower.start[0] = float("nan")
    assert not judge(model, None, held_out(), TEXT).accepted


def test_scores_that_overflow_are_refused() -> None:
    model = good()
    model.arrays["popularity"].fill_(-3e38)
    model.arrays["mix"].fill_(3e38)
    assert model.finite() and not judge(model, None, held_out(), TEXT).accepted


def test_a_serving_model_whose_scores_overflow_is_replaced() -> None:
    broken = good()
    broken.arrays["popularity"].fill_(-3e38)
    broken.arrays["mix"].fill_(3e38)
    verdict = judge(good(), broken, held_out(), TEXT)
    assert verdict.accepted and verdict.reason == "a score of the serving model is not finite"


def test_the_first_model_needs_only_finite_weights() -> None:
    assert judge(learner().model(), None, held_out(), TEXT).accepted


def in_order(rows: list[int]) -> Model:
    """Ranks the rows alike for everybody, in this order."""
    model = good()
    model.arrays["mix"].zero_()[:, -1] = 1.0
    model.arrays["popularity"][rows, -1] = torch.arange(30.0, 0.0, -1.0)
    return model


def test_what_its_user_has_consumed_does_not_stand_before_a_target() -> None:
    """The list would leave it out; each event has its own, whichever events count."""
    first, evens = in_order([*range(0, 30, 2), *range(1, 30, 2)]), np.arange(0, 30, 2)
    consumed = [np.append(rows, rows[0] + 1) if line < 5 else evens for line, rows in enumerate(held_out().consumed)]
    metrics = judge(first, None, replace(held_out(), consumed=consumed), TEXT).metrics
    assert metrics["candidate_mean_rank"] == pytest.approx(np.exp(np.log(np.arange(6, 16)).mean()))


def test_more_events_than_are_ranked_at_once_are_each_ranked_after_their_own_past() -> None:
    one = held_out()
    events = Events([*one.events.users] * 20, [*one.events.items] * 20, np.tile(ONES[:15], 20), np.full(300, 99_000))
    many = Slice(events, [*one.histories] * 20, [*one.consumed] * 20, MANY, MANY)
    for model in (good(), learner().model()):  # all ranks are 1; ranks of all kinds
        few, all_ = (judge(model, None, slice_, TEXT).metrics for slice_ in (one, many))
        assert all_ == pytest.approx(few | {"events": 300.0}, rel=1e-9)


def test_held_out_events_know_what_their_users_did_before() -> None:
    """In the window and in the slice; what is disliked is in the history and may still be recommended."""
    made = learner()
    made.learn(Events(["u"] * 7, ITEMS[:7], ONES[:7], np.arange(7) * 1000))
    users, items = ["u", "new", "u", "u", "u", "new"], [ITEMS[row] for row in (20, 9, 21, 22, 23, 8)]
    weights = np.array([-1, 1, 1, 1, 1, 1], np.float32)
    slice_ = hold_out(made, Events(users, items, weights, np.arange(7, 13) * 1000))
    seven = [*range(7)]
    assert [past.rows.tolist() for past in slice_.histories] == [
        seven, [], [*seven, 20], [*seven[1:], 20, 21], [*seven[2:], 20, 21, 22], [9]
    ]  # fmt: skip
    assert slice_.histories[2].weights.tolist() == [*[1.0] * 7, -1.0]
    assert [rows.tolist() for rows in slice_.consumed] == [seven, [], seven, [*seven, 21], [*seven, 21, 22], [9]]


def test_luck_at_the_top_does_not_pass_for_learning() -> None:
    """One of 15 targets first and the others last, against all of them in the middle."""
    others, targets = list(range(0, 30, 2)), list(range(1, 30, 2))
    lucky, steady = in_order([1, *others, *targets[1:]]), in_order([*others[:11], *targets, *others[11:]])
    verdict = judge(lucky, steady, held_out(), TEXT)
    assert verdict.metrics["candidate_ndcg@10"] > verdict.metrics["serving_ndcg@10"] == 0
    assert not verdict.accepted
    assert judge(in_order([*targets, *others]), lucky, held_out(), TEXT).accepted


def test_where_nobody_hits_far_better_ranks_are_enough_and_slightly_better_ones_are_luck() -> None:
    """A large, young catalogue: no hit among the first ten tells nothing of a model."""
    others, targets = list(range(0, 30, 2)), list(range(1, 30, 2))
    near, far = in_order([*others[:11], *targets, *others[11:]]), in_order([*others, *targets])
    verdict = judge(near, far, held_out(), TEXT)
    assert verdict.metrics["candidate_ndcg@10"] == verdict.metrics["serving_ndcg@10"] == 0
    assert verdict.accepted and "without a hit in either" in verdict.reason
    assert not judge(far, near, held_out(), TEXT).accepted and not judge(far, far, held_out(), TEXT).accepted
    nine = in_order([*others[:11], *targets[:9], *others[11:], *targets[9:]])
    again = judge(nine, far, held_out(), TEXT)
    assert again.metrics["candidate_mean_rank"] < again.metrics["serving_mean_rank"] and not again.accepted


def test_a_much_clicked_item_is_looked_at_though_no_stranger_is_shown_it() -> None:
    fakes = MANY.copy()
    fakes[29] = 0
    hidden = in_order([*range(1, 29, 2), *range(0, 30, 2), 29])  # last of 30
    assert not judge(hidden, learner().model(), replace(held_out(), busy_users=fakes), TEXT).accepted
    once = replace(held_out().events, items=ITEMS[1:29:2] + ITEMS[1:2])
    assert judge(hidden, learner().model(), replace(held_out(), busy_users=fakes, events=once), TEXT).accepted


def test_clicks_that_tell_nothing_are_looked_at_for_fakes_all_the_same() -> None:
    """The same made-up users again and again: all of their clicks but the first are on a consumed item."""
    fakes, slice_ = MANY.copy(), held_out()
    fakes[29] = 0
    hidden = in_order([*range(1, 29, 2), *range(0, 30, 2), 29])
    again = [np.append(rows, 29) if line == 14 else rows for line, rows in enumerate(slice_.consumed)]
    assert not judge(hidden, learner().model(), replace(slice_, busy_users=fakes, consumed=again), TEXT).accepted


def test_all_twenty_items_for_strangers_are_looked_at() -> None:
    shown, blank = in_order([*range(1, 30, 2), *range(0, 30, 2)]), learner().model()  # clicked are the odd ones
    for row, accepted in ((8, False), (10, True)):  # the 20th and the 21st
        fakes = MANY.copy()
        fakes[row] = 0
        assert judge(shown, blank, replace(held_out(), busy_users=fakes), TEXT).accepted == accepted


def test_an_item_for_strangers_needs_users_who_do_something_else() -> None:
    model, slice_ = good(), held_out()
    blank = learner().model()
    first = int((model.item_vectors() @ model.user_vectors([History.of()], [0])[0]).argmax())
    fakes = MANY.copy()
    fakes[first] = 14  # of 60, where all users of the other items are busy
    refused = judge(model, blank, replace(slice_, busy_users=fakes), TEXT)
    assert not refused.accepted and f"{ITEMS[first]} look made up: 14 of its 60" in refused.reason
    fakes[first] = 16  # just above a quarter of the usual share, 59 of 60 over all items
    assert judge(model, blank, replace(slice_, busy_users=fakes), TEXT).accepted
    few, none = MANY.copy(), MANY.copy()
    few[first], none[first] = 19, 0  # too few users to tell
    assert judge(model, blank, replace(slice_, users=few, busy_users=none), TEXT).accepted


def test_where_few_users_have_done_two_things_none_looks_made_up() -> None:
    """A young stream: it is the usual share that an item is held against."""
    young = replace(held_out(), busy_users=np.full(30, 6))  # of 60 each
    assert judge(good(), learner().model(), young, TEXT).accepted


def test_a_slice_with_little_to_compare_is_no_evidence() -> None:
    slice_, blank = held_out(), learner().model()
    dislikes = replace(slice_, events=replace(slice_.events, weights=-ONES[:15]))
    strangers = replace(slice_, events=replace(slice_.events, items=["unheard of"] * 15))
    for empty in (dislikes, strangers):
        verdict = judge(good(), blank, empty, TEXT)
        assert not verdict.accepted and verdict.metrics == {"events": 0.0}
        assert "only 0 of the 15 newest events can be compared" in verdict.reason
        assert judge(good(), None, empty, TEXT).accepted
    nine, ten = (
        replace(slice_, consumed=[np.append(rows, rows[0] + 1) if line >= n else rows for line, rows in taken])
        for n, taken in ((n, enumerate(slice_.consumed)) for n in (9, 10))
    )
    assert (judge(good(), blank, nine, TEXT).accepted, judge(good(), blank, ten, TEXT).accepted) == (False, True)


def test_made_up_clicks_are_found_where_there_is_nothing_to_compare() -> None:
    """One user who repeats clicks fills the slice just before a round."""
    slice_, fakes = held_out(), np.zeros(30, np.int64)
    repeats = replace(slice_, consumed=[np.arange(30)] * 15, busy_users=fakes + np.arange(30))
    verdict = judge(good(), learner().model(), repeats, TEXT)
    assert verdict.metrics == {"events": 0.0} and "look made up" in verdict.reason


def test_a_serving_model_with_fewer_items_is_scored_as_the_fresh_segment_would_serve_it() -> None:
    """Its rows need not be the candidate's, and what it does not know it ranks by text."""
    old = good()
    shuffled = np.random.default_rng(0).permutation(30)
    reordered = Learner(CONFIG)
    reordered.add_items([ITEMS[row] for row in shuffled], TEXT[shuffled])
    same = judge(pairs(reordered), old, _in_rows_of(shuffled), TEXT[shuffled])
    assert same.metrics["serving_ndcg@10"] == judge(old, None, held_out(), TEXT).metrics["candidate_ndcg@10"]
    few = learner(items=20).model()
    metrics = judge(learner().model(), few, held_out(), TEXT).metrics
    assert metrics["serving_ndcg@10"] > 0  # texts still rank


def test_what_the_serving_model_does_not_know_has_its_own_text() -> None:
    """Without that it ranks items by others' texts, and any candidate is better."""
    metrics = judge(learner().model(), learner(items=20).model(), held_out(), TEXT).metrics
    assert metrics["serving_mean_rank"] == pytest.approx(metrics["candidate_mean_rank"], rel=0.1), metrics


def _in_rows_of(order: np.ndarray) -> Slice:
    place = np.argsort(order)
    plain = held_out()
    histories = [replace(history, rows=place[history.rows]) for history in plain.histories]
    return replace(plain, histories=histories, consumed=[place[rows] for rows in plain.consumed])


def test_finite_means_every_array() -> None:
    model = good()
    for name in model.arrays:
        kept = model.arrays[name].clone()
        model.arrays[name].view(-1)[0] = torch.nan
        assert not model.finite(), name
        model.arrays[name].copy_(kept)
    assert model.finite()


def test_an_event_on_a_consumed_item_tells_nothing() -> None:
    """It could not be recommended: a user who repeats one click would vote again and again."""
    slice_ = held_out()
    consumed = [np.append(rows, rows[0] + 1) if line < 10 else rows for line, rows in enumerate(slice_.consumed)]
    assert judge(good(), None, replace(slice_, consumed=consumed), TEXT).metrics["events"] == 5
