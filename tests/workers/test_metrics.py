"""Many observations at once count as one by one."""

import numpy as np
from prometheus_client import Histogram

from workers.metrics import LATENCY_S, Latency


def test_many_at_once_count_as_one_by_one() -> None:
    seconds = np.array([0.0, 0.0005, 0.001, 0.0011, 0.3, 59.0, 60.0, 61.0, np.inf])
    one, all_ = (kind("s", "s", registry=None, buckets=LATENCY_S) for kind in (Histogram, Latency))
    for value in seconds.tolist():
        one.observe(value)
    assert isinstance(all_, Latency)
    all_.observe_all(seconds)
    all_.observe_all(seconds[:0])
    samples = [[(s.name, s.labels, s.value) for m in each.collect() for s in m.samples] for each in (one, all_)]
    assert samples[0] == samples[1] and ("s_count", {}, 9.0) in samples[1]
