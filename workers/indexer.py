"""Item texts in, text vectors out; a model and the vectors in, a generation out.

upwell.items -> Encoder -> upwell.vectors      (every text once: cache by content hash)
upwell.models + vectors -> build_generation -> artifact store -> upwell.generations
"""

import tempfile
import threading
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import structlog
import torch
from kafka.errors import KafkaError
from numpy.typing import NDArray

from model.checkpoint import fetch_model
from model.config import ModelConfig
from model.encoder import Encoder
from model.generation import build_generation, fetch, prune, publish
from model.learner import Learner
from model.manifest import DamagedGeneration, manifest_sha256
from model.model import Model
from model.probes import RecallTooLow
from stream.consumer import tail
from stream.events import Artifact, BadEvent, Item, ItemVector, decode, decode_item, encode
from stream.producer import Producer
from stream.text import item_text
from workers import metrics
from workers.announcements import read_announcements
from workers.processes import end_with_threads, stop_on_signal
from workers.progress import seldom
from workers.settings import Settings

log = structlog.get_logger()

RETRY_S = 5.0
PROGRESS_S = 30.0
ENCODE_AT_ONCE = 256  # texts: 2 s on two cores
ENCODE_S = 5.0  # between two looks at the topics and at what is to be built


class Base(NamedTuple):
    """A model, and what a generation made of it says of its origin."""

    model: Model
    parent: str | None  # name of the model as it was announced; None: untrained
    offsets: Mapping[int, int]  # up to which it was trained
    metrics: Mapping[str, float]
    generation: str | None  # that holds it; None: not yet


