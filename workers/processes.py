"""Starting a role on a free port; ending it, in order, or at once where it cannot go on."""

import ctypes
import gc
import os
import signal
import sys
import threading

import structlog

log = structlog.get_logger()

EX_DATA, EX_SOFTWARE = 65, 70  # sysexits.h: the input is bad; an internal error was met
_M_ARENA_MAX, _HEAPS = -8, 2  # mallopt(3)


def stop_on_signal() -> threading.Event:
    """An event that SIGINT or SIGTERM sets; to be called by the main thread."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    return stop


def die(reason: str, code: int, error: BaseException | None = None) -> None:
    """End the process now, before anything unfinished is acked: the broker gives the batch to the next one."""
    log.error("process ends at once", reason=reason, exc_info=error)
    sys.stderr.flush()
    os._exit(code)


def settle() -> None:
    """Once all is imported, or read: leaves it out of the garbage collector's rounds, which stopped every thread for
    0.13 s.

    And a round for 20,000 new objects in place of 700: a micro-batch alone makes some thousands, and rounds through
    them were a seventh of the time that it takes to decode and fold.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def share_heaps() -> None:
    """Before threads start: two heaps for all of them, where glibc gives each thread its own, up to eight a core, and
    each keeps what its busiest moment took. Hardly anything waits for it: the GIL lets Python run one thread at a time.
    """
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc's; macOS has one heap
        libc.mallopt(_M_ARENA_MAX, _HEAPS)


def end_with_threads() -> None:
    """A thread that ends by an error ends the process: what it follows would stand still, and nobody would see."""
    threading.excepthook = lambda args: die(
        f"thread {args.thread.name if args.thread else '?'}", EX_SOFTWARE, args.exc_value
    )
