import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from model.copies import Copies


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_expanded_answers_name_every_copy(values: list[int], num_queries: int, seed: int) -> None:
    """Against a loop: each group's rows in order, group after group, cut to the width of the answer."""
    vectors = np.repeat(np.array(values, np.float32)[:, None], 3, axis=1)
    copies = Copies(vectors)
    distinct = list(dict.fromkeys(values))
    assert copies.first.tolist() == [values.index(value) for value in distinct]
    generator = np.random.default_rng(seed)
    groups = np.stack([generator.permutation(len(distinct)) for _ in range(num_queries)])
    for found, order in zip(copies.expand(groups).tolist(), groups, strict=True):
        expected = [row for group in order for row, value in enumerate(values) if value == distinct[group]]
        assert found == expected[: len(found)] and len(found) == len(distinct)
