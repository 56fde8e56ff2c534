"""Words as a query: what is nearest by text comes first, whatever is popular."""

import numpy as np

from model.encoder import unit
from model.told import text_query
from tests.model.test_gate import good


def test_the_nearest_text_comes_first() -> None:
    rng = np.random.default_rng(0)
    model = good()
    text = unit(rng.normal(size=(50, model.config.text_dim)).astype(np.float32))
    grown = model.extended([f"new{n}" for n in range(50)], text)
    vectors = grown.item_vectors()
    first = len(model.ids)
    found = [int(np.argmax(vectors[first:] @ text_query(grown, one)[0])) for one in text]
    assert found == list(range(50))
    popular = vectors.copy()
    popular[:, -5:] += rng.normal(size=(len(vectors), 5)).astype(np.float32)
    assert np.allclose(popular @ text_query(grown, text[0])[0], vectors @ text_query(grown, text[0])[0], atol=1e-5)
