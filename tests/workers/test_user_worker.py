"""What a micro-batch keeps, what lists are owed for it, and what stops the worker, without Kafka."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock, Mock

import numpy as np
import pytest
from kafka.errors import KafkaError

from model.user_state import UserState, digest
from stream.events import Artifact, Click, Erasure, Ranked, Recommendations, decode, encode
from stream.producer import partition_of
from tests.records import Record
from workers.dead_letters import DeadLetters
from workers.prequential import Trial
from workers.recommender import Folded, Recommended
from workers.settings import Kafka, Settings, Worker
from workers.state_writer import Acknowledge
from workers.states import Owned, PackedStates, States
from workers.user_worker import RATIO_MIN, RATIO_WINDOW, TooManyBadEvents, UserWorker


def records(good: list[bool]) -> list[Record]:
    clicks = (Click(event_id=f"e{at}", user_id="u", item_id=f"i{at}", ts_ms=0) for at in range(len(good)))
    pairs = zip(clicks, good, strict=True)
    return [Record(b"u", encode(click) if fine else b"{", at) for at, (click, fine) in enumerate(pairs)]


def made(**worker: Any) -> UserWorker:
    return UserWorker(Settings(worker=Worker(**worker), kafka=Kafka(partitions=1)), *(cast(Any, None),) * 3)


def test_what_a_user_had_seen_is_kept_of_scored_clicks_alone() -> None:
    """A copy of it with each click would be the square of a micro-batch."""
    worker = made(scored_clicks=2, seen=1)
    reads, erased, _ = worker._decode(records([True] * 4), {})
    liked = worker._fold(Owned(cast(Any, {}), cast(Any, None), {}), reads, erased).liked
    assert [before and before.query.seen for _, before in liked] == [b"", digest("i0"), None, None]


class Beside:
    """What a worker writes, in its order; its own lists are made of nothing."""

    def __init__(self, **worker: Any) -> None:
        self.worker = made(**worker)
        self.owned = Owned(PackedStates(), cast(Any, self), {})
        self.written: list[tuple[str, str]] = []
        self.asked: list[tuple[int, int]] = []
        own = cast(Any, self.worker)
        own._sender, own._owned, own._lists, own._letters = self, self, self, self
        self.cleared: list[set[str]] = []

    async def of(self, partition: int) -> Owned:
        return self.owned

    async def put(self, states: Mapping[bytes, Any], acknowledge: Acknowledge | None = None) -> None:
        self.written += [("state", user.decode()) for user in states]
        if acknowledge:
            await acknowledge()

    def cleared_of(self, user_ids: set[str], acknowledge: Acknowledge, states: States) -> Acknowledge:
        self.cleared.append(user_ids)
        return acknowledge

    async def ask(self, owed: Folded) -> Recommended:
        self.asked.append((len(owed.newest), owed.num_scored))
        return Recommended("g", {user: list[Ranked]() for user in owed.newest}, {}, set())

    async def send(self, topic: str, partition: int, records: Sequence[Any]) -> None:
        for key, value, *_ in records:
            text = "null" if value is None else topic.rpartition(".")[2]
            if text == "recommendations":
                answer = decode(value, Recommendations)
                assert self.owned.states[answer.user_id].offset == answer.offset
                text = answer.event_id or ""
            self.written.append((text, (key or b"").decode()))


async def test_whoever_clicked_while_the_worker_was_behind_gets_one_list_for_the_newest_click() -> None:
    """Of all that has waited, folded first: a list costs ten times what a click does."""
    kafka, users = Beside(batch_clicks=2, scored_clicks=3), "uvwvuux"

    async def acknowledge() -> None:
        kafka.written.append(("acknowledged", ""))

    clicks = [Click(event_id=f"e{at}", user_id=user, item_id=f"i{at}", ts_ms=0) for at, user in enumerate(users)]
    waiting = [Record(one.user_id.encode(), encode(one), at) for at, one in enumerate(clicks)]
    await kafka.worker.process(0, waiting, acknowledge)
    assert [what for what, _ in kafka.written[:6]] == ["state"] * 6  # of the third two clicks, one
    assert kafka.written[6:] == [("e5", "u"), ("e3", "v"), ("e2", "w"), ("e6", "x"), ("acknowledged", "")]
    assert kafka.asked == [(2, 3), (2, 0)]  # no more users at once than clicks, and of all clicks three are scored


@pytest.mark.parametrize("generation", ["g", ""])
async def test_a_click_is_answered_when_its_list_is_sent_and_never_without_one(
    generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no generation serves the objective has to fail: clicks are acknowledged within milliseconds then."""
    kafka, observed = Beside(), Mock()
    monkeypatch.setattr("workers.metrics.click_to_recommendation_s", observed)
    monkeypatch.setattr(kafka, "ask", AsyncMock(return_value=Recommended(generation, {}, {}, set())))
    await kafka.worker.process(0, records([True] * 3), AsyncMock())
    (seconds,) = observed.observe_all.call_args.args
    assert np.isfinite(seconds).tolist() == [bool(generation)] * 3


