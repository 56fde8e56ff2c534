"""Scenario 13: producers whose clocks are a day ahead or behind, or leap back by an hour and run on from there.

One click in a hundred has such a stamp. What is more than ten minutes ahead of Kafka's clock is a dead letter, today
and at every later replay; nothing else changes what is read, in which order, or what can be learned from it.
"""

import random
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
import pytest

from model.gate import hold_out, judge
from model.learner import Learner
from model.model import Model
from model.user_state import EMPTY, Applied, UserState, apply_clicks, decode_state, encode_state
from stream.broker import LocalBroker
from stream.consumer import read_window
from stream.datasets import load_dataset
from stream.events import Click, encode
from stream.producer import Producer
from stream.topics import DAY_MS, Topics
from tests.model.test_bad_candidates import CONFIG, words
from workers.settings import Kafka, Settings
from workers.states import Owned, PackedStates, limits_of
from workers.training_input import Window, events_of
from workers.user_worker import UserWorker

SEED, SHARE, HOUR_MS = 13, 0.01, 60 * 60 * 1000
SHORT, LONG, SLICE = 3000, 30_000, 1000


class Spoiled(NamedTuple):
    clicks: list[Click]
    ahead: set[str]  # event ids
    behind: set[str]


def spoiled(clicks: Sequence[Click], draw: random.Random) -> Spoiled:
    """A third each: a day ahead, a day behind, an hour back."""
    made, ahead, behind = [], set[str](), set[str]()
    for click in clicks:
        leap = draw.choice((DAY_MS, -DAY_MS, -HOUR_MS)) if draw.random() < SHARE else 0
        made.append(msgspec.structs.replace(click, ts_ms=click.ts_ms + leap))
        if leap:
            (ahead if leap > 0 else behind).add(click.event_id)
    return Spoiled(made, ahead, behind)


@pytest.fixture(scope="module")
def stream(long: bool) -> list[Click]:
    """The first events of MovieLens, and the slice after them."""
    return load_dataset("ml-100k").events[: (LONG if long else SHORT) + SLICE]


@pytest.mark.timeout(900)
def test_windows_and_states_do_not_depend_on_producer_clocks(
    broker: LocalBroker, topics: Topics, stream: list[Click], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read today and two days later, when a click from tomorrow is one of yesterday's."""
    now_ms = time.time_ns() // 1_000_000
    live = [msgspec.structs.replace(click, ts_ms=now_ms - 50 * back) for back, click in enumerate(reversed(stream))]
    sent = spoiled(live[::-1], random.Random(SEED))
    settings = Settings(kafka=Kafka(bootstrap=broker.bootstrap, prefix=topics.prefix, partitions=3))
    with Producer(settings.connection) as producer:
        for click in sent.clicks:
            producer.send_raw(topics.clicks.name, click.user_id.encode(), encode(click))
    expected = [click.event_id for click in sent.clicks if click.event_id not in sent.ahead]
    assert sent.ahead and sent.behind
    found = [_read(settings)]
    later = time.time_ns() + 2 * DAY_MS * 1_000_000
    monkeypatch.setattr("stream.events.time", SimpleNamespace(time_ns=lambda: later))
    found.append(_read(settings))
    for window, states, dead in found:
        assert sorted(window) == sorted(expected)
        assert dead == len(sent.ahead)
        assert states == found[0][1] and window == found[0][0]
    clean = _folded([click for click in stream if click.event_id not in sent.ahead])
    for user_id, raw in found[0][1].items():
        state, plain = decode_state(raw), clean[user_id]
        assert (state.seen, state.event_ids, state.applied) == (plain.seen, plain.event_ids, plain.applied)
        assert list(state.history) == sorted(state.history, key=lambda entry: entry.ts_ms)


def _read(settings: Settings) -> tuple[list[str], dict[str, bytes], int]:
    """Event ids of the trainer's window, the states that the worker folds, and its dead letters."""
    window = Window(settings)
    ids = [read.click.event_id for read in window.read()]
    worker: Any = UserWorker(settings, None, None, None)  # type: ignore[arg-type]  # it decodes and folds alone
    owned, dead = Owned(PackedStates(), cast(Any, None), {}), 0
    for partition in range(settings.kafka.partitions):
        records = list(read_window(settings.connection, settings.topics.clicks.name, only=[partition]))
        reads, erased, letters = worker._decode(records, owned.states)
        owned.states.update(worker._fold(owned, reads, erased).states)
        dead += len(letters)
    return ids, {user_id: encode_state(state) for user_id, state in owned.states.items()}, dead


def _folded(clicks: Sequence[Click]) -> dict[str, UserState]:
    own: dict[str, list[Applied]] = {}
    for offset, click in enumerate(clicks):
        own.setdefault(click.user_id, []).append(Applied(click, Settings().weight(click), offset))
    return {user_id: apply_clicks(EMPTY, applied, limits_of(Settings())) for user_id, applied in own.items()}


@pytest.mark.timeout(1800)
def test_what_is_learned_is_as_good(stream: list[Click], capsys: pytest.CaptureFixture[str]) -> None:
    """By the gate's own figures, on a clean slice that neither model has seen."""
    items = load_dataset("ml-100k").items
    text = np.stack([words(item.text) for item in items])
    sent = spoiled(stream[:-SLICE], random.Random(SEED))
    taken = [click for click in sent.clicks if click.event_id not in sent.ahead]
    models, learners = list[Model](), list[Learner]()
    for clicks in (taken, stream[:-SLICE]):
        learner = Learner(CONFIG, SEED)
        learner.add_items([item.item_id for item in items], text)
        report = learner.learn(events_of(clicks, lambda _: 1.0))
        assert np.isfinite(report.tower_loss)
        models.append(learner.model())
        learners.append(learner)
    held_out = hold_out(learners[1], events_of(stream[-SLICE:], lambda _: 1.0))
    figures = judge(models[0], models[1], held_out, text).metrics
    with capsys.disabled():
        print(f"\nclocks, seed {SEED}: {len(sent.ahead)} ahead, {len(sent.behind)} behind; {figures}")
    assert figures["candidate_ndcg@10"] > 0.9 * figures["serving_ndcg@10"]
    assert figures["candidate_mean_rank"] < 1.1 * figures["serving_mean_rank"]
