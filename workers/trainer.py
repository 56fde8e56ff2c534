"""Rounds of fine-tuning on the newest clicks; a candidate that does not win on clicks it has not seen is refused.

upwell.clicks (window) -> Learner.learn -> Learner.model -> judge on the newest slice
    accepted -> artifact store -> upwell.models          refused -> refused/, with the reason
"""

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import structlog
from kafka.errors import KafkaError
from numpy.typing import NDArray

from model.checkpoint import fetch_model, prune_models, publish_model
from model.config import ModelConfig
from model.drift import drift
from model.gate import Slice, Verdict, hold_out, judge
from model.generation import fetch
from model.learner import Learner
from model.manifest import DamagedGeneration
from model.model import Model
from model.sampling import Events
from stream.events import Artifact, encode
from stream.producer import Producer
from workers import metrics
from workers.announcements import newest_model, read_announcements
from workers.processes import compute_in_one_thread, end_with_threads, stop_on_signal
from workers.settings import Settings
from workers.training_input import EncoderChanged, Read, Texts, Window, events_of
from workers.training_team import training_team

log = structlog.get_logger()

POLL_S = 1.0
RETRY_S = 5.0
MOST_LEARNED = 50_000  # clicks a round, a minute at 1.2 ms each: a restart loses what has not been published
KEEP_MODELS = 5
DRIFT_CLICKS = 5000  # clicks before the newest slice that it is compared with
MOST_UNKNOWN = 0.1  # of a round's clicks on items without a vector, before it waits for them
VECTORS_S = 30.0  # between two of those vectors: the indexer sends a group each few seconds
MOST_REMOVED = 0.1  # of the items, before the learner is made anew without them: it costs a read of the window


