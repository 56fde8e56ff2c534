"""What becomes of a candidate, on a real Kafka."""

import threading
from pathlib import Path

import numpy as np
import pytest

from model.config import ModelConfig
from model.gate import Verdict
from model.learner import Learner
from stream.broker import LocalBroker
from stream.consumer import end_offsets
from stream.topics import Topics
from tests.workers.service import upwell
from workers.announcements import newest_model
from workers.settings import Kafka, Settings
from workers.trainer import Trainer


def test_a_refused_candidate_is_kept_and_named_and_not_announced(
    broker: LocalBroker, topics: Topics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka = Kafka(bootstrap=broker.bootstrap, prefix=topics.prefix, partitions=3)
    settings = Settings(kafka=kafka, artifacts=str(tmp_path))
    learner = Learner(ModelConfig(text_dim=4, projected_text_dim=4))
    learner.add_items(["a", "b"], np.eye(2, 4, dtype=np.float32))
    trainer = Trainer(settings, threading.Event())
    trainer._conclude(learner.model(), Verdict(False, "because"), {0: 7})
    (kept,) = (tmp_path / "refused").glob("*/weights.safetensors")
    monkeypatch.setenv("UPWELL_ARTIFACTS", str(tmp_path))
    assert upwell("generations", "refused").stdout == f"{kept.parent.name}  because\n"
    assert end_offsets(settings.connection, topics.models.name) == {0: 0}
    trainer._conclude(learner.model(), Verdict(True, "better"), {0: 7})
    announced = newest_model(settings)
    assert announced is not None and announced.offsets == {0: 7}
    assert (tmp_path / "models" / announced.name / "weights.safetensors").exists()
