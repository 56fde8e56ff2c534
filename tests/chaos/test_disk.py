"""Scenario 14: the artifact store's disk is full, then read-only. Its short form, a store that cannot be written, is in
tests/workers/test_service.py: no permission stops root, and a small file system takes root to mount."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from stream.broker import LocalBroker
from stream.events import Click
from tests.workers.service import Service, clicks, running, until

SIZE_KB = 65536


@pytest.fixture
def small_disk(tmp_path: Path, long: bool) -> Iterator[Path]:
    if not long:
        pytest.skip("long form only: mounts a file system")
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_KB}k", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_full_then_read_only(broker: LocalBroker, tmp_path: Path, small_disk: Path) -> None:
    with running(broker, tmp_path, small_disk / "artifacts") as service:
        until(lambda: service.metric("upwell_swaps_total{served}") > 0, "a generation serves")
        until(lambda: service.call("/readyz")[0] == 200, "the server is ready")
        ballast = small_disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as full:
                assert "No space left" in str(full)

        def refused(why: str) -> Callable[[], bool]:
            return lambda: service.log("trainer").count(why) >= 3

        def anew() -> Callable[[], bool]:
            """A model is stored and a generation swapped in that were not yet."""
            stored, served = num_stored(service), service.metric("upwell_swaps_total{served}")
            return lambda: num_stored(service) > stored and service.metric("upwell_swaps_total{served}") > served

        served = service.metric("upwell_swaps_total{served}")
        answers = send_until(service, "full", refused("No space left"))
        assert service.metric("upwell_swaps_total{served}") <= served + 1  # one was on its way
        ballast.unlink()
        answers += send_until(service, "free", anew())
        remount = ["mount", "-o", "remount,ro", str(small_disk)]
        until(lambda: subprocess.run(remount).returncode == 0, "nothing is being written")
        answers += send_until(service, "read-only", refused("Read-only file system"))
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        answers += send_until(service, "writable", anew())
        print(json.dumps({"refusals": service.log("trainer").count("No space left"), "answers": answers}))
        assert service.roles.restarts == 0


def num_stored(service: Service) -> int:
    return service.log("trainer").count('"accepted": true, "reason": "better')


# Of the walk through a shelf: another in each phase, so that there is something to learn.
STRIDES = {"full": 1, "free": 3, "read-only": 7, "writable": 9}


def send_until(service: Service, name: str, true: Callable[[], bool]) -> int:
    """Clicks of new users flow: what the same ones click again is no evidence at the gate. Their lists are full."""
    answered = rounds = 0

    def walked(click: Click) -> Click:
        shelf, place = divmod(int(click.item_id[1:]), 20)
        return msgspec.structs.replace(click, item_id=f"i{20 * shelf + place * STRIDES[name] % 20}")

    def more() -> bool:
        nonlocal answered, rounds
        service.send([walked(click) for click in clicks(200, name=f"{name}-{rounds}-")])
        for user in range(20):
            status, answer = service.call(f"/v1/users/{name}-{rounds}-u{user}/recommendations")
            assert (status, len(answer["items"])) == (200, 20)
            answered += 1
        rounds += 1
        time.sleep(1)  # a round of the trainer grows with its clicks
        return true()

    until(more, f"while the disk is {name}", 300)
    return answered
