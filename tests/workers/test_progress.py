"""Long work says how far it is, but not all the time."""

from itertools import count

from workers.progress import seldom


def test_told_once_in_so_many_seconds() -> None:
    told: list[tuple[int, int]] = []
    clock = count()  # a second a look
    progress = seldom(lambda done, of: told.append((done, of)), 10.0, lambda: float(next(clock)))
    for done in range(30):
        progress(done, 30)
    assert told == [(9, 30), (19, 30), (29, 30)]
