"""Scenario 18: the fold under every delivery that Kafka allows, and the decoders under any bytes."""

import importlib.metadata
import json
import os
import subprocess
import venv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from model.user_state import Applied, Limits, UserState, apply_clicks, decode_state, encode_state
from stream.events import Click, Erasure, encode
from tests.chaos.fuzz_decoder import check
from tests.chaos.test_compatibility import GOLDEN, GOLDEN_STATE
from tests.model.test_user_state import slow_twin
from tests.records import Record
from workers.settings import Kafka, Settings, Worker
from workers.states import Owned
from workers.user_worker import UserWorker

SEED, SHORT, LONG, FUZZ_S = 18, 200, 10_000, 600
LIMITS = Limits(history=4, event_ids=3, seen=3)  # few, so that a redelivery reaches back behind what is remembered
SETTINGS = Settings(
    worker=Worker(history=LIMITS.history, event_ids=LIMITS.event_ids, seen=LIMITS.seen), kafka=Kafka(partitions=1)
)
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(1800)

events = st.builds(
    Click,
    event_id=st.integers(0, 25).map(lambda number: f"e{number}"),
    user_id=st.sampled_from(["u0", "u1"]),
    item_id=st.integers(0, 8).map(lambda number: f"i{number}"),
    event_type=st.sampled_from(["click", "dislike", "purchase"]),
    ts_ms=st.integers(0, 20),
    value=st.sampled_from([None, 0.5, 3.0]),
)
erasures = st.builds(
    Erasure, event_type=st.just("erase"), user_id=st.sampled_from(["u0", "u1"]), requested_ms=st.just(0)
)
Log = list[Click | Erasure | None]  # a None is a message that nobody can read
logs = st.lists(events | events | erasures | st.none(), min_size=8, max_size=30)


def partition(log: Log) -> list[Record]:
    return [
        Record(event.user_id.encode(), encode(event), at) if event else Record(b"u0", b'{"user_id": "u0"', at)
        for at, event in enumerate(log)
    ]


def by_definition(log: Log) -> dict[str, bytes]:
    """The states, from the whole log at once."""
    states = {}
    for user in sorted({event.user_id for event in log if event}):
        clicks, offset = list[Applied](), -1
        for at, event in enumerate(log):
            if event is not None and event.user_id == user:
                offset = at
                clicks = [] if isinstance(event, Erasure) else [*clicks, Applied(event, SETTINGS.weight(event), at)]
        states[user] = encode_state(replace(slow_twin(clicks, LIMITS), offset=offset))
    return states


def delivered(log: Log, data: st.DataObject) -> tuple[dict[str, bytes], int]:
    """The states in Kafka after a worker was fed the log in batches, and killed at any time; and the dead letters.

    A death keeps any part of the last batch's states and starts again at the last commit, which lags.
    """
    worker = UserWorker(SETTINGS, *(cast(Any, None),) * 3)
    records, stored, memory = partition(log), dict[str, bytes](), dict[str, UserState]()
    at = committed = deaths = 0
    dead: set[int] = set()
    while at < len(records):
        upto = data.draw(st.integers(at + 1, len(records)))
        reads, erased, letters = worker._decode(records[at:upto], memory)
        dead |= {letter.offset for letter in letters}
        folded = worker._fold(Owned(cast(Any, memory), cast(Any, None), {}), reads, erased)
        if deaths < 4 and data.draw(st.booleans()):
            written = data.draw(st.sets(st.sampled_from(folded.changed))) if folded.changed else set()
            stored |= {user: encode_state(folded.states[user]) for user in written}
            memory = {user: decode_state(raw) for user, raw in stored.items()}
            at, deaths = committed, deaths + 1
        else:
            memory |= folded.states
            stored |= {user: encode_state(folded.states[user]) for user in folded.changed}
            at = upto
            committed = data.draw(st.sampled_from([committed, at]))
    return stored, len(dead)


def in_full(long: bool, law: Callable[..., None], *strategies: st.SearchStrategy[Any]) -> None:
    examples = LONG if long else SHORT
    checks = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    count = 0

    def counted(drawn: tuple[Any, ...]) -> None:
        nonlocal count
        count += 1
        law(*drawn)

    seed(SEED)(checks(given(st.tuples(*strategies))(counted)))()
    print(json.dumps({"scenario": 18, "law": law.__name__, "seed": SEED, "examples": count, "failures": 0}))


