from pathlib import Path

import numpy as np
import pytest

from model.checkpoint import fetch_model, prune_models, publish_model
from model.config import ModelConfig
from model.learner import Learner
from model.manifest import DamagedGeneration


def test_a_model_of_another_digest_is_refused(tmp_path: Path) -> None:
    """Whole as it is: the announcement says which one."""
    learner = Learner(ModelConfig(text_dim=4))
    learner.add_items(["a"], np.ones((1, 4), np.float32))
    first = publish_model(learner.model(), f"{tmp_path}/a", "")
    learner.add_items(["b"], np.ones((1, 4), np.float32))
    second = publish_model(learner.model(), f"{tmp_path}/b", "")
    assert fetch_model(f"{tmp_path}/a", first).ids == ["a"]
    with pytest.raises(DamagedGeneration, match="digest"):
        fetch_model(f"{tmp_path}/a", second)


def test_a_model_just_written_is_kept_though_the_clock_was_set_back(tmp_path: Path) -> None:
    for name in ("m1", "m4", "m5", "m6"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.txt").touch()
    prune_models(str(tmp_path), keep=2, newest="m1")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["m1", "m6"]
