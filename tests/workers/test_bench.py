"""`upwell bench`, in its quick forms: the figures are there and the work was done. No speed is asserted."""

import json
import math
import operator
import time
from collections import deque
from functools import partial
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from stream.events import decode_click
from workers.bench import data, harness, ingest, probe, scale, search, swap
from workers.bench.stage import Keyed
from workers.settings import Settings, Worker
from workers.states import States

EXPECTED = {
    "ingest": ("fold_path / a", "fold_path / b", "whole_job / c"),
    "freshness": ("p50 ours / weekend, 200 a second", "p99 ours / weekend, 200 a second"),
    "search": ("ours / hnswlib", "ours / faiss", "ours / usearch", "ours / exact"),
    "swap": ("memory peak / one generation", "longest wait in a swap / without"),
    "learn": ("matrix products / learning",),
    "encode": ("upwell / naive",),
    "gpu": ("one by one / cpu, 64 users",),
    "scale": ("clicks, users 3000 / 1000", "queries, items 2000 / 500"),
    "startup": ("worker / import torch",),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_figures(name: str) -> None:
    result = harness.measure(name, harness.Options(quick=True, rounds=1))
    found = json.loads(msgspec.json.encode(result))
    assert found["name"] == name
    assert set(EXPECTED[name]) <= found["ratios"].keys()
    assert all(math.isfinite(figure) and figure > 0 for figure in found["ratios"].values()), found["ratios"]
    assert found["values"] and len(found["load"]) == 2 and found["cores"] >= 1
    if name == "search":
        recalls = {peer: found["values"][f"recall@20 {peer}"] for peer in ("ours", "hnswlib", "faiss", "usearch")}
        assert min(recalls.values()) >= found["values"]["recall@20 wanted of peers"] > 0.9, recalls
    if name == "encode":
        assert found["values"]["lowest_cosine upwell"] > 0.99 and found["values"]["ndcg@10 upwell"] > 0
        assert abs(found["values"]["ndcg@10 float32 - naive"]) < 0.02  # the rounding of another batch, learned from
    if name == "swap":
        assert found["values"]["swaps"] == 1
    if name == "learn":  # both of the same stretch of the stream
        floor, took = found["values"]["floor_ms"], found["values"]["learn_ms past half the events"]
        assert found["ratios"]["matrix products / learning"] == pytest.approx(floor / took, rel=2e-3)


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def turn(name: str) -> float:
        order.append(name)
        return float(len(order))

    contenders = {name: partial(turn, name) for name in "ab"}
    runs = harness.alternate(contenders, 3)
    assert order == list("abbaab")
    assert harness.medians(runs) == {"a": 4.0, "b": 3.0}
    assert harness.ratio({"x": [1.0, 9.0, 4.0], "y": [1.0, 3.0, 4.0]}, "x", "y") == 1.0  # round by round: not 4 / 3


def test_clicks_are_what_they_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "ROOM", 400)
    clicks = data.clicks(2_000, users=300, items=50)
    assert 190 <= np.mean([len(raw) for _, raw in clicks]) <= 210
    assert len({raw for _, raw in clicks}) == 2_000
    assert len({user_id for user_id, _ in clicks}) > 290
    batches = ingest.micro_batches(clicks, Settings(worker=Worker(batch_clicks=20)))
    assert max(map(len, batches)) == 20
    touched = sum(len(batch) for batch in batches)
    assert 300 < touched < 2_000  # a query a touched user, not a click
    assert sum(len(query.history) for batch in batches for query in batch) > 2 * 2_000  # states are carried on


def test_no_click_is_folded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known event id takes the short way out of the fold; and a longer history costs more, which is not to be told
    of few users."""
    folded, longest, fold = list[str](), list[int](), scale.fold

    def noted(states: States, clicks: Keyed, first: int) -> None:
        longest.append(max((len(state.history) for state in states.values()), default=0))
        folded.extend(decode_click(raw).event_id for _, raw in clicks)
        fold(states, clicks, first)

    monkeypatch.setattr(scale, "fold", noted)
    turn, _ = scale.with_users(20, harness.Options(size=1_000))
    assert turn() > 0 and turn() > 0
    assert len(folded) == len(set(folded)) == 20 * scale.HELD + 2 * 1_000
    assert max(longest) == scale.HELD


def test_the_steady_wait_is_of_a_window_as_long_as_a_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest of many waits grows with their number."""
    windows, during = list[float](), swap.Traffic.during

    def watched(traffic: swap.Traffic, *arguments: Any) -> float:
        began = time.perf_counter()
        longest = during(traffic, *arguments)
        windows.append(time.perf_counter() - began)
        return longest

    monkeypatch.setattr(swap.Traffic, "during", watched)
    monkeypatch.setattr(swap, "seconds", lambda load: load() or 2.5)
    swap.work(harness.Options(quick=True, rounds=1, size=1_000))
    assert len(windows) == 3 and windows[2] >= 2.5  # warm, a swap, none


def test_lifted_vectors_rank_by_inner_product() -> None:
    vectors = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    query = np.random.default_rng(1).normal(size=(1, 8)).astype(np.float32)
    distances = ((search.lifted(vectors) - np.pad(query, ((0, 0), (0, 1)))) ** 2).sum(axis=1)
    assert np.argmin(distances) == np.argmax(vectors @ query[0])


def test_the_peers_find_what_an_exact_scan_finds() -> None:
    model_like = data.clustered(1_000, 16)
    wanted = np.argsort(-(model_like[:50] @ model_like.T), axis=1)[:, :20]
    for name, (set_ef, rows_of) in search.peers(search.lifted(model_like)).items():
        set_ef(512)
        found = rows_of(np.pad(model_like[:50], ((0, 0), (0, 1))))
        assert np.mean([len(set(a) & set(b)) / 20 for a, b in zip(found, wanted, strict=True)]) > 0.95, name


def test_a_peer_searches_no_wider_than_it_must() -> None:
    for needed in (1, 20, 21, 40, 64, 65, 300, 1_000, 2_049, 4_096):
        ef = search.least_ef(partial(operator.le, needed))
        assert ef is not None and max(search.K, needed) <= ef <= max(search.K, search.EF_STEP * needed), (needed, ef)
    assert search.least_ef(lambda ef: ef > 4_096) is None


class Lists:
    """A consumer that has these records."""

    def __init__(self, *values: bytes) -> None:
        self._values = values

    async def getmany(self, timeout_ms: int) -> dict[int, list[Any]]:
        return {0: [SimpleNamespace(value=value) for value in self._values]}


async def test_a_list_answers_the_click_it_names_and_those_before_it() -> None:
    waiting = {"u": deque([("e1", 1.0), ("e2", 2.0), ("e3", 3.0)])}
    empty = b'{"user_id": "u", "event_id": "e3", "items": []}'
    first = b'{"user_id": "u", "event_id": "e2", "items": [1], "clicked_ms": 5, "sent_ms": 6}'
    seen = await probe.read_lists(Lists(empty, first, first), waiting, 2)
    assert [(one.due, one.clicked, one.sent) for one in seen] == [(1.0, 5.0, 6.0), (2.0, 5.0, 6.0)]
    assert list(waiting["u"]) == [("e3", 3.0)]
