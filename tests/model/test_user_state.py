"""The fold: what goes in once is in once, whatever is sent or delivered again."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.user_state import (
    EMPTY,
    Applied,
    Entry,
    Fold,
    Limits,
    UserState,
    apply_clicks,
    decode_state,
    digest,
    encode_state,
    holds,
    unpack,
)

LIMITS = Limits(history=4, event_ids=6, seen=5)


@dataclass(frozen=True)
class C:
    event_id: str
    item_id: str
    ts_ms: int


clicks = st.lists(
    st.builds(
        C,
        st.integers(0, 30).map(lambda number: f"e{number}"),
        st.integers(0, 8).map(lambda number: f"i{number}"),
        st.integers(0, 20),
    ),
    max_size=25,
)


def numbered(events: Sequence[C], first: int = 0) -> list[Applied]:
    return [Applied(event, 1.0, first + at) for at, event in enumerate(events)]


def slow_twin(applied: Sequence[Applied], limits: Limits = LIMITS) -> UserState:
    """The state by its definition, from the whole list at once."""
    kept: list[Applied] = []
    for one in applied:
        if one.click.event_id not in [other.click.event_id for other in kept[-limits.event_ids :]]:
            kept.append(one)
    history: list[Applied] = []
    for one in kept:  # the late ones of a full history fall out at once
        history = sorted([*history, one], key=lambda other: other.click.ts_ms)[-limits.history :]
    seen: list[str] = []
    for one in kept:
        if one.click.item_id not in seen:
            seen = [*seen, one.click.item_id][-limits.seen :]
    return UserState(
        history=tuple(Entry(one.click.item_id, one.weight, one.click.ts_ms) for one in history),
        seen=b"".join(map(digest, seen)),
        event_ids=b"".join(digest(one.click.event_id) for one in kept[-limits.event_ids :]),
        applied=len(kept),
        offset=applied[-1].offset if applied else -1,
    )


@given(clicks)
def test_equals_its_slow_twin(events: list[C]) -> None:
    assert encode_state(apply_clicks(EMPTY, numbered(events), LIMITS)) == encode_state(slow_twin(numbered(events)))


@given(clicks, st.data())
def test_any_redelivery_changes_nothing(events: list[C], data: st.DataObject) -> None:
    """A crash repeats a tail of what was applied, any number of times, before the rest follows."""
    all_at_once = apply_clicks(EMPTY, numbered(events), LIMITS)
    state, at = EMPTY, 0
    while at < len(events):
        upto = data.draw(st.integers(at + 1, len(events)))
        back = data.draw(st.integers(0, at))
        state = apply_clicks(state, numbered(events[back:upto], back), LIMITS)
        at = upto
    assert encode_state(state) == encode_state(all_at_once)


@given(clicks)
def test_survives_the_wire_and_leaves_its_input_alone(events: list[C]) -> None:
    half = apply_clicks(EMPTY, numbered(events[:10]), LIMITS)
    raw = encode_state(half)
    assert decode_state(raw) == half
    apply_clicks(half, numbered(events[10:], 10), LIMITS)
    assert encode_state(half) == raw
    assert apply_clicks(half, numbered(events[:10]), LIMITS) is half


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=4))
def test_a_weight_is_kept_as_it_is_and_what_is_disliked_is_seen(weights: list[float]) -> None:
    events = [Applied(C(f"e{at}", f"i{at}", at), weight, at) for at, weight in enumerate(weights)]
    state = apply_clicks(EMPTY, events, LIMITS)
    assert state.history == tuple(Entry(f"i{at}", weight, at) for at, weight in enumerate(weights))
    assert state.seen == b"".join(digest(f"i{at}") for at in range(len(weights)))


def test_late_events_take_their_place_in_time() -> None:
    late = [C("a", "x", 30), C("b", "y", 10), C("c", "z", 30)]
    state = apply_clicks(EMPTY, numbered(late), LIMITS)
    assert [entry.item_id for entry in state.history] == ["y", "x", "z"]


def test_a_state_kept_under_a_higher_bound_is_cut_with_the_next_new_item() -> None:
    wide = apply_clicks(EMPTY, numbered([C(f"e{n}", f"i{n}", n) for n in range(9)]), Limits())
    old, new = (apply_clicks(wide, [Applied(C("e", item, 9), 1.0, 9)], LIMITS) for item in ("i0", "i9"))
    assert old.seen == wide.seen
    assert new.seen == b"".join(digest(f"i{n}") for n in range(5, 10))


def test_bytes_that_are_no_state_are_refused_by_one_error() -> None:
    raw = encode_state(apply_clicks(EMPTY, numbered([C("e", "item", 1)]), LIMITS))
    for bad in (b"", raw[:-1], raw.replace(b"item", b"\xd2tem"), b"\x91\x01"):
        with pytest.raises(msgspec.DecodeError):
            decode_state(bad)


@given(st.lists(st.text("ab", min_size=8, max_size=8).map(str.encode), max_size=30))
def test_none_is_found_that_lies_across_two(keys: list[bytes]) -> None:
    for at, key in enumerate(keys):
        assert holds(b"".join(keys[:at]), key) == (key in keys[:at])


def test_digests_unpack_in_order() -> None:
    packed = digest("a") + digest("b")
    assert unpack(packed).tolist() == [int.from_bytes(digest(i), "little") for i in "ab"]
    assert unpack(b"").dtype == np.uint64


def test_an_erased_user_starts_anew_and_nothing_older_comes_back() -> None:
    before = [Applied(C(f"e{number}", f"i{number}", number), 1.0, number) for number in range(5)]
    state = apply_clicks(EMPTY, before, Limits())
    fold = Fold(state, Limits())
    fold.erase(7)
    erased = fold.state()
    assert erased == UserState(offset=7) and erased.erased
    assert not EMPTY.erased and not state.erased
    assert apply_clicks(erased, before, Limits()) == erased  # redelivered
    again = Applied(before[0].click, 1.0, 9)  # the same event sent anew: what would know it has been erased
    after = apply_clicks(erased, [again], Limits())
    assert (after.applied, len(after.history), after.offset) == (1, 1, 9)
    fold = Fold(after, Limits())
    fold.erase(7)  # the wish, redelivered
    assert fold.state() is after
