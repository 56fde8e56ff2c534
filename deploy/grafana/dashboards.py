"""The dashboards, from which the JSON beside this file is made: `make dashboards`."""

import sys
from copy import deepcopy
from pathlib import Path

from grafana_foundation_sdk.builders import prometheus, timeseries
from grafana_foundation_sdk.builders.common import VizLegendOptions
from grafana_foundation_sdk.builders.dashboard import Dashboard, DatasourceVariable
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef

WIDTH, HEIGHT = 8, 8  # of 24 columns: three panels a row
Query = tuple[str, str]  # PromQL, legend


def panel(title: str, about: str, unit: str, *queries: Query) -> timeseries.Panel:
    built = timeseries.Panel().title(title).description(about).unit(unit).span(WIDTH).height(HEIGHT)
    built.datasource(DataSourceRef(type_val="prometheus", uid="${datasource}"))
    built.legend(
        VizLegendOptions().show_legend(True).display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    )
    for ref, (expr, legend) in zip("ABCDEF", queries, strict=False):
        built.with_target(prometheus.Dataquery().ref_id(ref).expr(expr).legend_format(legend))
    return built


def rate(counter: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({counter}[$__rate_interval]))"


def quantiles(histogram: str, by: str = "", label: str = "") -> list[Query]:
    """p50 and p99, by one label or over all."""
    groups, prefix = (f"le, {by}", f"{{{{{by}}}}} ") if by else ("le", label)
    return [
        (f"histogram_quantile({q}, {rate(f'{histogram}_bucket', groups)})", f"{prefix}p{round(100 * q)}")
        for q in (0.5, 0.99)
    ]


def mean(histogram: str, by: str) -> str:
    """Over the last hour: builds and swaps are rare."""
    return " / ".join(f"sum by ({by}) (increase({histogram}_{part}[1h]))" for part in ("sum", "count"))


CLICKS = panel(
    "Clicks", "Read by the workers, by outcome.", "cps", (rate("upwell_clicks_total", "outcome"), "{{outcome}}")
)
LATENCY = panel(
    "Click to recommendation",
    "From Kafka's stamp of the click to the acknowledged list. The objective: 99 % within 1 s.",
    "s",
    *quantiles("upwell_click_to_recommendation_seconds"),
)
HIT_RATE = panel(
    "Live HR@10",
    "Share of clicks that stood in the top 10 just before. Near popularity's: the model has gone stale.",
    "percentunit",
    ("upwell:hit_rate_at_10", "{{ranking}}"),
)
LAG = panel(
    "Lag by partition",
    "Clicks not committed, from Kafka. One line alone going up: a stalled fetch.",
    "short",
    ("upwell:lag_clicks", "{{partition}}"),
)
AGE = panel("Age of what serves", "Since the generation was built.", "s", ("upwell:generation_age_seconds", "{{job}}"))
ROUNDS = panel(
    "Training rounds",
    "By result, an hour.",
    "short",
    ("sum by (result) (increase(upwell_training_rounds_total[1h]))", "{{result}}"),
)
REQUESTS = panel("Requests", "By status.", "reqps", (rate("upwell_requests_total", "status"), "{{status}}"))

