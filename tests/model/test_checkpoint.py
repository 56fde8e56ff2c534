from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec import register_implementation
from fsspec.implementations.memory import MemoryFileSystem

from model.checkpoint import fetch_model, prune_models, publish_model, verdicts
from model.config import ModelConfig
from model.generation import build_generation, fetch, prune, publish
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


class EndpointConnectionError(Exception):
    """As botocore's: no OSError."""


class Away(MemoryFileSystem):  # type: ignore[misc]
    """A store out of reach, whose errors are its own."""

    protocol = "away"

    def _away(self, *_: Any, **__: Any) -> Any:
        raise EndpointConnectionError("no endpoint answers")

    ls = info = exists = isdir = find = makedirs = cat_file = get_file = put_file = pipe_file = rm = rm_file = _away


def test_a_store_s_own_errors_are_told_as_out_of_reach(tmp_path: Path) -> None:
    """The roles that meet them try again; another exception ends the process, and each of its successors."""
    register_implementation("away", Away, clobber=True)
    learner = Learner(ModelConfig(text_dim=4, projected_text_dim=4, tower_dim=4, covisitation_rank=4))
    learner.add_items([f"i{row}" for row in range(40)], np.random.default_rng(0).normal(size=(40, 4)).astype("f4"))
    build_generation(tmp_path / "g1", learner.model(), version="g1", encoder="e", offsets={})
    calls: list[Callable[[], object]] = [
        lambda: publish(tmp_path / "g1", "away://store"),
        lambda: fetch("away://store/g1", tmp_path / "cache", "0" * 64),
        lambda: prune("away://store", 1),
        lambda: publish_model(learner.model(), "away://store/m1", ""),
        lambda: fetch_model("away://store/m1", "0" * 64),
        lambda: prune_models("away://store", 1),
        lambda: verdicts("away://store"),
    ]
    for call in calls:
        with pytest.raises(OSError, match="EndpointConnectionError: no endpoint answers"):
            call()
