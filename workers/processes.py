"""Ending a role in order."""

import signal
import threading


def stop_on_signal() -> threading.Event:
    """An event that SIGINT or SIGTERM sets; to be called by the main thread."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop
