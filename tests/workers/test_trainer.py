"""What the trainer takes up, what it judges against, and what becomes of a candidate, on a real Kafka."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from model.checkpoint import fetch_model, publish_model
from model.config import ModelConfig
from model.gate import Slice, Verdict, hold_out
from model.generation import build_generation, publish
from model.learner import Learner, LearnReport
from model.model import Model
from model.sampling import Events, Floats
from stream.consumer import end_offsets
from stream.events import Artifact, Click, ItemVector, encode
from stream.producer import Producer
from tests.records import Record, announced
from tests.workers.service import upwell
from workers.announcements import newest_model
from workers.settings import Settings
from workers.settings import Trainer as TrainerSettings
from workers.trainer import Trainer
from workers.training_input import EncoderChanged, Read, Window

ITEMS, TEXT = [f"i{row}" for row in range(24)], np.eye(24, 8, dtype=np.float32) + 1  # (24, 8)
CONFIG = ModelConfig(text_dim=8, projected_text_dim=4, covisitation_rank=4)


class Round(NamedTuple):
    learned: int
    judged_on: tuple[int, int]  # first event, how many
    trained_to: dict[int, int]


Rounds = Callable[[TrainerSettings, list[list[Read]]], list[Round]]


@pytest.fixture
def settings(settings: Settings, closed_producers: None) -> Settings:
    return settings.model_copy(update={"trainer": TrainerSettings(window_events=5_000)})


def model(items: int = 20) -> Model:
    learner = Learner(CONFIG)
    learner.add_items(ITEMS[:items], TEXT[:items])
    return learner.model()


def clicked(count: int) -> list[Read]:
    """One a millisecond, ten users in turn."""
    return [
        Read(Click(event_id=f"e{at}", user_id=f"u{at % 10}", item_id=ITEMS[at % 24], ts_ms=at), 0, at)
        for at in range(count)
    ]


def send(settings: Settings, topic: str, key: str, value: bytes) -> None:
    with Producer(settings.connection) as producer:
        producer.send_raw(topic, key.encode(), value)


def announce_model(settings: Settings, folder: Path) -> Path:
    """Stored and announced, trained up to offset 50; where it lies."""
    digest = publish_model(model(), f"{folder}/models/m", "better")
    artifact = Artifact(
        name="m", url=f"{folder}/models/m", manifest_sha256=digest, created_ms=1, encoder="e", offsets={0: 50}
    )
    send(settings, settings.topics.models.name, "model", encode(artifact))
    return folder / "models" / "m"


def tell(trainer: Trainer, item_id: str, vector: Floats | None, encoder: str = "e", stamp: int = 0) -> None:
    """As the vectors' topic does; None: removed."""
    event = None
    if vector is not None:
        raw = vector.astype("<f2").tobytes()
        event = encode(ItemVector(item_id=item_id, encoder=encoder, text_hash="h", vector=raw))
    trainer._texts._take(Record(item_id.encode(), event, timestamp=stamp))


def announce_generation(settings: Settings, name: str, folder: Path) -> Path:
    """Built, stored and announced; where it lies."""
    build_generation(folder / name, model(), version=name, encoder="e", offsets={})
    url = publish(folder / name, f"{settings.artifacts}/store")
    send(settings, settings.topics.generations.name, name, encode(announced(folder / name, 1, url)))
    return Path(url.removeprefix("file://"))


def judged(settings: Settings) -> Verdict:
    """Of a learner's own model, which is worse than nothing that serves: there is no event to compare."""
    trainer = Trainer(settings, threading.Event())
    trainer._encoder, trainer._learner = "e", Learner(CONFIG)
    trainer._learner.add_items(ITEMS, TEXT)
    nothing = Events([], [], np.zeros(0, np.float32), np.zeros(0, np.int64))
    return trainer._judged(trainer._learner.model(), hold_out(trainer._learner, nothing))


