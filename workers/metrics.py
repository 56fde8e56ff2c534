"""Every metric: name, type, unit, labels, and what to do when it moves. No user or item id in a label."""

from prometheus_client import Counter, Gauge, Histogram, start_http_server

LATENCY_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)

clicks = Counter(
    "upwell_clicks_total",
    "Clicks read, by outcome (applied, duplicate, bad). duplicate rises after a restart: harmless; "
    "bad: read the dead letters.",
    ["outcome"],
)
click_to_recommendation_s = Histogram(
    "upwell_click_to_recommendation_seconds",
    "From Kafka's stamp of a click to the acknowledged send of its user's list. Rising: look at lag, then at hop.",
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
    "Clicks in a micro-batch. At the upper end the worker is saturated: start another.",
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
)
lag_clicks = Gauge(
    "upwell_lag_clicks",
    "Clicks not yet folded, by partition. One growing alone is a stalled fetch.",
    ["partition"],
)
restored_users = Gauge("upwell_restored_users", "User states in memory. Falls when partitions move away.")
scored_clicks = Counter("upwell_scored_clicks_total", "Clicks ranked before they were folded: the live test set.")
hits = Counter(
    "upwell_hits_total",
    "Scored clicks that stood in the top 10, by ranking (served, popularity). served near popularity: "
    "the model has gone stale, look at the trainer.",
    ["ranking"],
)
hit_rate = Gauge(
    "upwell_live_hit_rate_at_10",
    "hits / scored clicks, by ranking: served and popularity over the last 5,000; previous, the generation before, "
    "since the swap.",
    ["ranking"],
)
generation = Gauge(
    "upwell_generation_info",
    "1 for the generation that serves here. Differing between roles: a fetch fails.",
    ["name"],
)
generation_created_s = Gauge("upwell_generation_created_seconds", "When it was built. Old: trainer or indexer stands.")
generation_items = Gauge("upwell_generation_items", "Items, by place (indexed, fresh).", ["place"])
swaps = Counter(
    "upwell_swaps_total",
    "Generations taken in, by result (served, refused). refused: read the log's reason.",
    ["result"],
)
rollbacks = Counter(
    "upwell_rollbacks_total",
    "Generations taken back after a swap: they did worse than the one before on the same clicks. Look at what the "
    "trainer's gate said of them.",
)
swap_s = Histogram("upwell_swap_seconds", "Fetch, verify, load and probe of a generation, beside traffic.")
rounds = Counter(
    "upwell_training_rounds_total",
    "Training rounds, by result (published, refused, failed). Only refused for an hour: look into refused/.",
    ["result"],
)
training_s = Histogram(
    "upwell_training_seconds", "Time of a round's training.", buckets=(0.1, 0.5, 1, 2, 5, 10, 30, 60, 300)
)
training_loss = Gauge("upwell_training_loss", "Mean tower loss of the last round.")
gate_ndcg = Gauge(
    "upwell_gate_ndcg_at_10",
    "NDCG@10 on the newest held-out slice, by model (candidate, serving).",
    ["model"],
)
encoded_items = Counter("upwell_encoded_items_total", "Item texts encoded (cache misses).")
encode_s = Histogram("upwell_encode_seconds", "Time of a batch of texts in the encoder, by device.", ["device"])
build_s = Histogram("upwell_build_seconds", "Build of a generation: vectors, HNSW, probes, checksums.")
index_recall = Gauge("upwell_index_recall_at_20", "Recall of the newest index against the exact search.")
requests = Counter("upwell_requests_total", "HTTP requests, by route and status.", ["route", "status"])
request_s = Histogram("upwell_request_seconds", "HTTP request time, by route.", ["route"], buckets=LATENCY_S)
answers = Counter(
    "upwell_answers_total",
    "Lists answered, by source (personal, popular) and fullness (full, short, empty).",
    ["source", "fullness"],
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
erasures = Counter(
    "upwell_erasures_total",
    "Users' erasures, by stage: asked (serve), cleared (worker: state, lists and dead letters are gone).",
    ["stage"],
)
pending_erasures = Gauge(
    "upwell_pending_erasures",
    "Erasures on their way here: asked for and not yet seen in the users topic (serve), read and not yet cleared "
    "(worker). Not falling: look at the worker's lag.",
)


def serve(port: int) -> None:
    """A Prometheus exporter on loopback; port 0 takes a free one."""
    start_http_server(port, addr="127.0.0.1")
