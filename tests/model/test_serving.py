"""Serving's numpy says what the learner's torch says, of histories long, empty, with dislikes, from the future."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import PARTS, PERSONAL
from model.mix import situation
from model.model import Model
from model.sampling import History, pad
from tests.model.test_explain import NUM_ITEMS, model

__all__ = ["model"]  # the fixture

NOW_MS = 1_000_000_000
EVENT = st.tuples(
    st.integers(0, NUM_ITEMS - 1), st.sampled_from([1.0, 0.5, 3.0, -1.0, 0.0]), st.integers(0, NOW_MS + 90_000)
)
HISTORIES = st.lists(st.lists(EVENT, max_size=60), min_size=1, max_size=6)


def by_torch(model: Model, histories: list[History], now_ms: list[int]) -> np.ndarray:
    """The formula of `Model.user_vectors` where the model lies on a GPU."""
    history, at = pad(histories, model.config.history), np.array(now_ms)
    with torch.inference_mode():
        parts, mix = model.user_parts(history, at), model.arrays["mix"][torch.from_numpy(situation(history, at))]
        columns = [parts[name] * mix[:, at : at + 1] for at, name in enumerate(PARTS[:PERSONAL])]
        return torch.cat([*columns, mix[:, PERSONAL:]], dim=1).numpy()


@settings(deadline=None, max_examples=200)
@given(HISTORIES)
def test_numpy_says_what_torch_says(model: Model, drawn: list[list[tuple[int, float, int]]]) -> None:
    histories = [
        History(
            np.array([row for row, _, _ in events], np.int64),
            np.array([weight for _, weight, _ in events], np.float32),
            np.array(sorted(ts for _, _, ts in events), np.int64),
        )
        for events in drawn
    ]
    now_ms = [NOW_MS + 1000 * at for at in range(len(histories))]
    found = model.user_vectors(histories, now_ms)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_torch(model, histories, now_ms), rtol=1e-4, atol=2e-5)


def test_a_model_without_items_answers(model: Model) -> None:
    empty = {name: array[:0] if len(array) == NUM_ITEMS else array for name, array in model.arrays.items()}
    nobody = Model(model.config, [], empty, model.tower)
    stranger = [History.of()], [NOW_MS]
    np.testing.assert_allclose(nobody.user_vectors(*stranger), by_torch(nobody, *stranger), atol=2e-5)
