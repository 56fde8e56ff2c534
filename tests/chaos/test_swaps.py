"""Scenario 6: swaps while 200 requests a second are answered."""

import os
import time
from pathlib import Path

import msgspec
import numpy as np

from model.config import ModelConfig
from model.generation import build_generation
from model.learner import Learner
from stream.connection import Connection
from stream.events import Artifact, Item, encode
from stream.ports import free_port
from stream.producer import ClickProducer, Producer
from stream.topics import Topics, ensure
from tests.chaos.clients import Answer, Clients
from tests.chaos.harness import report
from tests.chaos.worker import start
from tests.records import announced
from tests.workers.service import until
from workers.observe import scrape
from workers.server import run_server
from workers.settings import Kafka, Serve, Settings

ITEMS, RATE, K = 2000, 200.0, 20


def generation(folder: Path, name: str) -> Artifact:
    """Its items carry its name."""
    learner = Learner(ModelConfig(text_dim=16, projected_text_dim=16))
    text = np.random.default_rng(len(name)).normal(size=(ITEMS, 16)).astype(np.float32)
    learner.add_items([f"{name}-{row}" for row in range(ITEMS)], text)
    build_generation(folder / name, learner.model(), version=name, encoder="e", offsets={})
    return announced(folder / name, 1)


def percentiles(answers: list[Answer]) -> dict[str, float]:
    found = np.percentile([answer.ms for answer in answers], [50, 99, 100]).round(1).tolist()
    return dict(zip(("p50", "p99", "max"), found, strict=True))


def test_no_answer_fails_is_empty_or_mixes_two_generations(connection: Connection, tmp_path: Path, long: bool) -> None:
    started = time.monotonic()
    swaps, topics, port = 100 if long else 5, Topics(f"swap{os.getpid()}", partitions=1), free_port()
    ensure(topics, connection)
    both = [generation(tmp_path, name) for name in ("even", "odd")]
    with ClickProducer(connection, topics) as catalogue:
        for name in ("even", "odd"):
            for row in range(ITEMS):
                catalogue.send_item(Item(item_id=f"{name}-{row}", title=f"{name} {row}"))
    producer = Producer(connection)

    def announce(number: int) -> None:
        artifact = msgspec.structs.replace(both[number % 2], created_ms=number + 1)
        producer.send_raw(topics.generations.name, artifact.name.encode(), encode(artifact))
        producer.flush()

    def swapped() -> int:
        return int(scrape(f"http://127.0.0.1:{port}/metrics").get("upwell_swaps_total{served}", 0))

    announce(0)
    settings = Settings(
        kafka=Kafka(bootstrap=connection.bootstrap, prefix=topics.prefix, partitions=1),
        serve=Serve(port=port),
        cache=tmp_path / "cache",
    )
    server = start(run_server, settings, tmp_path / "serve.log")
    spans: list[tuple[float, float]] = []
    try:
        until(lambda: swapped() == 1, "the first generation serves")
        with Clients(port, RATE, f"k={K}") as clients:
            calm_s, began = 30 if long else 5, time.monotonic()
            while time.monotonic() - began < calm_s:  # as often as in a swap: its metrics cost the server some ms
                assert swapped() == 1
                time.sleep(0.1)
            began = time.monotonic()
            for number in range(1, swaps + 1):
                at = time.monotonic()
                announce(number)
                until(lambda number=number: swapped() == number + 1, f"swap {number}")  # type: ignore[misc]
                spans.append((at, time.monotonic()))
                time.sleep(0.5)
        producer.close()
    finally:
        server.terminate()
        server.join(20)
    assert server.exitcode is not None
    calm = [answer for answer in clients.answers[40:] if answer.at < began]
    during = [answer for answer in clients.answers if any(first <= answer.at <= last for first, last in spans)]
    answers = clients.answers
    wrong = {
        "failed": sum(answer.status != 200 for answer in answers),
        "not_full": sum(len(set(answer.items)) != K for answer in answers),
        "mixed": sum(not item.startswith(f"{answer.generation}-") for answer in answers for item in answer.items),
    }
    generations = len({answer.generation for answer in answers})
    figures = {"swaps": swaps, "answers": len(answers), "generations": generations, **wrong}
    report("swaps", long, started, figures | {"baseline_ms": percentiles(calm), "during_swap_ms": percentiles(during)})
    assert len(answers) > 0.9 * RATE * (spans[-1][1] - began)
    assert generations == 2
    assert not any(wrong.values())
    if long:  # elsewhere it says more of the machine
        assert percentiles(during)["max"] <= 50
