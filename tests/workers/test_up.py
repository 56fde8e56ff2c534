"""The demo's processes end with it: on a signal in order, on kill -9 of the parent all the same."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEADLINE_S = 120.0


def running_under(folder: Path) -> dict[int, str]:
    """Processes that were started for this demo: their working folder is its own."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder:
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


@contextmanager
def running_demo(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The demo; whatever a test finds, nothing of it outlives the test."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UPWELL_")}
    with subprocess.Popen(
        [sys.executable, "-m", "workers.cli", "demo", "--port", "0", "--rate", "50", *options],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT), "UPWELL_CACHE": str(ROOT / ".cache" / "upwell")},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as demo:
        try:
            yield demo
        finally:
            demo.kill()
            for left in running_under(folder):
                with suppress(ProcessLookupError):
                    os.kill(left, signal.SIGKILL)


def wait_until_gone(folder: Path) -> dict[int, str]:
    deadline = time.monotonic() + DEADLINE_S
    while (left := running_under(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_nothing_is_left_behind(tmp_path: Path, number: signal.Signals) -> None:
    wanted = ("kafka.Kafka", "cli worker", "cli trainer", "cli indexer", "cli serve", "workers.search")
    deadline = time.monotonic() + DEADLINE_S
    with running_demo(tmp_path) as demo:
        while not all(any(name in line for line in running_under(tmp_path).values()) for name in wanted):
            assert demo.poll() is None, f"ended with {demo.returncode}"
            assert time.monotonic() < deadline, running_under(tmp_path)
            time.sleep(0.2)
        demo.send_signal(number)
        code = demo.wait(DEADLINE_S)
        assert wait_until_gone(tmp_path) == {}
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)


def test_a_check_that_does_not_hold_fails_and_still_prints_its_summary(tmp_path: Path) -> None:
    """40 events see no two swaps: the exit code says so, and the last line is the summary."""
    with running_demo(tmp_path, "--check", "--events", "40") as demo:
        out, _ = demo.communicate(timeout=150)
        assert demo.returncode == 1
        assert wait_until_gone(tmp_path) == {}
    summary = json.loads(out.splitlines()[-1])
    assert (summary["events"], summary["applied"], summary["state_identical"]) == (40, 40, True)
    assert set(summary) == {
        "events", "applied", "dead_letters", "generations", "swaps", "failed_requests", "empty_requests", "hr10",
        "hr10_popularity", "click_to_recommendation_ms", "state_identical", "broker", "seconds",
    }  # fmt: skip
