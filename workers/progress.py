"""Long work says how far it is, seldom enough to fill no log."""

import time
from collections.abc import Callable

from model.index import Progress


def seldom(tell: Progress, pause_s: float, now: Callable[[], float] = time.monotonic) -> Progress:
    """A progress(done, all) that calls `tell` at most once in so many seconds, first when so many are over."""
    due = now() + pause_s

    def progress(done: int, all_: int) -> None:
        nonlocal due
        if (at := now()) >= due:
            tell(done, all_)
            due = at + pause_s

    return progress
