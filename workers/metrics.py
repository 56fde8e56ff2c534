"""Every metric: name, type, unit, labels, and what to do when it moves. No user or item id in a label.

This is the closed list: docs/metrics.md is made from it (`make reference`). A help text says what is counted, then what
to do. Every role exposes all names; those that it does not set stay 0 or without samples.
"""

import platform
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray
from prometheus_client import Counter, Gauge, Histogram, Info, disable_created_metrics, start_http_server

log = structlog.get_logger()

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, which nobody asks for

WORK_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
LATENCY_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


def _counter(name: str, text: str, **label: tuple[str, ...]) -> Counter:
    """Every value of its label at 0 from the start: PromQL's increase() does not see the birth of a series at 1."""
    ((called, values),) = label.items()
    counter = Counter(name, text, [called])
    for value in values:
        counter.labels(value)
    return counter


clicks = _counter(
    "upwell_clicks_total",
    "Clicks read, by outcome (applied, duplicate, bad). duplicate rises after a restart: harmless; "
    "bad: read the dead letters.",
    outcome=("applied", "duplicate", "bad"),
)


class Latency(Histogram):
    """A histogram that takes many at once: one by one, a backlog's clicks took 5 % of the fold path."""

    def observe_all(self, seconds: NDArray[np.float64]) -> None:
        """As `observe` of each (n,), by private names of prometheus_client: tests/workers/test_metrics.py."""
        counts = np.bincount(np.searchsorted(self._upper_bounds, seconds), minlength=len(self._buckets))
        for bucket, count in zip(self._buckets, counts.tolist(), strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(float(seconds.sum()))


click_to_recommendation_s = Latency(
    "upwell_click_to_recommendation_seconds",
    "From Kafka's stamp of a click to the acknowledged send of its user's list; infinite where no generation serves. "
    "Rising: look at lag, then at hop.",
    buckets=LATENCY_S,
)
hop_s = Histogram(
    "upwell_hop_seconds",
    "Time of a micro-batch in each hop (fold, recommend, send): where click_to_recommendation goes.",
    ["hop"],
    buckets=LATENCY_S,
)
batch_clicks = Histogram(
    "upwell_batch_clicks",
    "Clicks of a partition worked off together, one list a user. Above worker.batch_clicks (1,024) the worker is "
    "behind: start another.",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 40_000),
)
lag_clicks = Gauge(
    "upwell_lag_clicks",
    "Clicks not yet folded, by partition, as the worker saw it after its last batch. Compare upwell_group_lag_clicks, "
    "which moves when the worker stands still, too.",
    ["partition"],
)
restored_users = Gauge("upwell_restored_users", "User states in memory. Falls when partitions move away.")
scored_clicks = Counter("upwell_scored_clicks_total", "Clicks ranked before they were folded: the live test set.")
hits = _counter(
    "upwell_hits_total",
    "Scored clicks that stood in the top 10, by ranking (served, popularity). served near popularity: "
    "the model has gone stale, look at the trainer.",
    ranking=("served", "popularity"),
)
hit_rate = Gauge(
    "upwell_live_hit_rate_at_10",
    "hits / scored clicks, by ranking: served and popularity over the last 5,000; after a swap also trial and "
    "previous, the new generation and the one before it over the clicks of the trial.",
    ["ranking"],
)
live_ndcg = Gauge(
    "upwell_live_ndcg_at_10",
    "The same clicks, by ranking (served, popularity, trial, previous), higher places counting more. Falling while "
    "the hit rate stays: the order within the lists has gone stale.",
    ["ranking"],
)
generation = Gauge(
    "upwell_generation_info", "1 for the generation that serves here. Differing between roles: a fetch fails.", ["name"]
)
generation_created_s = Gauge(
    "upwell_generation_created_seconds", "When it was built; 0: none serves here. Old: trainer or indexer stands."
)
generation_bytes = Gauge("upwell_generation_bytes", "Its files. Growing: watch the disk of the cache.")
generation_items = Gauge("upwell_generation_items", "Items, by place (indexed, fresh).", ["place"])
swaps = _counter(
    "upwell_swaps_total",
    "Generations taken in, by result (served, refused). refused: read the log's reason.",
    result=("served", "refused"),
)
rollbacks = Counter(
    "upwell_rollbacks_total",
    "Generations taken back after a swap: they did worse than the one before on the same clicks. Look at what the "
    "trainer's gate said of them.",
)
swap_s = Histogram(
    "upwell_swap_seconds",
    "Fetch, verify, load and probe of a generation, beside traffic. Rising: the store is slow, or the index has grown.",
    buckets=WORK_S,
)
rounds = _counter(
    "upwell_training_rounds_total",
    "Training rounds, by result (published, refused, failed). Only refused for an hour: look into refused/.",
    result=("published", "refused", "failed"),
)
training_s = Histogram(
    "upwell_training_seconds",
    "Time of a round's training. Far above trainer.round_s: what it learns is as old as that.",
    buckets=WORK_S,
)
training_loss = Gauge(
    "upwell_training_loss",
    "Mean tower loss of the last round. Rising for rounds: what users do has changed, look at upwell_drift.",
)
drift = Gauge(
    "upwell_drift",
    "Distance of the mean text vector of the newest held-out clicks' items from that of the 5,000 clicks before them, "
    "in standard deviations (0: none). Rising: users click on other things than before; a campaign, a new shelf, or "
    "made-up clicks.",
)
gate_ndcg = Gauge(
    "upwell_gate_ndcg_at_10",
    "NDCG@10 on the newest held-out slice, by model (candidate, serving). Both falling: drift; candidate below "
    "serving round after round: read `upwell generations refused`.",
    ["model"],
)
encoded_items = Counter(
    "upwell_encoded_items_total", "Item texts encoded (cache misses). Rising with no new items: their texts change."
)
encode_s = Histogram(
    "upwell_encode_seconds",
    "Time of a batch of texts in the encoder, by device. cpu where a GPU was meant: look at `upwell doctor`.",
    ["device"],
    buckets=WORK_S,
)
build_s = Histogram(
    "upwell_build_seconds",
    "Build of a generation: vectors, HNSW, probes, checksums. It bounds how often a generation can come.",
    buckets=WORK_S,
)
index_recall = Gauge(
    "upwell_index_recall_at_20",
    "Recall probe: the newest index against the exact search. Below 0.95 a generation is not published.",
)
requests = Counter(
    "upwell_requests_total",
    "HTTP requests, by route and status. 503: nothing serves yet, or Kafka does not take events; 499: the client left "
    "amid its body; one that leaves later is not noticed.",
    ["route", "status"],
)
request_s = Histogram(
    "upwell_request_seconds", "HTTP request time, by route. Rising: start another server.", ["route"], buckets=LATENCY_S
)
answers = Counter(
    "upwell_answers_total",
    "Lists answered over HTTP, by source (personal, session, popular), fullness (full, short, empty) and arm. More "
    "popular ones: many strangers, or states are missing; short or empty: the filters leave too little.",
    ["source", "fullness", "arm"],
)
arm_clicks = Counter(
    "upwell_arm_scored_clicks_total",
    "Scored clicks by arm of the A/B test and result (hit: in the top 10 by the arm's rules; miss). An arm that "
    "stands still has no users: look at its share.",
    ["arm", "result"],
)
arm_hit_rate = Gauge(
    "upwell_arm_hit_rate_at_10",
    "Share of hits in the last 5,000 scored clicks of an arm. Arms apart: ask upwell arms report whether by chance.",
    ["arm"],
)
erasures = _counter(
    "upwell_erasures_total",
    "Users' erasures, by stage (asked, cleared): by serve, and by the worker once all of theirs is gone.",
    stage=("asked", "cleared"),
)
pending_erasures = Gauge(
    "upwell_pending_erasures",
    "Erasures on their way here: asked for and not yet seen in the users topic (serve), read and not yet cleared "
    "(worker). Not falling: look at the worker's lag.",
)
group_lag_clicks = Gauge(
    "upwell_group_lag_clicks",
    "Clicks that the worker group has not committed, by partition; read from Kafka by serve. One growing alone is a "
    "stalled fetch, all together too few workers.",
    ["partition"],
)
topic_end_offset = Gauge(
    "upwell_topic_end_offset",
    "Offset of the next record, by topic and partition; its rate is what is written. Standing still in clicks: the "
    "producers are silent; standing still in users or recommendations alone: the workers are.",
    ["topic", "partition"],
)
build = Info("upwell_build", "Versions of this process. Differing between roles: a release that did not go through.")
build.info({"version": version("upwell"), "torch": version("torch"), "python": platform.python_version()})


def serve(port: int, host: str, ready: Callable[[], bool] = lambda: True) -> None:
    """A Prometheus exporter, /readyz beside it; port 0 takes a free one. `ready` is called by another thread."""
    server, _ = start_http_server(port, addr=host)
    export = server.get_app()

    def answer(environ: dict[str, Any], start: Any) -> Any:
        if environ["PATH_INFO"] != "/readyz":
            return export(environ, start)  # type: ignore[misc]  # the stub has None for it
        start("200 OK" if ready() else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b""]

    server.set_app(answer)
    log.info("metrics served", url=f"http://{host}:{server.server_port}/metrics")
