"""docs/tutorial.md, done: its Python blocks, one after the other, against the running service."""

import time
from pathlib import Path
from typing import Any

import pytest

from stream.answers import Answer
from stream.client import Client
from tests.test_docs import blocks
from tests.workers.service import Service

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
URL = "http://127.0.0.1:8080"
PATIENCE_S = 60.0


def test_the_tutorial_does_what_it_says(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    once = Client.recommendations

    def patient(*arguments: Any, **asked: Any) -> Answer:
        """Asks again while it is stale: a busy machine takes longer than serve.wait_s."""
        deadline = time.monotonic() + PATIENCE_S
        while (answer := once(*arguments, **asked)).stale and time.monotonic() < deadline:
            time.sleep(0.1)
        return answer

    monkeypatch.setattr(Client, "recommendations", patient)
    steps = blocks(TUTORIAL.read_text(), "python")
    assert URL in steps[0]
    done: dict[str, Any] = {}
    for step in steps:
        exec(compile(step.replace(URL, service.url), str(TUTORIAL), "exec"), done)
    assert done["receipt"].accepted == 5 and not done["receipt"].rejected
    answer = done["answer"]
    assert answer.source == "personal" and not answer.stale
    shown = [place.item_id for place in answer.items]
    assert len(shown) == 3 and not {"b1", "b3"} & set(shown)  # Anna's own do not come back
    assert {reason.item_id for place in answer.items for reason in place.because} <= {"b1", "b3"}
    assert len(done["before"]) == len(done["after"]) == 3 and done["before"][0] not in done["after"]
    assert service.call("/v1/users/anna")[0] == 404
