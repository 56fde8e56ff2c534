"""Drift: about nothing between two samples of one stream, the shift between two of different ones."""

import numpy as np
import pytest

from model.drift import drift


@pytest.mark.parametrize("size", [20, 400])
def test_two_samples_of_one_stream_have_not_drifted(size: int) -> None:
    rng = np.random.default_rng(0)
    found = [drift(rng.normal(size=(5000, 64)), rng.normal(size=(size, 64))) for _ in range(20)]
    assert np.mean(found) < 0.1  # the plain distance of the means, 1 / sqrt(size), would be .22 for 20


def test_drift_is_the_shift_in_standard_deviations() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=(5000, 16)), rng.normal(size=(2000, 16))
    after[:, 0] += 2.0
    assert drift(before, after) == pytest.approx(2 / np.sqrt(16), abs=0.03)


def test_drift_is_the_same_either_way() -> None:
    rng = np.random.default_rng(0)
    wide, narrow = 3 * rng.normal(size=(500, 8)), rng.normal(size=(500, 8)) + 1
    assert drift(wide, narrow) == pytest.approx(drift(narrow, wide))


def test_of_too_little_nothing_is_said() -> None:
    assert np.isnan(drift(np.zeros((0, 4)), np.ones((5, 4))))
    assert np.isnan(drift(np.ones((5, 4)), np.ones((5, 4))))
