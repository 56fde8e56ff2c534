"""What the benchmarks run on: made-up clicks and catalogues of any size, and vectors as a trained tower has them."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from model.config import PER_ITEM, ModelConfig
from model.generation import build_generation
from model.learner import Learner
from model.manifest import manifest_sha256
from model.model import Model
from model.probes import ModelLike
from model.queries import unit
from model.sampling import Events, Floats, History
from stream.datasets import Dataset, load_dataset
from stream.events import Artifact, Click, Item, encode
from workers.bench.harness import tell
from workers.progress import seldom
from workers.training_input import events_of

SMALL = ModelConfig(text_dim=16, tower_dim=8, covisitation_rank=8, projected_text_dim=8, hidden=16)


def clicks(count: int, users: int, items: int, seed: int = 0, first_user: int | None = None) -> list[tuple[str, bytes]]:
    """User id and JSON of about 200 bytes; users as likely as one another, or each one click from `first_user` on;
    items by Zipf's law.
    """
    draw = np.random.default_rng(seed)
    who = draw.integers(users, size=count) if first_user is None else first_user + np.arange(count)
    what = (draw.zipf(1.2, size=count) - 1) % items
    now_ms = time.time_ns() // 1_000_000

    def click(number: int) -> tuple[str, bytes]:
        user_id = f"user-{who[number]:07d}"
        event = Click(
            event_id=f"{seed:04d}-{first_user or 0:07d}-{number:07d}",
            user_id=user_id,
            item_id=f"item-{what[number]:07d}",
            ts_ms=now_ms,
            context={"page": "x" * 28},
        )
        return user_id, encode(event)

    return [click(number) for number in range(count)]


def items(count: int) -> list[Item]:
    return [Item(item_id=f"item-{number:07d}", title=f"Item {number}") for number in range(count)]


def clustered(count: int, dim: int, seed: int = 0) -> Floats:
    """Unit rows (count, dim) around count / 50 centres: texts of one shelf are like one another."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(max(2, count // 50), dim))
    return unit((centres[draw.integers(len(centres), size=count)] + draw.normal(size=(count, dim))).astype(np.float32))


def made_up_model(num_items: int, config: ModelConfig, events: int) -> Model:
    """A model of `items(num_items)`, trained on made-up events: real shapes and costs, no quality."""
    learner = Learner(config)
    learner.add_items([item.item_id for item in items(num_items)], clustered(num_items, config.text_dim))
    draw = np.random.default_rng(1)
    rows = (draw.zipf(1.2, size=events) - 1) % num_items
    learner.learn(
        Events(
            draw.integers(max(1, events // 20), size=events).tolist(),
            [f"item-{row:07d}" for row in rows],
            np.ones(events, np.float32),
            1_700_000_000_000 + 1000 * np.arange(events),
        )
    )
    return learner.model()


def generation(folder: Path, model: ModelLike) -> Artifact:
    """Built under `folder`, as the indexer announces it."""
    progress = seldom(lambda done, of: tell(f"graph: {done:,} of {of:,} items"), 10.0)
    build_generation(folder, model, version=folder.name, encoder="bench", offsets={}, progress=progress)
    digest = manifest_sha256(folder)
    return Artifact(name=folder.name, url=str(folder), manifest_sha256=digest, created_ms=0, encoder="bench")


def trained(events: int) -> tuple[Model, Dataset]:
    """The product's model after so many MovieLens events; texts are sums of random genre vectors, not encoded."""
    dataset = load_dataset("ml-100k")
    learner = untrained(dataset)
    learner.learn(events_of(dataset.events[:events], lambda _: 1.0))
    return learner.model(), dataset


def untrained(dataset: Dataset) -> Learner:
    """A learner that knows the dataset's items."""
    config, draw = ModelConfig(), np.random.default_rng(0)
    names = sorted({genre for item in dataset.items for genre in item.categories})
    genres = dict(zip(names, draw.normal(size=(len(names), config.text_dim)), strict=True))
    text = 0.3 * draw.normal(size=(len(dataset.items), config.text_dim))
    for row, item in zip(text, dataset.items, strict=True):
        row += sum(genres[genre] for genre in item.categories)
    learner = Learner(config)
    learner.add_items([item.item_id for item in dataset.items], unit(text.astype(np.float32)))
    return learner


class Grown:
    """A trained model whose catalogue has grown to `count` items, each a mixture of two of its own: what
    `build_generation` takes. To the tower a grown item is the first of its two.
    """

    def __init__(self, model: Model, count: int) -> None:
        self._model, draw = model, np.random.default_rng(0)
        own = model.item_vectors()
        self._first, other = draw.integers(len(own), size=(2, count))
        share = 0.3 * draw.random((count, 1), np.float32)
        self._vectors: Floats = own[self._first] + share * (own[other] - own[self._first])  # (count, D)
        self._vectors += 0.02 * own.std() * draw.standard_normal(self._vectors.shape, np.float32)
        self.ids = [f"item-{row:07d}" for row in range(count)]

    def item_vectors(self) -> Floats:
        return self._vectors

    def user_vectors(self, histories: Sequence[History], now_ms: Sequence[int]) -> Floats:
        own = [History(self._first[past.rows], past.weights, past.ts_ms) for past in histories]
        return self._model.user_vectors(own, now_ms)

    def save(self, folder: Path) -> None:
        """Grown as well: of each item the rows of the first of its two."""
        model, rows = self._model, torch.from_numpy(self._first)
        grown = {name: model.arrays[name][rows] for name in PER_ITEM}
        Model(model.config, self.ids, model.arrays | grown, model.tower).save(folder)


def users_of(model: Model, dataset: Dataset, count: int) -> Floats:
    """(count, D) vectors of recorded users, each somewhere on their way."""
    draw, past = np.random.default_rng(0), dict[str, list[Click]]()
    for click in dataset.events:
        past.setdefault(click.user_id, []).append(click)
    row = {item_id: number for number, item_id in enumerate(model.ids)}
    histories = []
    for user_id in draw.choice(sorted(past), count):
        clicks = past[user_id][: draw.integers(1, len(past[user_id]) + 1)][-model.config.history :]
        stamps = np.array([click.ts_ms for click in clicks], np.int64)
        rows = np.array([row[click.item_id] for click in clicks], np.int64)
        histories.append(History(rows, np.ones(len(rows), np.float32), stamps))
    newest = [int(history.ts_ms[-1]) for history in histories]
    return model.user_vectors(histories, newest)
