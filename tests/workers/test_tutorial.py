"""docs/tutorial.md, done: its Python blocks, one after the other, against the running service.

After test_service.py by its name: that one counts all clicks which the shared service has seen.
"""

from pathlib import Path
from typing import Any

from tests.test_docs import blocks
from tests.workers.service import Service

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
URL = "http://127.0.0.1:8080"


def test_the_tutorial_does_what_it_says(service: Service) -> None:
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
    assert "b2" not in done["after"] and done["before"] != done["after"]
    assert service.call("/v1/users/anna")[0] == 404
