"""`demo --check` must see what it claims to see: each planted fault breaks its own claim."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from model.user_state import decode_state, encode_state
from tests.workers.service import clicks
from workers.check import failures, fold_offline, summarise
from workers.settings import Settings

SETTINGS = Settings()
EVENTS = clicks(60, users=7)
GOOD = {
    "dead_letters": 0, "generations": 3, "swaps": 2, "requests": 60, "failed_requests": 0, "empty_requests": 0,
    "hr10": 0.2, "hr10_popularity": 0.1, "seconds": 60.0,
}  # fmt: skip


def judged(states: dict[str, bytes], restarts: int = 0, **changed: Any) -> list[str]:
    summary = summarise(EVENTS, states, SETTINGS) | GOOD | changed
    return failures(summary, len(EVENTS), states, restarts)


def test_a_sound_run_passes() -> None:
    assert judged(fold_offline(EVENTS, SETTINGS)) == []


def lose(states: dict[str, bytes]) -> None:
    state = decode_state(states["u1"])
    states["u1"] = encode_state(
        msgspec.structs.replace(state, event_ids=state.event_ids[8:], applied=state.applied - 1)
    )


def double(states: dict[str, bytes]) -> None:
    state = decode_state(states["u1"])
    twice = msgspec.structs.replace(state, event_ids=state.event_ids + state.event_ids[:8], applied=state.applied + 1)
    states["u1"] = encode_state(twice)


def reorder(states: dict[str, bytes]) -> None:
    state = decode_state(states["u2"])
    states["u2"] = encode_state(msgspec.structs.replace(state, history=state.history[::-1]))


def forget_user(states: dict[str, bytes]) -> None:
    del states["u3"]


@pytest.mark.parametrize(
    ("fault", "claims"),
    [
        (lose, ["every event's id", "applied clicks", "identical"]),
        (double, ["every event's id", "applied clicks", "identical"]),
        (reorder, ["identical"]),
        (forget_user, ["every event's id", "applied clicks", "identical"]),
    ],
)
def test_a_wrong_state_is_seen(fault: Callable[[dict[str, bytes]], None], claims: list[str]) -> None:
    states = fold_offline(EVENTS, SETTINGS)
    fault(states)
    broken = judged(states)
    assert len(broken) == len(claims)
    for claim in claims:
        assert any(claim in said for said in broken)


@pytest.mark.parametrize(
    ("changed", "claim"),
    [
        ({"dead_letters": 1}, "dead letters"),
        ({"generations": 2}, "generations"),
        ({"swaps": 1}, "swaps"),
        ({"restarts": 1}, "no role fell"),
        ({"requests": 59}, "asked"),  # who has stopped asking sees no failure
        ({"failed_requests": 1}, "failed"),
        ({"empty_requests": 1}, "empty"),
        ({"hr10": 0.19}, "HR@10"),
        ({"hr10": float("nan")}, "HR@10"),
        ({"hr10_popularity": 0.0}, "HR@10"),
    ],
)
def test_every_other_claim_can_fail(changed: dict[str, Any], claim: str) -> None:
    (broken,) = judged(fold_offline(EVENTS, SETTINGS), **changed)
    assert claim in broken
