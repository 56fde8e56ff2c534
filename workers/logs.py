"""Structured logs: one JSON object a line on stderr. ERROR means a bug or a stop, never a bad input."""

import logging
import sys

import structlog


def configure(level: str, role: str) -> None:
    """JSON lines on stderr, each with its role; library loggers (Kafka clients, Faust) pass from WARNING on."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            # Without the locals, which structlog prints by default: user ids are among them.
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level)),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    structlog.contextvars.bind_contextvars(role=role)
    for noisy in ("kafka", "aiokafka"):  # every retry that succeeds is a warning to them
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
