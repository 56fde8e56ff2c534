"""What a library writes without end is bounded, and what was left out is counted."""

import logging

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