class Trainer:
    """One thread; `run` until stopped."""

    def __init__(self, settings: Settings, stop: threading.Event, make: type[Learner] = Learner) -> None:
        self._make = make
        self._settings, self._config, self._stop = settings, settings.trainer, stop
        self._texts, self._window = Texts(settings, stop), Window(settings)
        self._producer = Producer(settings.connection)
        self._text: dict[str, NDArray[np.float32]] = {}
        self._removed = set[str]()  # items of the learner that were removed since it was made
        self._held = 0  # of the pending clicks the oldest: the last round's slice, judged on and not yet learned
        self._awaited = set[str]()  # items without a vector that the next round waits for
        self._came = float("-inf")  # monotonic time of the newest vector: of these, where there are any
        self._before: deque[str] = deque(maxlen=DRIFT_CLICKS)  # items of the clicks before the newest slice
        self._encoder = ""
        self._learner: Learner | None = None
        self._parent: str | None = None  # name of the newest accepted model

    def run(self) -> None:
        self._texts.start()
        pending = self._resume()
        ended = float("-inf")  # the first round waits for events only
        while not self._stop.wait(POLL_S):
            pending = self._read(pending)
            enough = len(pending) - self._held >= self._config.min_events
            if enough and time.monotonic() - ended > self._config.round_s:
                before, pending = self._parent, self._round(pending)
                if self._parent != before and len(self._removed) > MOST_REMOVED * len(self._text):
                    pending, self._window = [], Window(self._settings)
                    pending = self._resume()
                behind = len(pending) > self._held  # more waited than a round takes: the next one begins at once
                ended = float("-inf") if behind else time.monotonic()
        self._producer.close()

    def _read(self, pending: list[Read]) -> list[Read]:
        """What was pending and what has come since, without the users who are erased; the newest of it, where clicks
        come faster than they are learned."""
        try:
            new, erased = self._window.read(), self._window.erased
        except (KafkaError, TimeoutError) as error:  # Kafka is away: a successor would learn anew what is unpublished
            log.warning("clicks not read", reason=repr(error))
            return pending
        if erased and self._learner is not None:
            self._learner.forget(erased)
        self._held -= sum(read.click.user_id in erased for read in pending[: self._held])
        kept = [read for read in pending if read.click.user_id not in erased] + new
        over = max(0, len(kept) - self._config.window_events)
        self._held = max(0, self._held - over)
        return kept[over:]

    def _resume(self) -> list[Read]:
        """The window; after a restart with the newest model's weights, and only what it has not been trained on.

        Of items that were removed it keeps those that the window's clicks are on: they tell the users' tastes.
        """
        self._learner, self._parent, self._held = None, None, 0
        announced = newest_model(self._settings)
        while not self._texts.caught_up.wait(POLL_S):
            if self._stop.is_set():
                return []
        reads = self._window.read()
        if announced is None or (model := self._fetched(announced)) is None:
            return reads
        self._take_texts()
        model = model.only(self._text.keys() | {read.click.item_id for read in reads})
        text = np.zeros((len(model.ids), model.config.text_dim), np.float32)  # (N, E)
        for row, item_id in enumerate(model.ids):
            text[row] = self._text.get(item_id, 0)
        config = ModelConfig(window_events=self._config.window_events).shaped_like(model.config)
        self._parent, self._learner = announced.name, self._make(config, self._config.seed, self._config.device)
        self._learner.resume(model, text)
        _add(self._learner, {i: text for i, text in self._text.items() if i not in self._learner.rows})
        self._removed.clear()
        known = [read for read in reads if read.offset < announced.offsets.get(read.partition, 0)]
        self._learner.absorb(self._events(known))
        log.info("resumed", model=announced.name, known=len(known), new=len(reads) - len(known))
        unlearned = [read for read in reads if read.offset >= announced.offsets.get(read.partition, 0)]
        self._held = min(len(unlearned), self._config.holdout)  # what the model was judged on begins them
        return unlearned

    def _fetched(self, announced: Artifact) -> Model | None:
        """None where training has to start anew: of another encoder, damaged, or deleted from a store that is there.

        A store out of reach says nothing about the model: it is waited for, rather than that the weights are lost.
        """
        while announced.encoder == self._texts.encoder and not self._stop.is_set():
            try:
                return fetch_model(announced.url, announced.manifest_sha256)
            except (DamagedGeneration, ValueError) as error:
                log.error("training starts anew", model=announced.name, reason=str(error))
                return None
            except OSError as error:
                log.error("model not fetched", model=announced.name, reason=str(error))
                self._stop.wait(RETRY_S)
        return None

    def _round(self, reads: list[Read]) -> list[Read]:
        """Train on all but the newest slice, or on MOST_LEARNED, and judge on the slice that follows: the next round
        begins by learning it.

        A young stream's slice grows to `trainer.holdout` by half of the new clicks a round: the rest is for training.

        Raises FloatingPointError when training diverges: the process ends, and its successor resumes from the
        newest model that was accepted.
        """
        learner = self._grown()
        if learner is None:
            return reads  # no item has a vector yet
        cut = min(max(len(reads) - self._config.holdout, (len(reads) - self._held) // 2), MOST_LEARNED)
        if self._waits(learner, reads[:cut]):
            return reads
        held = reads[cut : cut + self._config.holdout]
        with metrics.training_s.time():
            report = learner.learn(self._events(reads[:cut]))
        candidate = learner.model()
        verdict = self._judged(candidate, hold_out(learner, self._events(held)))
        metrics.training_loss.set(report.tower_loss)
        trained_to = dict(self._window.offsets)
        for read in reads[cut:]:  # in Kafka's order of time, not of offsets where its clock was set back
            trained_to[read.partition] = min(trained_to[read.partition], read.offset)
        self._before.extend(read.click.item_id for read in reads[:cut])
        metrics.drift.set(drift(self._texts_of(self._before), self._texts_of(r.click.item_id for r in held)))
        self._conclude(candidate, verdict, trained_to)
        self._held = len(held)
        return reads[cut:]

    def _waits(self, learner: Learner, reads: Sequence[Read]) -> bool:
        """Whether a round is put off: many of its clicks, on items that the indexer is still at, would be lost to it.

        Until none of those vectors has come for VECTORS_S: an item that never gets one holds up nothing.
        """
        unknown = [read.click.item_id for read in reads if read.click.item_id not in learner.rows]
        waits = len(unknown) > MOST_UNKNOWN * len(reads) and time.monotonic() - self._came < VECTORS_S
        if waits and not self._awaited:
            log.info("round waits for vectors", clicks=len(reads), unknown=len(unknown))
        self._awaited = (self._awaited or set(unknown)) if waits else set()
        return waits

    def _judged(self, candidate: Model, held_out: Slice) -> Verdict:
        assert self._learner is not None
        try:
            serving = self._serving()
        except (OSError, KafkaError) as error:
            return Verdict(False, f"the serving generation cannot be read: {error}")
        return judge(candidate, serving, held_out, self._learner.text())

    def _serving(self) -> Model | None:
        """The model of the generation that is to serve now, a rollback or a pin heeded: the first that this release can
        read, as the workers take it. None where there is none of this encoder.

        Raises OSError, KafkaError where the store or Kafka is out of reach: it may well serve.
        """
        for announced in read_announcements(self._settings).wanted():
            try:
                folder = fetch(announced.url, self._settings.cache / "generations", announced.manifest_sha256)
                ours = announced.encoder == self._encoder
                return Model.load(folder / "model", self._config.device) if ours else None
            except (DamagedGeneration, ValueError) as error:
                log.warning("generation passed over", generation=announced.name, reason=str(error))
        return None

    def _grown(self) -> Learner | None:
        """The learner, with the items that have come since; None while there are none at all."""
        new = self._take_texts()
        if not self._text:
            return None
        if self._learner is None:
            width = len(next(iter(self._text.values())))
            config = ModelConfig(text_dim=width, window_events=self._config.window_events)
            self._learner, new = self._make(config, self._config.seed, self._config.device), self._text
        _add(self._learner, new)
        return self._learner

    def _take_texts(self) -> dict[str, NDArray[np.float32]]:
        """The text vectors that have come since the last call. Raises EncoderChanged."""
        encoder, new, removed = self._texts.take()
        if self._text and encoder != self._encoder:
            raise EncoderChanged(f"from {self._encoder} to {encoder}")
        self._encoder = encoder
        if (new.keys() - self._text.keys()) & (self._awaited or new.keys()):
            self._came = time.monotonic()
        self._text |= new
        for item_id in removed:
            self._text.pop(item_id, None)
        self._removed = (self._removed | removed) - new.keys()
        return new

    def _texts_of(self, items: Iterable[str]) -> NDArray[np.float32]:
        """Text vectors (B, E) of those items that have one."""
        return np.array([self._text[item_id] for item_id in items if item_id in self._text], np.float32)

    def _events(self, reads: Sequence[Read]) -> Events:
        """Clicks on items that the learner has; the others stay in the users' histories, as ids."""
        assert self._learner is not None
        known = [read.click for read in reads if read.click.item_id in self._learner.rows]
        return events_of(known, self._settings.weight)

    def _conclude(self, candidate: Model, verdict: Verdict, trained_to: Mapping[int, int]) -> None:
        """Announce an accepted candidate; keep a refused one, with the reason beside it.

        Where the store cannot be written, this candidate is lost, not what it has learned: the next one holds it.
        """
        created_ms = time.time_ns() // 1_000_000
        name, place = f"m{created_ms}", "models" if verdict.accepted else "refused"
        for model in ("candidate", "serving"):
            metrics.gate_ndcg.labels(model).set(verdict.metrics.get(f"{model}_ndcg@10", float("nan")))
        root = f"{self._settings.store}/{place}"
        try:
            digest = publish_model(candidate, f"{root}/{name}", verdict.reason)
            prune_models(root, KEEP_MODELS, name)
        except OSError as error:
            metrics.rounds.labels("failed").inc()
            log.error("model not stored", model=name, accepted=verdict.accepted, reason=str(error))
            return
        metrics.rounds.labels("published" if verdict.accepted else "refused").inc()
        log.info("round concluded", model=name, accepted=verdict.accepted, reason=verdict.reason)
        artifact = Artifact(
            name=name,
            url=f"{root}/{name}",
            manifest_sha256=digest,
            created_ms=time.time_ns() // 1_000_000,  # stored: a generation from before cannot hold it
            encoder=self._encoder,
            metrics=verdict.metrics,
            offsets=dict(trained_to),
            parent=self._parent,
        )
        if verdict.accepted:
            self._producer.send_raw(self._settings.topics.models.name, b"model", encode(artifact))
            self._producer.flush()
            self._parent = name


def _add(learner: Learner, texts: Mapping[str, NDArray[np.float32]]) -> None:
    if texts:
        learner.add_items(list(texts), np.stack(list(texts.values())))


def run_trainer(settings: Settings) -> int:
    """Until a signal; the exit code."""
    compute_in_one_thread()
    end_with_threads()
    with training_team() as make:
        if make is not None:
            metrics.serve(settings.trainer.metrics_port, settings.metrics_host)
            Trainer(settings, stop_on_signal(), make).run()
    return 0
