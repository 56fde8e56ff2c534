"""What a library writes without end is bounded, and what was left out is counted."""

import json
import logging
import subprocess
import sys

import pytest

from workers import logs


def test_a_flood_is_bounded_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("workers.logs.time.monotonic", lambda: now)
    bounded = logs.Bounded()

    def record(line: int) -> logging.LogRecord:
        return logging.LogRecord("kafka", logging.ERROR, "kafka/net.py", line, "no broker at %s", ("here",), None)

    assert sum(bounded.filter(record(1)) for _ in range(5000)) == logs.BURST
    assert bounded.filter(record(2))  # another place is not silenced
    now = logs.WINDOW_S + 1
    first = record(1)
    assert bounded.filter(first)
    assert first.getMessage() == f"no broker at here (and {5000 - logs.BURST} more like it in 61 s)"
    again = record(1)
    assert bounded.filter(again) and again.getMessage() == "no broker at here"


@pytest.mark.parametrize(("role", "said"), [("lag", False), ("worker", True)])
def test_a_command_leaves_the_last_word_to_itself(role: str, said: bool) -> None:
    script = """if True:
        import sys
        from contextlib import suppress
        import kafka
        from workers.command import settings_for
        settings_for(sys.argv[1], reach_kafka=False)
        with suppress(kafka.errors.KafkaError):
            kafka.KafkaAdminClient(bootstrap_servers="127.0.0.1:9", bootstrap_timeout_ms=300)
    """
    done = subprocess.run([sys.executable, "-c", script, role], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ("ERROR kafka" in done.stderr) is said


def test_a_line_of_a_thread_has_its_role() -> None:
    script = """if True:
        from threading import Thread
        import structlog
        from workers.logs import configure
        configure("INFO", "worker")
        Thread(target=structlog.get_logger().info, args=["said"]).start()
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stderr)["role"] == "worker"
