"""The chaos scenarios: short forms in `make test`, long ones by `make chaos`."""

from pathlib import Path

import numpy as np
import pytest

from model.config import ModelConfig
from model.generation import build_generation
from model.learner import Learner
from stream.events import Artifact
from tests.records import announced
from tests.workers.service import ITEMS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="long form, as make chaos runs it")


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--long", default=False))


@pytest.fixture(scope="session")
def generation(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A small generation of the test catalogue, so that the workers search and send lists as they do in production."""
    learner = Learner(ModelConfig(text_dim=16, tower_dim=8, covisitation_rank=8, projected_text_dim=8, hidden=16))
    text = np.random.default_rng(0).normal(size=(len(ITEMS), 16)).astype(np.float32)
    learner.add_items([item.item_id for item in ITEMS], text)
    folder = Path(tmp_path_factory.mktemp("generations")) / "g1"
    build_generation(folder, learner.model(), version="g1", encoder="e", offsets={})
    return announced(folder)
