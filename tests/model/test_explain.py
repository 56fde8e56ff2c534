"""Shares recomputed click by click, and the parts of a score that add up to it."""

import numpy as np
import pytest

from model.config import PARTS, ModelConfig
from model.explain import Contributions, contributions, reasons
from model.learner import Learner
from model.mix import situation
from model.model import Model
from model.sampling import Events, History, pad

NUM_ITEMS, NOW_MS = 40, 2_000_000


@pytest.fixture(scope="module")
def model() -> Model:
    draw = np.random.default_rng(0)
    learner = Learner(
        ModelConfig(text_dim=16, tower_dim=8, covisitation_rank=6, projected_text_dim=7, hidden=16, warmup_steps=0)
    )
    learner.add_items([f"i{at}" for at in range(NUM_ITEMS)], draw.normal(size=(NUM_ITEMS, 16)).astype(np.float32))
    items = [f"i{at}" for at in draw.integers(0, NUM_ITEMS, 600)]
    users = [f"u{at}" for at in draw.integers(0, 20, 600)]
    learner.learn(Events(users, items, np.ones(600, np.float32), np.arange(600) * 1000))
    return learner.model()


def history(rows: list[int], weights: list[float]) -> History:
    stamps = 1_000_000 + np.arange(len(rows), dtype=np.int64)
    return History(np.array(rows, np.int64), np.array(weights, np.float32), stamps)


HISTORIES = [history([3, 7, 3, 9], [1.0, 2.0, 0.5, -1.0]), history([], []), history([5] * 60 + [6], [1.0] * 61)]
ITEMS = np.array([[1, 2, 11], [1, 2, 11], [4, 5, 6]])


def test_contributions_are_the_linear_parts_click_by_click(model: Model) -> None:
    clicked, amounts = contributions(model, HISTORIES, [NOW_MS] * 3, ITEMS)
    arrays = {name: array.numpy().astype(np.float64) for name, array in model.arrays.items()}
    for user, past in enumerate(HISTORIES):
        rows, weights = past.rows[-50:], past.weights[-50:].astype(np.float64)
        mix = arrays["mix"][situation(pad([past], 50), np.array([NOW_MS]))[0]]
        expected = np.zeros((3, len(rows)))
        for part, left, right in (("covisitation", "covisitation.left", "covisitation.right"),
                                  ("text", "text.items", "text.items")):  # fmt: skip
            steps = [w * np.exp(-(len(rows) - 1 - t) / 5) * arrays[left][row] for t, (row, w) in
                     enumerate(zip(rows, weights, strict=True))]  # fmt: skip
            taste = np.sum([step for step, w in zip(steps, weights, strict=True) if w > 0], axis=0)
            taste = taste / max(np.linalg.norm(taste), 1e-12)
            # A dislike takes away only what it does not share with the taste.
            steps = [s - min(0.0, s @ taste) * taste if w < 0 else s for s, w in zip(steps, weights, strict=True)]
            for m, item in enumerate(ITEMS[user]):
                for t, step in enumerate(steps):
                    length = np.linalg.norm(np.sum(steps, axis=0))
                    expected[m, t] += mix[PARTS.index(part)] * (step @ arrays[right][item]) / length
        found = amounts[user][:, clicked[user] >= 0]
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_with_the_rest_they_are_the_score(model: Model) -> None:
    """The rest, from the vectors: tower, bias and what is the same for everyone."""
    users, vectors, d = model.user_vectors(HISTORIES, [NOW_MS] * 3), model.item_vectors(), model.config.tower_dim
    _, amounts = contributions(model, HISTORIES, [NOW_MS] * 3, ITEMS)
    for user in range(3):
        ours = [*range(d + 1), *range(model.dim - (len(PARTS) - 3), model.dim)]
        rest = vectors[ITEMS[user]][:, ours] @ users[user][ours]
        np.testing.assert_allclose(amounts[user].sum(axis=1) + rest, vectors[ITEMS[user]] @ users[user], atol=1e-4)


def test_shares_are_of_what_speaks_for_the_item() -> None:
    rows = np.array([[-1, 3, 7, 3, 9]])
    amounts = np.array([[[0.0, 1.0, 3.0, 2.0, -4.0], [0.0, -1.0, 0.0, 0.5, -2.0]]], np.float32)
    found = reasons(Contributions(rows, amounts), np.array([[5.0, 9.0]]), 2)
    assert found.rows.tolist() == [[[3, 7], [-1, -1]]]  # two clicks on 3: 1 + 2; 7: 3; 9 speaks against it
    assert found.shares.tolist() == [[[0.5, 0.5], [0.0, 0.0]]]
    assert found.explained[0].tolist() == pytest.approx([6 / (6 + 3), 0.0])  # 5 = 6 - 4 by clicks + 3 by the rest
    none = reasons(Contributions(np.array([[-1]]), np.zeros((1, 1, 1), np.float32)), np.array([[1.0]]), 3)
    assert none.rows.tolist() == [[[-1]]] and none.explained.tolist() == [[0.0]]