class Indexer:
    """One thread: reads topics, encodes what is new, builds when a build is due."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._topics = settings, settings.topics
        config = settings.indexer
        self._encoder = Encoder(config.encoder, pooling=config.pooling, cache=settings.cache / "vectors.sqlite")
        self._producer = Producer(settings.connection)
        self._pending: dict[str, Item] = {}
        self._vectors: dict[str, NDArray[np.float32]] = {}
        self._hashes: dict[str, str] = {}
        self._announced: Artifact | None = None  # the newest model
        self._unbuilt = False  # no generation holds it yet
        self._base: Base | None = None  # the newest generation's, as far as this process knows
        self._indexed: set[str] = set()  # its items
        self._encoded: set[str] = set()  # items with a text that is newer than the newest build
        self._not_before = 0.0  # monotonic time of the next build, after one that failed
        self._changed = False  # a build may be due: to see whether one is takes all item ids

    def run(self, stop: threading.Event) -> None:
        topics, caught_up = self._topics, threading.Event()
        names = [topics.items.name, topics.vectors.name, topics.models.name]
        for records in tail(self._settings.connection, names, stop, caught_up.set):
            for record in records:
                self._take(record)
            self._changed |= bool(records or self._pending)
            if caught_up.is_set():
                self._encode(stop)
                if self._changed and self._vectors and time.monotonic() >= self._not_before:
                    self._changed = False
                    self._build_if_due()
        self._producer.close()

    def _take(self, record: Any) -> None:
        try:
            if record.topic == self._topics.models.name:
                self._take_model(decode(record.value, Artifact))
            elif record.topic == self._topics.items.name:
                self._take_item(record)
            else:
                self._take_vector(record)
        except BadEvent as error:
            log.warning("record passed over", topic=record.topic, offset=record.offset, cause=str(error))

    def _take_model(self, announced: Artifact) -> None:
        if announced.encoder == self._encoder.name:
            self._announced, self._unbuilt = announced, True
        else:
            log.warning("model of another encoder passed over", model=announced.name, encoder=announced.encoder)

    def _take_item(self, record: Any) -> None:
        item_id, item = decode_item(record.value, record.key, Item)
        if item is None:
            self._pending.pop(item_id, None)
            if self._vectors.pop(item_id, None) is not None:
                self._hashes.pop(item_id, None)
                self._producer.send_raw(self._topics.vectors.name, item_id.encode(), None)
        else:
            self._pending[item_id] = item

    def _take_vector(self, record: Any) -> None:
        item_id, vector = decode_item(record.value, record.key, ItemVector)
        if vector is None:  # removed: what stands before it on the topic may have been taken after the item's own null
            self._vectors.pop(item_id, None)
            self._hashes.pop(item_id, None)
        elif vector.encoder == self._encoder.name:
            self._hashes[item_id] = vector.text_hash
            self._vectors[item_id] = np.frombuffer(vector.vector, "<f2").astype(np.float32)
        else:  # it stands in place of ours, which goes out anew with the item: at a start all are read again, later
            self._hashes.pop(item_id, None)  # only what is sent again, or two indexers would answer each other for ever

    def _encode(self, stop: threading.Event) -> None:
        """Text vectors of the pending items whose text is new, in groups, onto the vectors topic.

        For ENCODE_S; before the first build all of them: what an encoder begins with is to hold the catalogue.
        """
        until = time.monotonic() + ENCODE_S
        while self._pending and not stop.is_set():
            if texts := self._new_texts():
                self._encode_group(texts)
            if self._base is not None and time.monotonic() > until:
                return

    def _new_texts(self) -> dict[str, tuple[str, str]]:
        """Item -> text and its hash, of as many as are encoded at once, taken from the end of what is pending."""
        new: dict[str, tuple[str, str]] = {}
        while self._pending and len(new) < ENCODE_AT_ONCE:
            item_id, item = self._pending.popitem()
            text = item_text(item)
            text_hash = sha256(text.encode()).hexdigest()[:32]
            if self._hashes.get(item_id) != text_hash:
                new[item_id] = text, text_hash
        return new

    def _encode_group(self, texts: Mapping[str, tuple[str, str]]) -> None:
        with metrics.encode_s.labels(str(self._encoder.device)).time():
            vectors = self._encoder.encode([text for text, _ in texts.values()])  # (B, E)
        metrics.encoded_items.inc(len(texts))
        for (item_id, (_, text_hash)), vector in zip(texts.items(), vectors, strict=True):
            self._vectors[item_id], self._hashes[item_id] = vector, text_hash
            self._encoded.add(item_id)
            event = ItemVector(
                item_id=item_id,
                encoder=self._encoder.name,
                text_hash=text_hash,
                vector=vector.astype("<f2").tobytes(),
            )
            self._producer.send_raw(self._topics.vectors.name, item_id.encode(), encode(event))
        self._producer.flush()
        log.info("items encoded", items=len(texts), pending=len(self._pending))

    def _build_if_due(self) -> None:
        """Build, check, publish, announce. A model or an index that fails its checks changes nothing."""
        began = time.monotonic()
        try:
            if self._base is None:
                self._resume()
                self._changed = True
            elif self._due(self._base):
                self._build()
        except (OSError, KafkaError) as error:  # the store is full, or it or Kafka out of reach: no fault of the model
            log.error("generation not stored", reason=str(error))
            self._wait(began)
        except (DamagedGeneration, RecallTooLow, ValueError) as error:
            log.error("generation not built", model=self._announced and self._announced.name, reason=str(error))
            self._unbuilt = False
            self._wait(began)

    def _wait(self, began: float) -> None:
        """No build for as long as the failed one took: the same items may fail for ever, each time minutes."""
        now, self._changed = time.monotonic(), True
        self._not_before = now + max(RETRY_S, now - began)

    def _resume(self) -> None:
        """After a start: the newest model has had its turn where a generation holds it, or is younger than it."""
        self._base = self._newest()
        self._indexed = set(self._base.model.ids) if self._base.generation else set()
        if (model := self._announced) is not None:
            generations = read_announcements(self._settings).generations.values()
            self._unbuilt = all(g.parent != model.name and g.created_ms < model.created_ms for g in generations)

    def _due(self, base: Base) -> bool:
        """A model that no generation holds, or as many new items as `indexer.fresh_items`, or a first generation.

        Where texts alone serve, a corrected one counts as new: no model is to come with it. While more are pending, as
        many as are indexed: an import in builds of 500 each would build all of it again and again.
        """
        known = self._indexed if base.parent else self._indexed - self._encoded
        fresh = len(self._vectors.keys() - known)
        enough = max(self._settings.indexer.fresh_items, len(self._indexed) if self._pending else 0)
        return base.generation is None or self._unbuilt or fresh >= enough

    def _newest(self) -> Base:
        """Of the generation announced last, which may be one that was rolled back to: what that held back stays back.

        Where this release can read none, of the newest model; where not that either, of the texts alone.
        """
        foreign = False
        for announced in reversed(read_announcements(self._settings).generations.values()):
            if self._base is not None and announced.name == self._base.generation:
                return self._base
            if foreign := foreign or announced.encoder != self._encoder.name:
                continue  # what serves is of another encoder: one of this has to be built, whatever came before
            try:
                folder = fetch(announced.url, self._settings.cache / "generations", announced.manifest_sha256)
                model = Model.load(folder / "model")
            except (DamagedGeneration, ValueError) as error:
                log.warning("generation passed over", generation=announced.name, reason=str(error))
                continue
            return Base(model, announced.parent, announced.offsets, announced.metrics, announced.name)
        try:
            return _trained(self._announced) if self._announced else self._texts_alone()
        except (DamagedGeneration, ValueError) as error:
            log.error("text alone serves", reason=str(error))
            return self._texts_alone()

    def _build(self) -> None:
        began = time.monotonic()
        base = _trained(self._announced) if self._announced and self._unbuilt else self._newest()
        if base.parent is None:
            base = self._texts_alone()  # anew: directions found in a few texts are not those of a catalogue
        base = base._replace(model=self._covering(base.model))
        artifact = self._publish(base)
        # Read before it is announced: what serves till then, or is pinned, is what it is on trial against.
        kept = {artifact.name, *(one.name for one in read_announcements(self._settings).wanted()[:1])}
        self._base, self._unbuilt = base._replace(generation=artifact.name), False
        self._indexed, self._encoded = set(base.model.ids), set()
        self._producer.send_raw(self._topics.generations.name, artifact.name.encode(), encode(artifact))
        for pruned in self._prune(kept):
            self._producer.send_raw(self._topics.generations.name, pruned.encode(), None)
        self._producer.flush()
        metrics.build_s.observe(time.monotonic() - began)
        metrics.index_recall.set(artifact.metrics["recall@20"])
        log.info("generation published", generation=artifact.name, items=len(base.model.ids), **artifact.metrics)

    def _prune(self, kept: set[str]) -> list[str]:
        try:
            return prune(f"{self._settings.store}/generations", self._settings.indexer.keep, kept)
        except OSError as error:
            log.error("old generations not deleted", reason=str(error))
            return []

    def _covering(self, model: Model) -> Model:
        """The model with rows for all items that have a vector."""
        new = sorted(self._vectors.keys() - set(model.ids))
        return model.extended(new, np.stack([self._vectors[i] for i in new])) if new else model

    def _texts_alone(self) -> Base:
        """What serves before the first training."""
        learner = Learner(ModelConfig(text_dim=self._encoder.dim))
        ids = sorted(self._vectors)
        learner.add_items(ids, np.stack([self._vectors[item_id] for item_id in ids]))
        return Base(learner.model(), None, {}, {}, None)

    def _publish(self, base: Base) -> Artifact:
        created_ms = time.time_ns() // 1_000_000
        name = time.strftime("g%Y%m%dT%H%M%S", time.gmtime(created_ms / 1000)) + f"-{created_ms % 1000:03d}"
        root = f"{self._settings.store}/generations"
        with tempfile.TemporaryDirectory(prefix="upwell-build-") as scratch:
            folder = Path(scratch) / name
            manifest = build_generation(
                folder,
                base.model,
                version=name,
                encoder=self._encoder.name,
                offsets=base.offsets,
                parent=base.parent,
                metrics=base.metrics,
                threads=self._settings.indexer.threads,
                progress=seldom(lambda done, of: log.info("index being built", done=done, of=of), PROGRESS_S),
            )
            digest = manifest_sha256(folder)
            url = publish(folder, root)
        return Artifact(
            name=name,
            url=url,
            manifest_sha256=digest,
            created_ms=created_ms,
            encoder=manifest.encoder,
            metrics=manifest.metrics,
            offsets=manifest.offsets,
            parent=manifest.parent,
        )


def _trained(announced: Artifact) -> Base:
    """Raises as fetch_model."""
    model = fetch_model(announced.url, announced.manifest_sha256)
    return Base(model, announced.name, announced.offsets, announced.metrics, None)


def run_indexer(settings: Settings) -> int:
    torch.set_num_threads(1)
    end_with_threads()
    metrics.serve(settings.indexer.metrics_port, settings.metrics_host)
    Indexer(settings).run(stop_on_signal())
    return 0