@pytest.mark.parametrize(
    ("seen", "rolled_back"),
    [
        (["g2 g2"], [True]),
        (["g2 g3", "g3 g3", "g2 g2"], [False, False, False]),  # by hand, in the end: not taken back for the old trial
        (["g2 g3", "g2 g2"], [False, True]),  # g3 could not serve
    ],
)
async def test_a_generation_that_loses_its_trial_is_rolled_back_unless_it_is_replaced_already(
    seen: list[str], rolled_back: list[bool]
) -> None:
    """What was announced meanwhile would never serve: the one gone back to would be newer. Seen: serves, wanted."""
    kafka = Beside()
    back = Artifact(name="g1", url="u", manifest_sha256="s", created_ms=1, encoder="e")
    kafka.worker._recommender.lost = back, Trial("g2", "g1")
    for (serves, wanted), went in zip(map(str.split, seen), rolled_back, strict=True):
        kafka.worker._live = cast(Any, SimpleNamespace(wanted=wanted, snapshot=SimpleNamespace(name=serves)))
        await kafka.worker._go_back()
        assert kafka.written == ([("generations", "g1")] if went else [])
    assert kafka.worker._recommender.lost is None


async def test_who_is_forgotten_while_the_worker_was_behind_gets_no_list_for_what_was_before() -> None:
    kafka = Beside(batch_clicks=1)

    async def acknowledge() -> None: ...

    wish = Record(b"u", encode(Erasure(event_type="erase", user_id="u", requested_ms=0)), 1)
    late = Record(b"u", encode(Click(event_id="late", user_id="u", item_id="i", ts_ms=0)), 0)  # delivered again
    await kafka.worker.process(0, [*records([True]), wish, late], acknowledge)
    assert [what for what, user in kafka.written if user == "u" and what != "state"] == ["null"]
    assert not kafka.asked and kafka.cleared == [{"u"}]


async def test_a_wish_is_acknowledged_when_the_user_s_dead_letters_are_taken_back() -> None:
    """A worker that ends before reads the wish again: it stands for what is still to be done."""
    acknowledge, states = AsyncMock(), PackedStates()
    states["u"] = UserState(offset=7)

    async def send(topic: str, partition: int, records: Sequence[Any]) -> None:
        assert [*records] == [(b"letter of u", None)] and not acknowledge.called and "u" in states
        if refuses:
            raise KafkaError()

    letters = DeadLetters(Settings(), cast(Any, SimpleNamespace(send=send)))
    letters._of = lambda user_ids: [b"letter of " + user.encode() for user in user_ids]  # type: ignore[method-assign]
    for refuses in (True, False):
        with pytest.raises(KafkaError) if refuses else nullcontext():
            await letters.cleared_of({"u"}, acknowledge, states)()
        assert acknowledge.called is not refuses and ("u" in states) is refuses


def test_a_user_whose_clicks_come_into_another_partition_is_refused_not_split() -> None:
    """librdkafka deals keys by CRC32: beside what HTTP takes, one user would have two states."""
    worker = UserWorker(Settings(kafka=Kafka(partitions=8)), *(cast(Any, None),) * 3)
    here = [record._replace(partition=partition_of("u", 8)) for record in records([True])]
    there = [record._replace(partition=(partition_of("u", 8) + 1) % 8) for record in here]
    assert [len(found) for found in worker._decode(here, {})] == [1, 0, 0]
    reads, _, (letter,) = worker._decode(there, {})
    assert not reads and "murmur2" in letter.cause
    assert len(worker._decode(there, {"u"})[0]) == 1  # whose state is here from before


@pytest.mark.parametrize("batch", [RATIO_MIN, RATIO_WINDOW, 3 * RATIO_WINDOW])
def test_the_share_of_bad_messages_is_of_the_newest_in_their_order_whatever_the_batch(batch: int) -> None:
    def work_off(good: list[bool]) -> None:
        for at in range(0, len(good), batch):
            part = records(good)[at : at + batch]
            worker._check_ratio(part, worker._decode(part, {})[2])

    worker = made(dead_letter_ratio=0.5)
    work_off([at % 3 > 0 for at in range(3 * RATIO_WINDOW)])
    with pytest.raises(TooManyBadEvents, match="of the last 1000 messages"):
        work_off([False] * 3 * RATIO_WINDOW)
