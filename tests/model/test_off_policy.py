"""Estimates of other policies from simulated lists, where the truth is counted."""

import numpy as np
import pytest

from model.off_policy import Estimate, hit_rate, ips, snips
from model.rules import chances, diversify, explore

Simulated = tuple[dict[str, float], dict[str, tuple[Estimate, Estimate]], Estimate]
SIZE, K, CLICKS, SHARE = 30, 6, 12_000, 0.4


def simulated(seed: int) -> Simulated:
    """Users with tastes of their own click on what they would have clicked on anyway; lists come from the exploring
    policy. -> true hit rate of each policy, its IPS and SNIPS estimates, hit rate of the exploring one."""
    draw = np.random.default_rng(seed)
    scores, vectors = np.sort(draw.normal(size=SIZE))[::-1], draw.normal(size=(SIZE, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    order = np.arange(SIZE)
    policies = {"best": chances(order, K, 0.0), "wide": chances(diversify(scores, vectors, 0.9, K), K, 0.0),
                "random": chances(order, K, 1.0)}  # fmt: skip
    shown = chances(order, K, SHARE)
    clicking = np.exp(scores + draw.normal(size=SIZE))
    clicking /= clicking.sum()  # (M,) where the next click goes
    hits, ratios, sizes = (
        np.zeros(CLICKS),
        {name: np.zeros(CLICKS) for name in policies},
        {name: np.zeros(CLICKS) for name in policies},
    )
    for at, clicked in enumerate(draw.choice(SIZE, CLICKS, p=clicking)):
        offered = explore(order, K, SHARE, draw)
        hits[at] = clicked in offered
        for name, chance in policies.items():
            ratios[name][at] = chance[clicked] / shown[clicked]
            sizes[name][at] = (chance[offered] / shown[offered]).mean()
    users = draw.integers(0, 500, CLICKS)
    estimates = {n: (ips(hits, ratios[n], users), snips(hits, ratios[n], sizes[n], users)) for n in policies}
    return {name: float(clicking @ chance) for name, chance in policies.items()}, estimates, hit_rate(hits, users)


@pytest.fixture(scope="module")
def found() -> list[Simulated]:
    return [simulated(seed) for seed in range(6)]


def test_both_estimates_meet_the_truth(found: list[Simulated]) -> None:
    """18 intervals of 95 % each: nearly all hold the truth, and none is far off; the measured rate is another."""
    for kind in (0, 1):
        pairs = [(truth[name], estimates[name][kind]) for truth, estimates, _ in found for name in truth]
        assert sum(e.low <= true <= e.high for true, e in pairs) >= 14
        assert max(abs(e.value - true) for true, e in pairs) < 0.04
    assert max(abs(measured.value - truth["best"]) for truth, _, measured in found) > 0.05


def test_snips_varies_less(found: list[Simulated]) -> None:
    """For policies whose ratios vary: narrower intervals than IPS, taken together."""
    widths = [[e[kind].high - e[kind].low for _, estimates, _ in found for e in estimates.values()] for kind in (0, 1)]
    assert np.mean(widths[1]) < np.mean(widths[0])


def test_an_interval_is_over_users_not_clicks() -> None:
    """Of ten users each of whom always or never hits, a thousand clicks are worth ten."""
    users = np.repeat(np.arange(10), 100)
    alike = hit_rate((users < 5).astype(float), users)
    assert alike.value == 0.5 and alike.high - alike.low > 0.4
