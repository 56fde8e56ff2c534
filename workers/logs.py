"""Structured logs: one JSON object a line on stderr. ERROR means a bug or a stop, never a bad input."""

import logging
import sys
import threading
import time

import structlog
from structlog.typing import Processor

BURST = 20  # lines of one place in a minute; Kafka's clients wrote 110 a second while no broker was there
WINDOW_S = 60.0


class Bounded(logging.Filter):
    """Passes the first BURST lines of each place in the code a minute; the next that passes says how many did not."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._places: dict[tuple[str, int], tuple[float, int]] = {}  # (file, line) -> since when, how many

    def filter(self, record: logging.LogRecord) -> bool:
        place, now = (record.pathname, record.lineno), time.monotonic()
        with self._lock:
            since, count = self._places.get(place, (now, 0))
            if now - since >= WINDOW_S:
                if count > BURST:
                    record.msg = f"{record.getMessage()} (and {count - BURST} more like it in {now - since:.0f} s)"
                    record.args = None
                since, count = now, 0
            self._places[place] = since, count + 1
        return count < BURST


def configure(level: str, role: str, *more: Processor) -> None:
    """JSON lines on stderr, each with its role; library loggers (Kafka clients, Faust) pass from WARNING on."""
    structlog.configure(
        processors=[
            lambda _, __, event: {"role": role, **event},  # a context variable would be unknown to threads
            *more,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            # Without the locals, which structlog prints by default: user ids are among them.
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level)),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    for noisy in ("kafka", "aiokafka"):  # every retry that succeeds is a warning to them
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(Bounded())