def test_any_delivery_leads_to_the_same_states(long: bool) -> None:
    def any_delivery(log: Log, data: st.DataObject) -> None:
        states, dead = delivered(log, data)
        assert states == by_definition(log)
        assert dead == log.count(None)

    in_full(long, any_delivery, logs, st.data())


def test_every_event_sent_again_counts_once(long: bool) -> None:
    """Up to two others in between: three ids are remembered here, 1,024 by default."""

    def sent_again(log: list[Click], data: st.DataObject) -> None:
        own = [event for at, event in enumerate(log) if event.event_id not in {one.event_id for one in log[:at]}]
        twice = list(own)
        for event in own:
            first = twice.index(event)
            twice.insert(data.draw(st.integers(first + 1, min(first + 2, len(twice)))), event)
        once, again = ({u: decode_state(raw) for u, raw in by_definition(list(run)).items()} for run in (own, twice))
        folds = {user: decode_state(raw) for user, raw in delivered(list(twice), data)[0].items()}
        assert again.keys() == folds.keys() == once.keys()
        for user, state in folds.items():
            mine = once[user]
            assert (state.history, state.seen, state.applied) == (mine.history, mine.seen, mine.applied)

    in_full(long, sent_again, st.lists(events, max_size=12), st.data())


def test_the_order_of_arrival_does_not_count_where_time_tells(long: bool) -> None:
    """Late events take their place in time; only what was forgotten of the oldest is the same for all."""

    def any_order(stamps: list[int], data: st.DataObject) -> None:
        wide = Limits(LIMITS.history, len(stamps) + 1)
        clicks = [
            Click(event_id=f"e{stamp}", user_id="u", item_id=f"i{stamp % 7}", ts_ms=stamp) for stamp in sorted(stamps)
        ]
        shuffled = data.draw(st.permutations(clicks))
        in_time, as_came = (
            apply_clicks(UserState(), [Applied(click, 1.0, at) for at, click in enumerate(run)], wide)
            for run in (clicks, shuffled)
        )
        assert as_came.history == in_time.history
        assert [entry.ts_ms for entry in as_came.history] == sorted(stamps)[-LIMITS.history :]
        assert (as_came.applied, as_came.offset) == (in_time.applied, in_time.offset)
        for packed in ("seen", "event_ids"):
            mine, other = (Counter(memoryview(getattr(one, packed)).cast("Q")) for one in (as_came, in_time))
            assert mine == other

    in_full(long, any_order, st.lists(st.integers(0, 200), unique=True, max_size=12), st.data())


@st.composite
def broken(draw: st.DrawFn) -> bytes:
    """A valid message with a few bytes cut, doubled, changed or put in."""
    raw = bytearray(draw(st.sampled_from([*GOLDEN, GOLDEN_STATE])))
    for _ in range(draw(st.integers(0, 4))):
        at, upto = sorted((draw(st.integers(0, len(raw))), draw(st.integers(0, len(raw)))))
        raw[at:upto] = draw(st.binary(max_size=8) | st.just(bytes(raw[at:upto] * 2)) | st.sampled_from(TOKENS))
    return bytes(raw)


TOKENS = [b"null", b"-1", b"1e999", b"NaN", b'"\\ud800"', b"\xff", b"[[[[", b'{"":', b"9" * 40, b"\x00"]


def test_no_bytes_get_past_a_decoder_unnamed(long: bool) -> None:
    def any_bytes(raw: bytes) -> None:
        check(raw)

    in_full(long, any_bytes, st.binary(max_size=300) | broken())


def test_atheris_on_the_decoders(long: bool, tmp_path: Path) -> None:
    """In a venv of its own, ten minutes: PyPI is asked for it, it is none of our dependencies."""
    if not long:
        pytest.skip("long form only")
    venv.create(tmp_path / "venv", with_pip=True)
    python, corpus = str(tmp_path / "venv" / "bin" / "python"), tmp_path / "corpus"
    ours = [f"{name}=={importlib.metadata.version(name)}" for name in ("msgspec", "numpy")]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "atheris", *ours], check=True)
    corpus.mkdir()
    for number, raw in enumerate([*GOLDEN, GOLDEN_STATE]):
        (corpus / str(number)).write_bytes(raw)
    command = [python, "-m", "tests.chaos.fuzz_decoder", str(FUZZ_S), str(corpus)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("{")]
    print(json.dumps({"scenario": 18, "atheris_s": FUZZ_S, "exit": done.returncode, "last": said[-1:]}))
    assert done.returncode == 0 and said, done.stderr[-3000:]
