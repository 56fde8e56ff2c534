"""What the benchmarks share: alternating runs, medians of ratios, the machine's load, CPU and memory of a process."""

import gc
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec
import psutil

from workers.processes import settle
from workers.progress import seldom

Runs = dict[str, list[float]]
_BEGAN = time.perf_counter()


class Options(NamedTuple):
    """rounds: alternating runs of each contender; quick: a small form that shows that all of it works."""

    quick: bool = False
    rounds: int = 5
    size: int | None = None  # of what is measured (items, clicks), where another than the benchmark's own is wanted

    def scaled(self, full: int, quick: int) -> int:
        return self.size or (quick if self.quick else full)


class Result(msgspec.Struct, frozen=True):
    """One benchmark's figures. `load`: the 1-minute load average before and after, on `cores`."""

    name: str
    ratios: dict[str, float]
    values: dict[str, float | str]
    load: tuple[float, float]
    cores: int = os.cpu_count() or 1


def measure(name: str, options: Options) -> Result:
    """The benchmark's `work`, the load noted around it, its ratios and values rounded to 4 digits."""
    work = importlib.import_module(f"workers.bench.{name}").work
    before = os.getloadavg()[0]
    ratios, values = work(options)
    after = os.getloadavg()[0]
    short = {key: value if isinstance(value, str) else _round(value) for key, value in values.items()}
    return Result(name, {key: _round(value) for key, value in ratios.items()}, short, (before, after))


def alternate(contenders: Mapping[str, Callable[[], float]], rounds: int) -> Runs:
    """One figure a run; the contenders take turns, so that a busy spell of the machine meets all of them.

    The garbage collector is as in the roles: it would else go through all that was set up, in what is measured here.
    """
    settle()
    runs: Runs = {name: [] for name in contenders}
    progress = seldom(lambda done, of: tell(f"{done} of {of} runs of {', '.join(contenders)}"), 5.0)
    for round_ in range(rounds):
        names = list(contenders) if round_ % 2 == 0 else list(reversed(list(contenders)))
        for name in names:
            runs[name].append(contenders[name]())
            progress(sum(map(len, runs.values())), rounds * len(contenders))
    gc.unfreeze()  # what `settle` has frozen would be told as leaked at the end
    return runs


def tell(what: str) -> None:
    """For who waits: seconds since the benchmark began, and what has been done; stdout is for the result."""
    print(f"{time.perf_counter() - _BEGAN:7.0f} s  {what}", file=sys.stderr, flush=True)


def medians(runs: Runs) -> dict[str, float | str]:
    return {name: statistics.median(figures) for name, figures in runs.items()}


def ratio(runs: Runs, name: str, base: str) -> float:
    """Median of the rounds' own ratios: what slows a round down slows both sides."""
    return statistics.median(a / b for a, b in zip(runs[name], runs[base], strict=True))


def seconds(work: Callable[[], object]) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cpu_seconds(work: Callable[[], object]) -> float:
    """This process's CPU time of a call: a neighbour on the core does not count."""
    began = time.process_time()
    work()
    return time.process_time() - began


def tree(pid: int) -> list[psutil.Process]:
    """A process and all below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_s(pid: int) -> float:
    """User and system seconds of a process and all that are alive below it."""
    return sum(sum(process.cpu_times()[:2]) for process in tree(pid))


def rss_mib(pid: int) -> float:
    """Resident memory, shared pages counted once a process."""
    return float(sum(process.memory_info().rss for process in tree(pid))) / 2**20


def await_true(true: Callable[[], bool], what: str, timeout_s: float = 600.0, pause_s: float = 0.05) -> None:
    """Raises TimeoutError naming what did not come."""
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:.0f} s: {what}")
        time.sleep(pause_s)


def _round(value: float) -> float:
    return float(f"{value:.4g}")
