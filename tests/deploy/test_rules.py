"""Rules, alerts, runbook and dashboards without a running Upwell; with one: tests/workers/test_watch.py."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Histogram
from prometheus_client.metrics import MetricWrapperBase

from tests.deploy.prometheus import FOLDER, RULES, needs_prometheus
from workers.reference import listed

ROOT = FOLDER.parents[1]
ALERTS = {rule["alert"]: rule for group in RULES["alerts"]["groups"] for rule in group["rules"]}
RECORDED = {rule["record"]: rule for group in RULES["recording"]["groups"] for rule in group["rules"]}
DASHBOARDS = {path.name: json.loads(path.read_text()) for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")}
QUERIES = {
    (name, panel["title"], target["refId"]): target["expr"].replace("$__rate_interval", "1m")
    for name, board in sorted(DASHBOARDS.items())
    for panel in board["panels"]
    for target in panel["targets"]
}
UNIT_TESTS = Path(__file__).with_name("alerts.test.yml")


def promtool(*arguments: object) -> None:
    result = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_metric_says_what_it_is_and_no_label_holds_an_id() -> None:
    for name, metric in listed().items():
        assert name.startswith("upwell_")
        assert len(metric._documentation) > 20, name
        assert not {"user", "user_id", "item", "item_id", "event_id"} & set(metric._labelnames), name


def test_a_counter_stands_at_0_before_it_first_counts() -> None:
    """PromQL's increase() does not see a series that is born at 1: the first refusal of a process was no alert."""
    code = "from prometheus_client import generate_latest; import workers.metrics; print(generate_latest().decode())"
    fresh = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    said = re.compile(r"\bby (\w+) \(([\w, ]+)\)[.:]")
    named = {
        f'{name}{{{found[1]}="{value}"}} 0.0'
        for name, metric in listed().items()
        if isinstance(metric, Counter) and len(metric._labelnames) == 1
        for found in [said.search(metric._documentation)]
        if found
        for value in found[2].split(", ")
    }
    assert len(named) >= 12, named
    assert named <= set(fresh.splitlines())


@needs_prometheus
def test_promtool_finds_no_fault() -> None:
    promtool("check", "config", "--syntax-only", FOLDER / "prometheus.yml")
    promtool("check", "rules", *(FOLDER / "rules").glob("*.yml"))
    promtool("test", "rules", UNIT_TESTS)


def test_every_alert_is_tested_firing() -> None:
    cases = [
        case for test in yaml.safe_load(UNIT_TESTS.read_text())["tests"] for case in test.get("alert_rule_test", [])
    ]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == ALERTS.keys()


def test_every_alert_has_its_section_in_the_runbook_and_every_section_its_alert() -> None:
    sections = re.findall(r"^## (\S+)\n\n\*(page|ticket)\.\*", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    assert sections == [(name, alert["labels"]["severity"]) for name, alert in ALERTS.items()]


def test_rules_and_panels_name_only_what_is_there() -> None:
    """A misspelt name is valid PromQL and never has data."""
    names = set(RECORDED)
    names |= {name + suffix for name, metric in listed().items() for suffix in _suffixes(metric)}
    queries = [rule["expr"] for rule in [*ALERTS.values(), *RECORDED.values()]] + list(QUERIES.values())
    for query in queries:
        assert set(re.findall(r"\bupwell[_:][\w:]+(?=[\[{) ]|$)", query)) <= names, query


def _suffixes(metric: MetricWrapperBase) -> tuple[str, ...]:
    return ("_bucket", "_sum", "_count") if isinstance(metric, Histogram) else ("",)


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_dashboards_are_made_from_their_code() -> None:
    made = _module(ROOT / "deploy/grafana/dashboards.py").dashboards()
    assert {name: json.loads(text) for name, text in made.items()} == DASHBOARDS, "run `make dashboards`"


@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_panels_have_places_of_their_own(name: str) -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARDS[name]["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in DASHBOARDS[name]["panels"]})
