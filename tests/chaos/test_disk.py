"""Scenario 14: the artifact store's disk is full, then read-only. Its short form, a store that cannot be written, is in
tests/workers/test_service.py: no permission stops root, and a small file system takes root to mount."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from stream.broker import LocalBroker
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
        served = service.metric("upwell_swaps_total{served}")
        answers = send_until(service, "full", lambda: service.log("trainer").count("No space left") >= 3)
        assert service.metric("upwell_swaps_total{served}") <= served + 1  # one was on its way
        ballast.unlink()
        answers += send_until(service, "free", lambda: service.metric("upwell_swaps_total{served}") > served + 1)
        remount = ["mount", "-o", "remount,ro", str(small_disk)]
        until(lambda: subprocess.run(remount).returncode == 0, "nothing is being written")
        answers += send_until(service, "read-only", lambda: service.log("trainer").count("Read-only file system") >= 3)
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
        served = service.metric("upwell_swaps_total{served}")
        answers += send_until(service, "writable", lambda: service.metric("upwell_swaps_total{served}") > served)
        print(json.dumps({"refusals": service.log("trainer").count("No space left"), "answers": answers}))
        assert service.roles.restarts == 0


def send_until(service: Service, name: str, true: Callable[[], bool]) -> int:
    """Clicks flow and lists are asked for, each answered in full."""
    answered = rounds = 0

    def more() -> bool:
        nonlocal answered, rounds
        sent = clicks(200, first=1000 * rounds)
        service.send([msgspec.structs.replace(click, event_id=f"{name}-{click.event_id}") for click in sent])
        for user in range(20):
            status, answer = service.call(f"/v1/users/u{user}/recommendations")
            assert (status, len(answer["items"])) == (200, 20)
            answered += 1
        rounds += 1
        return true()

    until(more, f"while the disk is {name}", 300)  # a round grows with its clicks
    return answered
