"""Words as a query: what is nearest by text comes first, whatever is popular."""

import numpy as np

from tests.model.test_gate import learner


def test_the_nearest_text_comes_first() -> None:
    rng, model = np.random.default_rng(0), learner().model()
    mean, directions = (model.arrays[name].numpy() for name in ("text.mean", "text.projection"))  # (E,), (E, P)
    text = (mean + rng.normal(size=(50, directions.shape[1])) @ directions.T).astype(np.float32)  # (50, E)
    vectors = model.extended([f"new{n}" for n in range(50)], text).item_vectors()[len(model.ids) :]
    queries = np.concatenate([model.text_query(one) for one in text])  # (50, D)
    assert (vectors @ queries.T).argmax(axis=0).tolist() == list(range(50))
    vectors[:, -5:] += rng.normal(size=(50, 5)).astype(np.float32)  # popularity
    assert (vectors @ queries.T).argmax(axis=0).tolist() == list(range(50))
