"""Hit rates of the arms, measured and estimated, as lines of text."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from model.off_policy import Estimate, hit_rate, ips, snips
from workers.arm_log import Scored, read_scored
from workers.arms import all_arms
from workers.settings import Settings


def lines(settings: Settings, since_ms: int) -> Iterator[str]:
    """The report on what the topics hold since then, by Kafka's clock."""
    return table(read_scored(settings, since_ms), all_arms(settings))


def table(scored: Iterable[Scored], configured: Iterable[str]) -> Iterator[str]:
    """One line an arm, those configured and those found; below it, from its lists if it explores, one an other arm."""
    found: dict[str, list[Scored]] = defaultdict(list)
    for click in scored:
        found[click.arm].append(click)
    yield f"{'arm':20} {'clicks':>8} {'users':>7}  hit rate (95 % interval over users)"
    for arm in sorted({*found, *configured}):
        clicks = found.get(arm, [])
        if not clicks:
            yield f"{arm:20} {0:8} {0:7}  -"
            continue
        hits = np.array([click.hit for click in clicks], np.float64)
        _, users = np.unique([click.user_id for click in clicks], return_inverse=True)
        yield f"{arm:20} {len(clicks):8} {users.max() + 1:7}  {_said(hit_rate(hits, users))}"
        yield from _others(clicks, hits, users)


def _others(clicks: Sequence[Scored], hits: np.ndarray, users: np.ndarray) -> Iterator[str]:
    for other in sorted({name for click in clicks for name in click.sizes}):
        logged = np.array([other in click.sizes for click in clicks])
        ratios = np.array([click.ratios.get(other, 0.0) for click in clicks])[logged]
        sizes = np.array([click.sizes.get(other, 0.0) for click in clicks])[logged]
        estimates = ips(hits[logged], ratios, users[logged]), snips(hits[logged], ratios, sizes, users[logged])
        yield f"  {other + ', estimated':35}    IPS {_said(estimates[0])}   SNIPS {_said(estimates[1])}"


def _said(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"
