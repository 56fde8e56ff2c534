"""What watches a running Upwell: its exporters, a real Prometheus on them, and the queries of every panel."""

import math
import re
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from itertools import count

import pytest
from prometheus_client.parser import text_string_to_metric_families

from stream.producer import Producer
from tests.deploy.prometheus import RULES, Prometheus, needs_prometheus, running_prometheus
from tests.deploy.test_rules import QUERIES
from tests.workers.service import ITEMS, Service, clicks, until
from workers.reference import listed

# What may be 0 in a healthy service, a name or one of its series.
QUIET = {
    "upwell_clicks_total duplicate",  # nothing is read twice, refused, taken back or left waiting
    "upwell_swaps_total refused",
    "upwell_training_rounds_total refused",
    "upwell_training_rounds_total failed",
    "upwell_rollbacks_total",
    "upwell_pending_erasures",
    "upwell_lag_clicks",
    "upwell_group_lag_clicks",  # test_cli_ops.py
    "upwell_topic_end_offset",  # of a partition that nobody has written to
    "upwell_drift",  # needs 5,000 clicks before
    "upwell_generation_items fresh",  # none, where the newest generation has just taken them in
    "upwell_hits_total popularity",  # a few clicks on 120 items may hold none of its ten
    "upwell_live_hit_rate_at_10",
    "upwell_live_ndcg_at_10",
    "upwell_gate_ndcg_at_10",
}
IDS = re.compile(r"\b(u\d+|i\d+|e\d+|http-user|watched)\b")


def traffic(service: Service, first: int) -> None:
    """A bit of everything: clicks, one nobody can read, a new item, requests for a known and an unknown user.

    Half of the clicks are of new users: who has clicked on all there is tells the gate nothing.
    """
    both = zip(clicks(150, first=first, name="watched-"), clicks(150, name=f"{first}-"), strict=True)
    service.send([own if at % 2 else one for at, (one, own) in enumerate(both)])
    producer = Producer(service.settings.connection)
    producer.send_raw(service.settings.topics.clicks.name, b"watched", b"{")
    producer.close()
    service.call("/v1/items", {"item_id": f"watched-{first}", "title": f"watched {first}", "text": "sailing"})
    for user in ("watched-u1", "watched"):
        service.call(f"/v1/users/{user}/recommendations")
    service.call("/v1/events", b"{")


def test_the_list_of_metrics_is_what_the_roles_expose(service: Service) -> None:
    firsts = count(500_000, 150)

    def learned() -> bool:
        traffic(service, next(firsts))
        rounds = service.metric("upwell_training_rounds_total{published}", "trainer")
        return rounds * service.metric("upwell_hits_total{served}") > 0

    until(learned, "a round is published, and a list holds what is clicked next")
    assert service.call("/v1/users/watched", method="DELETE")[0] == 202
    until(lambda: service.metric("upwell_erasures_total{cleared}") > 0, "the erasure is counted")
    for role in ("worker", "serve"):
        until(lambda role=role: service.metric("upwell_pending_erasures", role) == 0, f"none is pending: {role}", 10.0)  # type: ignore[misc]
    values, without = defaultdict[tuple[str, ...], float](float), set(listed())
    for role, address in service.exporters.items():
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        for family in text_string_to_metric_families(text):
            if family.name.startswith(("python_", "process_")):
                continue
            name = family.name + {"counter": "_total"}.get(family.type, "")
            assert name in listed(), f"{role} exposes {name}, which is not in the list"
            for sample in family.samples:
                assert not [label for label in sample.labels.values() if IDS.search(label)], name
                without.discard(name)
                if "le" not in sample.labels:
                    values[name, *sample.labels.values()] += sample.value
    assert not without
    silent = {of for of, value in values.items() if not value}
    assert not {" ".join(of) for of in silent if QUIET.isdisjoint({of[0], " ".join(of)})}


@pytest.fixture(scope="module")
def prometheus(service_once: Service, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    targets = {f"upwell-{role}": address for role, address in service_once.exporters.items()}
    with running_prometheus(tmp_path_factory.mktemp("prometheus"), targets) as prometheus:
        yield prometheus


@needs_prometheus
def test_prometheus_sees_every_role_and_every_panel_has_data(service: Service, prometheus: Prometheus) -> None:
    until(lambda: set(prometheus.up.values()) == {"up"}, f"all targets are up: {prometheus.up}")
    assert prometheus.up.keys() == {f"upwell-{role}" for role in service.exporters}

    without: dict[tuple[str, str, str], str] = QUERIES
    sent = 510_000

    def all_have_data() -> bool:
        nonlocal without, sent
        sent += 150
        traffic(service, sent)
        without = {place: query for place, query in without.items() if not _has_data(prometheus, query)}
        return not without

    try:
        until(all_have_data, "every panel has data", 200.0)  # one waits for a swap: a round, a build, a load
    except AssertionError as error:
        raise AssertionError(f"{error}; without: {without}") from error
    _rules_are_evaluated(prometheus)


def _has_data(prometheus: Prometheus, query: str) -> bool:
    values = prometheus.query(query)
    return any(math.isfinite(value) for value in values)


def _rules_are_evaluated(prometheus: Prometheus) -> None:
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == sum(len(group["rules"]) for file in RULES.values() for group in file["groups"])
    assert {rule["name"]: rule["health"] for rule in rules if rule["health"] != "ok"} == {}
    assert prometheus.query("upwell:click_to_recommendation_seconds:p99")
    firing = {rule["name"] for rule in rules if rule["type"] == "alerting" and rule["state"] == "firing"}
    assert "UpwellRoleDown" not in firing
    assert len(ITEMS) <= prometheus.query('max(upwell_generation_items{place="indexed"})')[0]