def test_a_refused_candidate_is_kept_and_named_and_not_announced(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(settings, threading.Event())
    trainer._conclude(model(), Verdict(False, "because"), {0: 7})
    (kept,) = (tmp_path / settings.kafka.prefix / "refused").glob("*/weights.safetensors")
    monkeypatch.setenv("UPWELL_KAFKA__BOOTSTRAP", settings.kafka.bootstrap)
    monkeypatch.setenv("UPWELL_ARTIFACTS", str(tmp_path))
    monkeypatch.setenv("UPWELL_KAFKA__PREFIX", settings.kafka.prefix)
    assert upwell("generations", "refused").stdout == f"{kept.parent.name}  because\n"
    assert end_offsets(settings.connection, settings.topics.models.name) == {0: 0}
    trainer._conclude(model(), Verdict(True, "better"), {0: 7})
    announced = newest_model(settings)
    assert announced is not None and announced.offsets == {0: 7}
    assert (tmp_path / settings.kafka.prefix / "models" / announced.name / "weights.safetensors").exists()


def test_what_cannot_be_read_is_not_taken_for_nothing(settings: Settings, tmp_path: Path) -> None:
    """A candidate is let through without a rival only where no generation is announced, or none is whole."""
    assert judged(settings).reason == "first model"
    first = announce_generation(settings, "g1", tmp_path)
    second = announce_generation(settings, "g2", tmp_path)
    assert "can be compared" in judged(settings).reason
    (second / "items.npy").write_bytes(b"")  # the workers serve the one before it
    assert "can be compared" in judged(settings).reason
    (first / "model").rename(first / "away")
    assert judged(settings).reason == "first model"
    for folder in (first, second):
        shutil.rmtree(folder)
    assert judged(settings).reason == "first model"


def test_a_store_out_of_reach_is_no_reason_to_accept(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce_generation(settings, "g1", tmp_path)

    def out_of_reach(*_: object) -> Path:
        raise OSError("out of reach")

    monkeypatch.setattr("workers.trainer.fetch", out_of_reach)
    verdict = judged(settings)
    assert not verdict.accepted and "out of reach" in verdict.reason


def test_a_release_that_reads_no_generation_of_the_one_before_starts_anew(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("g1", "g2"):
        announce_generation(settings, name, tmp_path)
    load, unreadable = Model.load, ["g2"]

    def of_another_release(folder: Path, device: str = "cpu") -> Model:
        if folder.parent.name in unreadable:
            raise ValueError("arrays differ")
        return load(folder, device)

    monkeypatch.setattr(Model, "load", of_another_release)
    assert "can be compared" in judged(settings).reason  # with the one before it, as the workers serve that
    unreadable.append("g1")
    assert judged(settings).reason == "first model"


def test_it_learns_and_judges_on_its_device(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first learner, one that resumes, and what serves."""
    asked, load = list[str](), Model.load

    class Noted(Learner):
        def __init__(self, config: ModelConfig, seed: int, device: str) -> None:
            asked.append(device)
            super().__init__(config, seed)

    def noted(folder: Path, device: str = "cpu") -> Model:
        asked.append(device)
        return load(folder)

    announce_generation(settings, "g", tmp_path)
    announce_model(settings, tmp_path)
    settings = settings.model_copy(update={"trainer": TrainerSettings(device="cuda")})
    trainer = Trainer(settings, threading.Event(), Noted)
    tell(trainer, ITEMS[0], TEXT[0])
    trainer._grown()
    trainer._texts.caught_up.set()
    trainer._resume()
    monkeypatch.setattr(Model, "load", noted)
    assert trainer._serving() is not None and asked == ["cuda"] * 3


def test_a_restarted_trainer_knows_the_texts_that_have_come_since(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Takes its window from the settings, not from the model; what the model was judged on is not new to it."""
    announce_model(settings, tmp_path)
    for item_id, vector in zip(ITEMS, TEXT.astype("<f2"), strict=True):
        event = ItemVector(item_id=item_id, encoder="e", text_hash="h", vector=vector.tobytes())
        send(settings, settings.topics.vectors.name, item_id, encode(event))
    stop = threading.Event()
    trainer = Trainer(settings, stop)
    monkeypatch.setattr(trainer._window, "read", lambda: clicked(500))
    trainer._texts.start()
    assert (trainer._resume(), trainer._held) == (clicked(500)[50:], settings.trainer.holdout)
    stop.set()
    trainer._texts.join()
    learner = trainer._grown()
    assert learner is not None
    assert dict(zip(learner.ids, learner.text().tolist(), strict=True)) == dict(zip(ITEMS, TEXT.tolist(), strict=True))
    assert learner.config == ModelConfig(window_events=5_000).shaped_like(CONFIG)


def test_a_store_out_of_reach_at_the_start_costs_no_weights(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, tries = announce_model(settings, tmp_path), list[str]()
    stored.parent.rename(away := tmp_path / "away")
    trainer = Trainer(settings, stop := threading.Event())
    tell(trainer, ITEMS[0], TEXT[0])
    trainer._texts.caught_up.set()
    monkeypatch.setattr(trainer._window, "read", lambda: clicked(90))
    monkeypatch.setattr("workers.trainer.RETRY_S", 0)

    def fetched(url: str, digest: str) -> Model:
        tries.append(url)
        if len(tries) == 3:
            away.rename(stored.parent)
        if len(tries) == 6:
            stop.set()
        return fetch_model(url, digest)

    monkeypatch.setattr("workers.trainer.fetch_model", fetched)
    assert trainer._resume() == clicked(90)[50:] and trainer._parent == "m" and len(tries) == 3
    (stored / "ids.json").unlink()
    assert trainer._resume() == clicked(90) and trainer._learner is None  # damaged: anew
    shutil.rmtree(stored)
    assert trainer._resume() == clicked(90) and trainer._learner is None  # deleted, in a store that is there: anew
    shutil.rmtree(stored.parent)
    monkeypatch.setattr("workers.trainer.RETRY_S", 60)
    assert trainer._resume() == clicked(90) and len(tries) == 6  # a wait ends with the process


def test_another_encoder_ends_the_process_and_its_successor_starts_anew(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce_model(settings, tmp_path)
    first, successor = (Trainer(settings, threading.Event()) for _ in range(2))
    tell(first, ITEMS[0], TEXT[0])
    assert first._grown() is not None
    for trainer in (first, successor):
        tell(trainer, ITEMS[1], TEXT[1], "f", stamp=1)
    with pytest.raises(EncoderChanged, match="from e to f"):
        first._grown()
    successor._texts.caught_up.set()
    monkeypatch.setattr(successor._window, "read", lambda: clicked(90))
    assert successor._resume() == clicked(90)
    learner = successor._grown()
    assert learner is not None and learner.ids == [ITEMS[1]]


def test_removed_items_that_nobody_clicked_in_the_window_leave_the_model(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once they are a tenth of the catalogue and a model has been accepted; what the others have learned goes on."""
    often = TrainerSettings(min_events=100, holdout=50, round_s=0)
    trainer = Trainer(settings.model_copy(update={"trainer": often}), stop := threading.Event())
    reads = [read for read in clicked(2_000) if int(read.click.item_id[1:]) < 15]
    verdicts, catalogues, resumed = iter([True, False, True, False]), list[list[str]](), list[Model]()

    def read(window: Window) -> list[Read]:
        """200 more a round; a window that is read anew gives all that was given before."""
        first, end = window.offsets.get(0, 0), 200 * (len(catalogues) + 1)
        window.offsets[0] = reads[end].offset
        return [read for read in reads[:end] if read.offset >= first]

    def judged(candidate: Model, _: Slice) -> Verdict:
        catalogues.append(candidate.ids)
        if len(catalogues) == 1:  # after the first model: known by all, and by no text any more
            for item_id in ITEMS[13:]:
                tell(trainer, item_id, None)
            tell(trainer, ITEMS[23], TEXT[23])  # and back again
        if len(catalogues) == 4:
            stop.set()
        return Verdict(next(verdicts), "")

    def kept(learner: Learner, model: Model, text: Floats, resume: Callable[..., None] = Learner.resume) -> None:
        resumed.append(model)
        resume(learner, model, text)

    for item_id, vector in zip(ITEMS, TEXT, strict=True):
        tell(trainer, item_id, vector)
    monkeypatch.setattr("workers.trainer.POLL_S", 0)
    monkeypatch.setattr(Window, "read", read)
    monkeypatch.setattr(trainer, "_judged", judged)
    monkeypatch.setattr(Learner, "resume", kept)
    trainer.run()
    left = [*ITEMS[:15], ITEMS[23]]
    assert catalogues == [ITEMS, ITEMS, ITEMS, left]
    newest, (again,) = newest_model(settings), resumed
    assert newest is not None and newest.parent is not None
    whole = fetch_model(newest.url, newest.manifest_sha256).arrays["tower.ids"][[*range(15), 23]]
    assert torch.equal(again.arrays["tower.ids"], whole) and whole.any()


def test_what_waits_to_be_learned_is_no_more_than_the_window(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, reads = Trainer(settings, threading.Event()), clicked(7_000)
    monkeypatch.setattr(trainer._window, "read", lambda: reads[4_000:])
    trainer._held = 2_100  # the last round's slice: the window's beginning cuts it, too
    assert trainer._read(reads[:4_000]) == reads[-5_000:] and trainer._held == 100
    trainer._learner = Learner(CONFIG)
    trainer._learner.add_items(ITEMS, TEXT)
    trainer._learner.absorb(trainer._events(reads[:100]))
    trainer._window.erased = {"u0": 7_000}
    monkeypatch.setattr(trainer._window, "read", lambda: reads[:0])
    assert len(trainer._read(reads[-5_000:])) == 4_500 and trainer._held == 90
    assert [bool(trainer._learner.log.past(user, 9)[0]) for user in ("u0", "u1")] == [False, True]


def test_a_round_waits_for_the_items_that_are_being_encoded(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clicks on the others would be passed over for good: a trainer with a backlog is faster than an indexer."""
    trainer, reads, now, trained_to = Trainer(settings, threading.Event()), clicked(240), 1000.0, list[dict[int, int]]()
    trainer._window.offsets = {0: 240}
    monkeypatch.setattr("workers.trainer.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(trainer, "_judged", lambda *_: Verdict(False, ""))
    monkeypatch.setattr(trainer, "_conclude", lambda *given: trained_to.append(given[2]))

    def left() -> int:
        return len(trainer._round(reads))

    for row in range(12):
        tell(trainer, ITEMS[row], TEXT[row])
    assert left() == 240
    now += 29
    for row in range(12, 20):
        tell(trainer, ITEMS[row], TEXT[row])
    assert left() == 240
    now += 29  # four of the 24 are of another catalogue: they hold up nothing, whatever else is encoded meanwhile
    tell(trainer, "new", TEXT[0])
    assert left() == 240 and not trained_to
    now += 2
    assert left() == 120 and trained_to == [{0: 120}]
    assert trainer._learner is not None and trainer._learner.log.count == 100
    now += 29  # nothing has come since
    assert left() < 240 and len(trained_to) == 2


def test_a_round_does_not_wait_for_a_few(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(settings, threading.Event())
    trainer._window.offsets = {0: 240}
    monkeypatch.setattr(trainer, "_judged", lambda *_: Verdict(False, ""))
    monkeypatch.setattr(trainer, "_conclude", lambda *_: None)
    for row in range(22):
        tell(trainer, ITEMS[row], TEXT[row])
    assert len(trainer._round(clicked(240))) == 120


@pytest.fixture
def rounds(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Rounds:
    """Runs a trainer on what its polls give; each round it concluded. No step is taken, every candidate is refused."""

    def run(config: TrainerSettings, polls: list[list[Read]]) -> list[Round]:
        trainer = Trainer(settings.model_copy(update={"trainer": config}), stop := threading.Event())
        trainer._encoder, trainer._text, trainer._learner = "e", dict(zip(ITEMS, TEXT, strict=True)), Learner(CONFIG)
        trainer._learner.add_items(ITEMS, TEXT)
        trainer._window.offsets = {0: 0, 1: 7}
        learned, judged, concluded, left = list[int](), list[Events](), list[dict[int, int]](), iter(polls)

        def read() -> list[Read]:
            if (new := next(left, None)) is None:
                stop.set()
            trainer._window.offsets[0] += len(new or [])
            return new or []

        def learn(events: Events) -> LearnReport:
            learned.append(len(events))
            return LearnReport(0, 0.0)

        def judge(_: Model, held_out: Slice) -> Verdict:
            judged.append(held_out.events)
            return Verdict(False, "")

        monkeypatch.setattr("workers.trainer.POLL_S", 0)
        monkeypatch.setattr(trainer._learner, "learn", learn)
        monkeypatch.setattr(trainer._window, "read", read)
        for name, instead in (
            ("_judged", judge),
            ("_conclude", lambda *given: concluded.append(given[2])),
            ("_take_texts", dict),
            ("_resume", list),
        ):
            monkeypatch.setattr(trainer, name, instead)
        trainer.run()
        slices = [(int(events.ts_ms[0]), len(events)) for events in judged]
        return [Round(*one) for one in zip(learned, slices, concluded, strict=True)]

    return run


def test_a_round_waits_for_new_clicks_and_is_judged_on_all_of_the_held_out(rounds: Rounds) -> None:
    """The last round's slice is not new; a young stream's grows by half of what is new, until it is `holdout`."""
    polls = [clicked(1_000)[at : at + 50] for at in range(0, 1_000, 50)]
    slices = [one.judged_on for one in rounds(TrainerSettings(min_events=100, holdout=200, round_s=0), polls)]
    assert slices == [(50, 50), (100, 100), (150, 150)] + [(at, 200) for at in range(200, 900, 100)]


def test_a_trainer_that_is_behind_learns_by_rounds_that_it_can_publish(
    rounds: Rounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other, without new clicks or a pause; a restart between them learns all from the slice on."""
    monkeypatch.setattr("workers.trainer.MOST_LEARNED", 300)
    reads = [read._replace(offset=read.offset ^ 1) for read in clicked(1_100)]  # the broker's clock went back and forth
    polls = [reads[:1_000], [], [], [], reads[1_000:], []]
    assert rounds(TrainerSettings(min_events=100, holdout=50, round_s=3_600), polls) == [
        Round(300, (300, 50), {0: 300, 1: 7}),
        Round(300, (600, 50), {0: 600, 1: 7}),
        Round(300, (900, 50), {0: 900, 1: 7}),
        Round(150, (1_050, 50), {0: 1_050, 1: 7}),
    ]
