"""A worker that its consumer group does not take in ends itself; one that is in it without a partition does not."""

import time
from pathlib import Path

from stream.connection import Connection
from stream.events import Artifact
from tests.chaos.harness import Fleet, until
from tests.chaos.worker import join_in_time, never_join
from workers.processes import EX_SOFTWARE


def test_one_that_never_joins_ends_itself(connection: Connection, generation: Artifact, tmp_path: Path) -> None:
    with Fleet(connection, tmp_path, generation, fault=never_join) as fleet:
        fleet.start("a")
        until(lambda: fleet.exits == [("a", EX_SOFTWARE)], "it ends")
        assert "the consumer group has not taken this worker in" in fleet.log("a")


def test_one_too_many_waits_for_its_turn(connection: Connection, generation: Artifact, tmp_path: Path) -> None:
    with Fleet(connection, tmp_path, generation, partitions=1, fault=join_in_time) as fleet:
        fleet.start("a")
        fleet.start("b")
        fleet.await_ready()
        time.sleep(12)
        assert not fleet.exits
