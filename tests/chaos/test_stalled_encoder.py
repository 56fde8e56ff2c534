"""Scenario 11: the encoder stands still for five seconds, in the server (guests' words) and in the indexer."""

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import torch

from stream.connection import Connection
from stream.consumer import end_offsets, read_window
from stream.events import Artifact, Item
from stream.producer import ClickProducer
from tests.chaos.clients import Clients
from tests.chaos.harness import SEED, SHORT_SESSION_S, Fleet, Load, holds, judge, make_clicks, report
from tests.chaos.worker import start
from tests.workers.service import ITEMS, until
from workers.indexer import run_indexer
from workers.observe import scrape
from workers.server import run_server

STALL_S, LISTS_S, TEXTS, CLICKS_S = 5.0, 50.0, 100, 100


class Stalling:
    """Stands still at its first texts, whoever asks meanwhile; quick before "stall" is among them and ever after."""

    name, dim, device = "e", 16, torch.device("cpu")

    def __init__(self, *_: Any, **__: Any) -> None:
        self._until = 0.0

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        if not self._until and any("stall" in text for text in texts):
            self._until = time.monotonic() + STALL_S
        time.sleep(max(0.0, self._until - time.monotonic()))
        return np.full((len(texts), self.dim), 0.25, np.float32)


def stall() -> None:
    import model.encoder
    from workers import indexer

    for module in (model.encoder, indexer):
        module.Encoder = Stalling  # type: ignore[attr-defined]


def ask(url: str) -> tuple[int, float]:
    """Status and seconds of a guest's words."""
    began = time.monotonic()
    request = Request(f"{url}/v1/recommendations", json.dumps({"text": "stall", "k": 5}).encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urlopen(request, timeout=60) as answer:
            return answer.status, time.monotonic() - began
    except HTTPError as error:
        error.close()
        return error.code, time.monotonic() - began


def test_only_what_needs_the_encoder_waits(
    connection: Connection, generation: Artifact, tmp_path: Path, long: bool
) -> None:
    draw, began = random.Random(SEED), time.monotonic()
    clicks = make_clicks(draw, 100_000, users=300)
    with Fleet(connection, tmp_path, generation, session_s=None if long else SHORT_SESSION_S) as fleet:
        settings = fleet.settings
        topics, url = settings.topics, f"http://127.0.0.1:{settings.serve.port}"
        roles = {
            role: start(role, settings, tmp_path / f"{role.__name__}.log", fault=stall)
            for role in (run_server, run_indexer)
        }
        fleet.start("a")
        fleet.await_ready()
        until(lambda: scrape(f"{url}/metrics").get("upwell_swaps_total{served}", 0) > 0, "the server serves")

        def vectors() -> int:
            return sum(end_offsets(connection, topics.vectors.name).values())

        until(lambda: vectors() == len(ITEMS), "the catalogue is encoded")
        with (
            ClickProducer(connection, topics) as producer,
            ThreadPoolExecutor(TEXTS) as guests,
            Load(settings, clicks, CLICKS_S) as load,
            Clients(settings.serve.port, LISTS_S, "k=10") as lists,
        ):
            time.sleep(2)
            stalled, sent_s = time.monotonic(), time.time()
            producer.send_item(Item(item_id="late", title="stall")).result()
            words = list(guests.map(ask, [url] * TEXTS))
            again = ask(url)
            until(lambda: vectors() > len(ITEMS), "the new item is encoded")
            load.stop()
        fleet.drain()
        meanwhile = [answer for answer in lists.answers if stalled <= answer.at <= stalled + STALL_S]
        (late,) = (record for record in read_window(connection, topics.vectors.name) if record.key == b"late")
        restores = sum("states restored" in line for line in fleet.json_log("a"))
        verdict = judge(settings, clicks[: load.sent]) | {
            "texts": {str(status): count for status, count in Counter(status for status, _ in words).items()},
            "slowest_text_s": round(max(seconds for _, seconds in words), 1),
            "text_after": again[0],
            "lists": {str(status): count for status, count in Counter(answer.status for answer in meanwhile).items()},
            "slowest_list_s": round(max(answer.ms for answer in meanwhile) / 1000, 2),
            "item_encoded_s": round(late.timestamp / 1000 - sent_s, 1),  # its stamp: the guests are awaited first
            "rebalances": restores - settings.kafka.partitions,
            "exits": len(fleet.exits),
            "alive": all(process.is_alive() for process in roles.values()),
        }
        for process in roles.values():
            process.kill()
            process.join()
    report("stalled_encoder", long, began, verdict)
    assert holds(verdict)
    assert holds(verdict, {"rebalances": 0, "exits": 0, "alive": True, "text_after": 200})
    assert set(verdict["texts"]) == {"200", "503"}
    assert set(verdict["lists"]) == {"200"}
    assert verdict["slowest_list_s"] < STALL_S / 2  # one that waits for the encoder takes all of it
    assert verdict["item_encoded_s"] >= STALL_S  # else the indexer's encoder has not stood still
    if long:  # elsewhere these say more of the machine
        assert verdict["slowest_text_s"] < STALL_S + 5
        assert verdict["item_encoded_s"] < STALL_S + 10
