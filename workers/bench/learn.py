"""CPU milliseconds an event of a full fine-tune of 100,000 events in one thread; past half of them, the share that the
matrix products alone would take. The first events cost more: the young stream is replayed (`ModelConfig.warmup_steps`).

The floor: the floating point operations that torch counts in learning an event there (tower and mix), at the rate that
one large product of two matrices reaches on this core in the same run.
"""

import cProfile
import itertools
import pstats
import time
from collections.abc import Callable, Sequence

import torch
from msgspec.structs import replace
from torch.utils.flop_counter import FlopCounterMode

from model.learner import LearnReport
from stream.datasets import load_dataset
from stream.events import Click
from workers.bench import data
from workers.bench.harness import Options, alternate, cpu_seconds, medians, ratio, tell
from workers.progress import seldom
from workers.training_input import events_of

AT_ONCE = 6_400  # events between two words on how far it is: whole micro-batches, so that nothing else is learned
WIDTH = 1024
PARTS = {
    "_learn_tower": "tower",
    "_learn_mix": "mix",
    "_refresh": "factorisation",
    "_count": "counts",
    "_append": "log",
}


def replayed(clicks: Sequence[Click], count: int) -> list[Click]:
    """So many clicks: the whole stream again and again, by other people, a stream's length later each time."""
    span = 1 + clicks[-1].ts_ms - clicks[0].ts_ms
    return [
        replace(click, user_id=f"{round_}-{click.user_id}", ts_ms=click.ts_ms + round_ * span)
        for round_ in range(-(-count // len(clicks)))
        for click in clicks[: count - round_ * len(clicks)]
    ]


def gflops_per_s() -> float:
    a, b = torch.rand(2, WIDTH, WIDTH)
    return 2e-9 * WIDTH**3 / min(cpu_seconds(lambda: a @ b) for _ in range(5))


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Of the profiled time, what each part of `Learner.learn` took."""
    profile = cProfile.Profile()
    profile.runcall(work)
    stats = pstats.Stats(profile)
    found = {
        function: cumulative
        for (file, _, function), (_, _, _, cumulative, _) in stats.stats.items()  # type: ignore[attr-defined]
        if file.endswith("model/learner.py")
    }
    return {f"share {name}": found.get(function, 0.0) / found["learn"] for function, name in PARTS.items()}


def work(options: Options) -> tuple[dict[str, float], dict[str, float | str]]:
    dataset = load_dataset("ml-100k")
    count = options.scaled(100_000, 300)
    events = events_of(replayed(dataset.events, count), lambda _: 1.0)
    steps, losses = list[int](), list[float]()

    def learn_ms() -> float:
        learner = data.untrained(dataset)
        progress = seldom(lambda done, of: tell(f"{done:,} of {of:,} events learned"), 10.0)
        learned, took = list[LearnReport](), 0.0
        for start in range(0, count, AT_ONCE):
            part = events.slice(start, start + AT_ONCE)
            began = time.process_time()
            learned.append(learner.learn(part))
            took += time.process_time() - began
            progress(start + len(part), count)
        steps.append(sum(report.steps for report in learned))
        losses.append(sum(report.tower_loss * report.steps for report in learned) / steps[-1])
        return 1000 * took / count

    learner = data.untrained(dataset)
    head, sample = events.slice(0, count // 2), events.slice(count // 2, count // 2 + min(256, count // 8))
    learner.learn(head)
    with FlopCounterMode(display=False) as counter:
        learner.learn(sample)
    gflop = counter.get_total_flops() / len(sample) / 1e9
    ahead, size = count // 2 + len(sample), min(1_920, count // 8)  # whole micro-batches
    starts = itertools.cycle(range(ahead, count - size + 1, size))

    def learn_more() -> None:
        start = next(starts)
        learner.learn(events.slice(start, start + size))

    contenders = {
        "learn_ms": learn_ms,
        "learn_ms past half the events": lambda: 1000 * cpu_seconds(learn_more) / size,
        "floor_ms": lambda: 1000 * gflop / gflops_per_s(),
    }
    runs = alternate(contenders, options.rounds)
    values = medians(runs) | {"gflop_an_event": gflop, "events": float(count), "steps": float(steps[0])}
    values |= {"steps_per_s": steps[0] / count * 1000 / float(medians(runs)["learn_ms"]), "tower_loss": losses[0]}
    values |= shares(learn_more)
    return {"matrix products / learning": ratio(runs, "floor_ms", "learn_ms past half the events")}, values
