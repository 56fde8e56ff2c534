"""Two processes by torchrun on the processor (gloo) learn what one learns; the trainer runs so on a real Kafka."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from model.learner import Learner
from stream.events import ItemVector, encode
from stream.producer import ClickProducer
from stream.topics import Topics
from tests.model.test_learner import CONFIG, ITEMS, TEXT, chain, flat
from tests.workers.service import clicks
from workers.announcements import newest_model
from workers.bench.stage import environment
from workers.settings import Settings, Trainer
from workers.training_team import training_team

MODEL_S = 150.0  # start, training and judging, in two processes that other work may hold up


def learned(make: type[Learner]) -> dict[str, torch.Tensor]:
    """All that a trainer asks of a learner; what comes of it before and after a restart."""
    before, events = make(replace(CONFIG, warmup_steps=10), 0), chain(600, 0.2)
    before.add_items(ITEMS[:30], TEXT[:30])
    before.learn(events.slice(0, 300))  # knows items that have no text yet
    before.add_items(ITEMS, TEXT)
    before.forget({3})
    report = before.learn(events.slice(300, 600))
    after, model = make(CONFIG, 1), before.model()
    after.resume(model, TEXT[[ITEMS.index(item) for item in model.ids]])
    after.absorb(events.slice(0, 500))
    after.learn(events.slice(500, 600))
    both = {f"{n} {name}": t.clone() for n, made in enumerate((model, after.model())) for name, t in flat(made).items()}
    return both | {"loss": torch.tensor(report.tower_loss)}


@contextmanager
def torchrun(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("UPWELL_")}  # not the service's
    with subprocess.Popen(command, env=plain | environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    with torchrun("--module", "tests.workers.test_training_team", str(tmp_path / "two")) as process:
        one = learned(Learner)
        assert not process.communicate(timeout=120)[1].count("Traceback")
    torch.testing.assert_close(load_file(tmp_path / "two"), one, rtol=1e-5, atol=1e-5)


def test_the_trainer_publishes_and_ends_in_order(settings: Settings, topics: Topics) -> None:
    settings = settings.model_copy(update={"trainer": Trainer(holdout=40)})
    with ClickProducer(settings.connection, topics) as producer:
        for number, text in enumerate(TEXT):
            vector = ItemVector(
                item_id=f"i{number}", encoder="e", text_hash="", vector=text.astype("<f2").tobytes()
            )  # fmt: skip
            producer.send_raw(topics.vectors.name, vector.item_id.encode(), encode(vector))
        for click in clicks(400):
            producer.send(click)
    with torchrun("--module", "workers.cli", "trainer", **environment(settings)) as process:
        deadline = time.monotonic() + MODEL_S
        while newest_model(settings) is None and process.poll() is None:
            assert time.monotonic() < deadline, "no model is announced"
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert newest_model(settings) is not None
    assert said.count("Traceback") == 1 and "SIGKILL" not in said, said  # torchrun's own: the ranks have ended in order


if __name__ == "__main__":
    with training_team() as make:
        if make is not None:
            save_file(learned(make), sys.argv[1])