PANELS = {
    "Overview": [
        CLICKS,
        LATENCY,
        LAG,
        HIT_RATE,
        AGE,
        ROUNDS,
        REQUESTS,
        panel(
            "Roles that answer",
            "Processes scraped, by role.",
            "short",
            ('sum by (job) (up{job=~"upwell-.+"})', "{{job}}"),
        ),
        panel(
            "Alerts",
            "Firing now, by name.",
            "short",
            ('count by (alertname) (ALERTS{alertstate="firing"}) or vector(0)', "{{alertname}}"),
        ),
    ],
    "Freshness": [
        LATENCY,
        panel(
            "Late clicks",
            "Share over 1 s in the last hour; 1 % is the budget.",
            "percentunit",
            ("upwell:late_ratio:1h", "1 h"),
            ("upwell:late_ratio:5m", "5 min"),
        ),
        panel("Hops, p99", "Where a micro-batch spends its time.", "s", quantiles("upwell_hop_seconds", "hop")[1]),
        LAG,
        panel(
            "Batches",
            "Clicks worked off together, one list a user; above worker.batch_clicks (1,024) the worker is behind.",
            "short",
            *quantiles("upwell_batch_clicks"),
        ),
        AGE,
        panel(
            "Items",
            "In the index, and newer than it.",
            "short",
            ("max by (job, place) (upwell_generation_items)", "{{job}} {{place}}"),
        ),
        panel(
            "Swaps",
            "Generations taken in, an hour, by result.",
            "short",
            ("sum by (job, result) (increase(upwell_swaps_total[1h]))", "{{job}} {{result}}"),
            ("sum(increase(upwell_rollbacks_total[1h]))", "taken back"),
        ),
        panel(
            "Swap time",
            "Fetch, verify, load, probe; beside traffic.",
            "s",
            (mean("upwell_swap_seconds", "job"), "{{job}} mean"),
        ),
    ],
    "Learning": [
        HIT_RATE,
        panel(
            "Live NDCG@10",
            "The same clicks, higher places counting more.",
            "short",
            ("avg by (ranking) (upwell_live_ndcg_at_10)", "{{ranking}}"),
        ),
        panel(
            "Gate: NDCG@10 on the newest slice",
            "A candidate has to beat what serves.",
            "short",
            ("upwell_gate_ndcg_at_10", "{{model}}"),
        ),
        ROUNDS,
        panel("Round time", "Training alone.", "s", (mean("upwell_training_seconds", "job"), "mean")),
        panel(
            "Loss",
            "Mean tower loss of the last round.",
            "short",
            ('upwell_training_loss{job="upwell-trainer"}', "loss"),
        ),
        panel(
            "Drift",
            "How far the newest clicks' items lie from those before, in standard deviations.",
            "short",
            ('upwell_drift{job="upwell-trainer"}', "drift"),
        ),
        panel(
            "Index recall@20",
            "Against the exact search.",
            "percentunit",
            ('upwell_index_recall_at_20{job="upwell-indexer"}', "recall"),
        ),
        panel(
            "Encoding",
            "Texts a second; seconds a batch, by device.",
            "short",
            (rate("upwell_encoded_items_total"), "texts/s"),
            (mean("upwell_encode_seconds", "device"), "s a batch on {{device}}"),
        ),
    ],
    "Serving": [
        REQUESTS,
        panel("Requests by route", "", "reqps", (rate("upwell_requests_total", "route"), "{{route}}")),
        panel("Request time, p99", "By route.", "s", quantiles("upwell_request_seconds", "route")[1]),
        panel(
            "Lists by source",
            "personal: from the user's history; popular: from none.",
            "cps",
            (rate("upwell_answers_total", "source"), "{{source}}"),
        ),
        panel(
            "Lists by fullness",
            "short, empty: the filters leave too little.",
            "cps",
            (rate("upwell_answers_total", "fullness"), "{{fullness}}"),
        ),
        panel("Share of 5xx", "", "percentunit", ("upwell:error_ratio", "5xx")),
        panel(
            "Generation",
            "Differing for long: a fetch fails.",
            "short",
            ("count by (name) (upwell_generation_info == 1)", "{{name}}"),
        ),
        panel("Generation size", "Its files.", "bytes", ("max by (job) (upwell_generation_bytes > 0)", "{{job}}")),
        panel(
            "Memory",
            "Resident, of each process.",
            "bytes",
            ('process_resident_memory_bytes{job=~"upwell-.+"}', "{{job}} {{instance}}"),
        ),
    ],
    "Kafka": [
        LAG,
        panel(
            "Written, by topic",
            "Records a second (ends of the topics, transaction markers among them).",
            "cps",
            ("sum by (topic) (max by (topic, partition) (deriv(upwell_topic_end_offset[5m])))", "{{topic}}"),
        ),
        panel(
            "Clicks by partition",
            "One far above the others: one user, or one key.",
            "cps",
            ('max by (partition) (deriv(upwell_topic_end_offset{topic=~".+[.]clicks"}[5m]))', "{{partition}}"),
        ),
        CLICKS,
        panel("Dead letters", "Share of the messages that cannot be read.", "percentunit", ("upwell:bad_ratio", "bad")),
        panel(
            "Send time",
            "Of a micro-batch's lists and dead letters, until acknowledged.",
            "s",
            *[(q.replace("_bucket[", '_bucket{hop="send"}['), legend) for q, legend in quantiles("upwell_hop_seconds")],
        ),
        panel(
            "Lag as the workers see it",
            "After their last batch.",
            "short",
            ("max by (partition) (upwell_lag_clicks)", "{{partition}}"),
        ),
        panel(
            "User states in memory",
            "By worker; they move with the partitions.",
            "short",
            ('upwell_restored_users{job="upwell-worker"}', "{{instance}}"),
        ),
        panel(
            "Processor",
            "Cores used, by process.",
            "short",
            ('rate(process_cpu_seconds_total{job=~"upwell-.+"}[$__rate_interval])', "{{job}} {{instance}}"),
        ),
    ],
}


def dashboards() -> dict[str, str]:
    """File name -> JSON."""
    files = {}
    for title, panels in PANELS.items():
        board = Dashboard(f"Upwell: {title}").uid(f"upwell-{title.lower()}").tags(["upwell"])
        board.refresh("15s").time("now-1h", "now").timezone("browser").readonly()
        board.with_variable(DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        for number, each in enumerate(deepcopy(panels), start=1):  # with_panel gives a panel its place
            board.with_panel(each.id(number))
        files[f"{title.lower()}.json"] = JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"
    return files


if __name__ == "__main__":
    for name, text in dashboards().items():
        (Path(sys.argv[1]) / name).write_text(text, encoding="utf-8")
