"""What an event says about taste, from its type and value to the list: a dislike lowers its item's neighbours."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.learner import Learner
from model.model import Model
from model.sampling import Events, History
from model.user_state import EMPTY, Applied, Entry, Limits, apply_clicks
from stream.events import Click, EventType
from workers.settings import DEFAULT_VALUES, DEFAULT_WEIGHTS, ConfigError, Settings, load_settings

SHELVES, EACH, E = 8, 15, 16
ITEMS = [f"i{row}" for row in range(SHELVES * EACH)]


def click(event_type: EventType, value: float | None = None, row: int = 0, number: int = 0) -> Click:
    stamp = 1000 * (1 + number)
    return Click(
        event_id=f"e{number}", user_id="u", item_id=ITEMS[row], event_type=event_type, ts_ms=stamp, value=value
    )


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        ("play", None, 1.0),
        ("play", 1.0, 1.0),
        ("play", 0.25, 0.25),
        ("play", 240.0, 2.0),  # seconds sent as a share: bounded
        ("rate", None, 1.0),
        ("rate", 1.0, -1.0),
        ("rate", 3.0, 0.0),
        ("rate", 5.0, 1.0),
        ("rate", -1e300, -1.0),
        ("dislike", 3.0, -1.5),  # no scale: the value is not looked at
        ("return", 2.0, -4.0),
    ],
)
def test_a_value_scales_its_types_weight(kind: EventType, value: float | None, expected: float) -> None:
    settings = Settings(event_values={"rate": (3.0, 5.0), "return": (0.0, 1.0)})
    assert settings.weight(click(kind, value)) == expected


def test_by_default_stars_and_quantities_are_not_looked_at() -> None:
    for kind, weight in DEFAULT_WEIGHTS.items():
        assert Settings().weight(click(kind, 4.0)) == weight * (2.0 if kind in DEFAULT_VALUES else 1.0)


def test_scales_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPWELL_EVENT_VALUES__RATE", "[2.5, 5]")
    assert load_settings().weight(click("rate", 2.5)) == 0.0
    assert load_settings().weight(click("play", value=0.5)) == 0.5
    monkeypatch.setenv("UPWELL_EVENT_VALUES__RATE", "[5, 5]")
    with pytest.raises(ConfigError, match="event_values"):
        load_settings()
    monkeypatch.setenv("UPWELL_EVENT_VALUES__RATE", "[2.5, 5]")
    monkeypatch.setenv("UPWELL_EVENT_VALUES__STARE", "[0, 1]")
    with pytest.raises(ConfigError, match=r"event_values\.stare "):
        load_settings()


@pytest.fixture(scope="module")
def model() -> Model:
    """Learned from users who keep to two shelves each, whose items read alike."""
    random = np.random.default_rng(0)
    shelf = np.repeat(np.eye(SHELVES, E), EACH, axis=0) + 0.2 * random.normal(size=(len(ITEMS), E))
    learner = Learner(ModelConfig(text_dim=E, projected_text_dim=E, tower_dim=16, covisitation_rank=16, replay=8))
    learner.add_items(ITEMS, (shelf / np.linalg.norm(shelf, axis=1, keepdims=True)).astype(np.float32))
    users = random.integers(0, 200, 3000)
    rows = (users + random.integers(0, 2, 3000)) % SHELVES * EACH + random.integers(0, EACH, 3000)
    learner.learn(Events(users.tolist(), [ITEMS[r] for r in rows], np.ones(3000, np.float32), np.arange(3000) * 60_000))
    return learner.model()


def scores(model: Model, clicks: Sequence[Click]) -> np.ndarray:
    """(N,) the whole vector's, for the state that these clicks fold into."""
    weighed = [Applied(c, Settings().weight(c), offset) for offset, c in enumerate(clicks)]
    entries: tuple[Entry, ...] = apply_clicks(EMPTY, weighed, Limits()).history
    rows = np.array([ITEMS.index(entry.item_id) for entry in entries], np.int64)
    weights = np.array([entry.weight for entry in entries], np.float32)
    history = History(rows, weights, np.array([entry.ts_ms for entry in entries], np.int64))
    return np.asarray(model.user_vectors([history], [100_000])[0] @ model.item_vectors().T)


def lead(values: np.ndarray, rows: np.ndarray) -> float:
    """How far the rows lie above the mean of all items, in its standard deviations."""
    return float((values[rows].mean() - values.mean()) / values.std())


@pytest.mark.parametrize("part", ["tower.items", "covisitation.right", "text.items"])
def test_a_dislike_lowers_its_items_neighbours(part: str, model: Model) -> None:
    """Neighbours by each part of the vector, for a user of their shelf and others: they lose their lead, more
    than items unlike it; after a click on it they do not."""
    for row in range(0, len(ITEMS), EACH):
        left = model.arrays["covisitation.left" if part.startswith("covisitation") else part][row]
        alike = torch.argsort(-(model.arrays[part] @ left)).numpy()
        near, far = alike[alike != row][:8], alike[-30:]
        visited = [(row + step * EACH // 2) % len(ITEMS) for step in (8, 1, 9, 1, 10)]
        past = [click("click", row=visit, number=number) for number, visit in enumerate(visited)]
        before = scores(model, past)
        disliked = scores(model, [*past, click("dislike", row=row, number=5)])
        clicked = scores(model, [*past, click("click", row=row, number=5)])
        lost = lead(before, near) - lead(disliked, near)
        assert lost > 0.5, row
        assert lost > lead(before, far) - lead(disliked, far) + 0.5, row
        assert lead(clicked, near) > lead(disliked, near) + 1, row


def test_a_dislike_leaves_the_rest_of_the_list_alone(model: Model) -> None:
    """Of the ten first of those unlike the disliked item most stay: what it shares with the user's taste is no news."""
    kept = []
    for row in range(0, len(ITEMS), EACH):
        unlike = np.arange(len(ITEMS)) // EACH != row // EACH
        visited = [(row + step * EACH // 2) % len(ITEMS) for step in (8, 3, 9, 3, 10)]
        past = [click("click", row=visit, number=number) for number, visit in enumerate(visited)]
        before = scores(model, past)
        after = scores(model, [*past, click("dislike", row=row, number=5)])
        first, then = (set(np.argsort(np.where(unlike, -values, np.inf))[:10].tolist()) for values in (before, after))
        kept.append(len(first & then))
    assert np.mean(kept) >= 8, kept
