"""What a role does to its own process: threads, memory, and its end, in order, or at once where it cannot go on."""

import ctypes
import gc
import os
import resource
import signal
import sys
import threading
from contextlib import suppress
from typing import NoReturn

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


def die(reason: str, code: int, error: BaseException | None = None) -> NoReturn:
    """End the process now, before anything unfinished is acked: the broker gives the batch to the next one."""
    log.error("process ends at once", reason=reason, exc_info=error)
    end(code)


def end(code: int) -> NoReturn:
    """Without waiting for threads that still read: of a Kafka or a store that does not answer, for minutes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def settle() -> None:
    """Once all is imported, or read: out of the garbage collector's rounds, which stop every thread."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)  # new objects, for 700: a micro-batch alone makes some thousands


def share_heaps() -> None:
    """Before threads start: two heaps for all of them, where glibc gives each its own. Why: docs/decisions.md."""
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc's; macOS has one heap
        libc.mallopt(_M_ARENA_MAX, _HEAPS)


def open_many() -> None:
    """As many files and connections as may be: by custom 1,024, which the streams alone would take."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):  # without a bound, macOS takes none either
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def end_with_threads() -> None:
    """A thread that ends by an error ends the process: what it follows would stand still, and nobody would see."""
    threading.excepthook = lambda args: die(f"thread {args.thread and args.thread.name}", EX_SOFTWARE, args.exc_value)


def compute_in_one_thread() -> None:
    """torch and BLAS, whatever thread asks: two threads of a busy machine spin for one another.

    threadpoolctl sets OpenMP's number for the thread that calls it; in all others torch took a thread a core.
    """
    import torch  # not with this file, which `upwell --help` reads
    from threadpoolctl import threadpool_limits

    threadpool_limits(1)
    torch.set_num_threads(1)
