"""Bad candidates at the gate, on parts of MovieLens-100k: five ways to be bad, four times each.

The learner takes a window of the stream, whole or spoiled, as the trainer gives it; the gate judges on the slice after
the window. Each seed has its own part of the stream, its own serving model, and one good candidate.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import prune_models, publish_model, verdicts
from model.config import ModelConfig
from model.gate import Verdict, hold_out, judge
from model.learner import Learner
from model.model import Model
from model.sampling import Events
from stream.datasets import load_dataset

E = 64
CONFIG = ModelConfig(text_dim=E, replay=8, warmup_steps=100)  # a third of the default's cost
FIRST, WINDOW, SLICE, SEEDS, APART = 1500, 2000, 1000, 4, 20_000
Click = tuple[str, str, int]  # user, item, stamp


def events(clicks: list[Click]) -> Events:
    users, items, stamps = zip(*clicks, strict=True)
    return Events(users, items, np.ones(len(clicks), np.float32), np.array(stamps, np.int64))


def words(text: str) -> np.ndarray:
    """(E,) the sum of a random direction for each word: an encoder that needs no weights."""
    seeds = (int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little") for word in text.lower().split())
    total = np.sum([np.random.default_rng(seed).normal(size=E) for seed in seeds], axis=0)
    return np.asarray(total / np.linalg.norm(total), np.float32)


@dataclass(frozen=True)
class Round:
    """What one seed's candidates are made of and judged on."""

    seed: int
    learner: Learner  # as it was when it made `serving`
    serving: Model
    past: list[Click]
    window: list[Click]
    slice: list[Click]

    def judged(self, learner: Learner, candidate: Model, newest: list[Click]) -> Verdict:
        return judge(candidate, self.serving, hold_out(learner, events(newest)), learner.text())

    def after(self, window: list[Click]) -> Learner:
        learner = copy.deepcopy(self.learner)
        learner.learn(events(window))
        return learner


def not_finite(made: Round, good: Learner) -> tuple[Model, Verdict]:
    candidate = good.model()
    name = ("tower.ids", "covisitation.left", "text.items", "mix")[made.seed]
    candidate.arrays[name].view(-1)[made.seed] = float("nan")
    return candidate, made.judged(good, candidate, made.slice)


def random_weights(made: Round, good: Learner) -> tuple[Model, Verdict]:
    """Every array drawn anew with the mean and spread of the trained one."""
    candidate, generator = good.model(), torch.Generator().manual_seed(made.seed)
    for array in (*candidate.arrays.values(), *candidate.tower.state_dict().values()):
        noise = torch.randn(array.shape, generator=generator)
        array.copy_(array.mean() + noise * array.std(correction=0))
    return candidate, made.judged(good, candidate, made.slice)


def shuffled_labels(made: Round, _: Learner) -> tuple[Model, Verdict]:
    """A trainer that gives its users each other's items, from its first click on.

    One window of that upon a sound model is another matter: it still learns what is popular now, and the gate took
    such a one in 1 of 4 rounds, because it did rank the slice better.
    """
    clicks = made.past + made.window
    order = np.random.default_rng(made.seed).permutation(len(clicks))
    learner = Learner(CONFIG, made.seed)
    learner.add_items(made.learner.ids, made.learner.text())
    learner.learn(events([(user, clicks[at][1], ts) for (user, _, ts), at in zip(clicks, order, strict=True)]))
    candidate = learner.model()
    return candidate, made.judged(learner, candidate, made.slice)


def one_user(made: Round, _: Learner) -> tuple[Model, Verdict]:
    """A trainer that resumes from the serving model and reads one user's clicks alone."""
    clicks = made.past + made.window
    user = Counter(user for user, *_ in clicks).most_common(made.seed + 1)[-1][0]
    learner = Learner(made.serving.config, made.seed)
    learner.resume(made.serving, made.learner.text())
    learner.learn(events([click for click in clicks if click[0] == user]))
    candidate = learner.model()
    return candidate, made.judged(learner, candidate, made.slice)


def fake_clicks(made: Round, _: Learner) -> tuple[Model, Verdict]:
    """5 % of the window and of the slice: made-up users, new ones each time or twenty again and again."""
    generator = np.random.default_rng(made.seed)
    item = str(generator.choice(made.learner.ids))

    def with_fakes(clicks: list[Click]) -> Iterator[Click]:
        for click in clicks:
            yield click
            if generator.random() < 0.05 / 0.95:
                yield f"fake {generator.integers(20 if made.seed % 2 else 1 << 40)}", item, click[2]

    learner = made.after(list(with_fakes(made.window)))
    candidate = learner.model()
    return candidate, made.judged(learner, candidate, list(with_fakes(made.slice)))


MAKERS: dict[str, Callable[[Round, Learner], tuple[Model, Verdict]]] = {
    "not finite": not_finite,
    "random weights": random_weights,
    "shuffled labels": shuffled_labels,
    "one user": one_user,
    "fake clicks": fake_clicks,
}


@dataclass(frozen=True)
class Judged:
    good: list[Verdict]
    bad: dict[str, list[tuple[Model, Verdict]]]


@pytest.fixture(scope="module")
def judged() -> Judged:
    dataset = load_dataset("ml-100k")
    stream = [(click.user_id, click.item_id, click.ts_ms) for click in dataset.events]
    ids, text = [item.item_id for item in dataset.items], np.stack([words(item.text) for item in dataset.items])
    good, bad = [], {name: list[tuple[Model, Verdict]]() for name in MAKERS}
    for seed in range(SEEDS):
        first, window, newest = np.cumsum([seed * APART + FIRST, WINDOW, SLICE]).tolist()
        past = stream[seed * APART : first]
        learner = Learner(CONFIG, seed)
        learner.add_items(ids, text)
        learner.learn(events(past))
        made = Round(seed, learner, learner.model(), past, stream[first:window], stream[window:newest])
        learner = made.after(made.window)
        good.append(made.judged(learner, learner.model(), made.slice))
        for name, make in MAKERS.items():
            bad[name].append(make(made, learner))
    return Judged(good, bad)


def test_good_ones_pass(judged: Judged) -> None:
    assert [verdict.accepted for verdict in judged.good] == [True] * SEEDS, judged.good


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("not finite", "a weight of the candidate is not finite"),
        ("random weights", "not better in both"),
        ("shuffled labels", "not better in both"),
        ("one user", "not better in both"),
        ("fake clicks", "look made up: "),
    ],
)
def test_bad_ones_are_refused(name: str, reason: str, judged: Judged) -> None:
    found = [verdict for _, verdict in judged.bad[name]]
    assert len(found) == SEEDS
    assert all(not verdict.accepted and reason in verdict.reason for verdict in found), found


def test_every_refusal_is_kept_with_its_reason(judged: Judged, tmp_path: Path) -> None:
    """The reasons of all, the weights of the newest."""
    refusals = [pair for name in MAKERS for pair in judged.bad[name]]
    for number, (candidate, verdict) in enumerate(refusals):
        publish_model(candidate, f"{tmp_path}/m{number:02}", verdict.reason)
        prune_models(str(tmp_path), keep=5)
    assert list(verdicts(str(tmp_path)).values()) == [verdict.reason for _, verdict in refusals]
    assert len(refusals) == 20
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [f"m{n}" for n in range(15, 20)]
