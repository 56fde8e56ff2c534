"""docs/metrics.md, made from the list in workers/metrics.py: `make reference`."""

from prometheus_client.metrics import MetricWrapperBase

from workers import metrics

UNITS = ("seconds", "bytes", "clicks", "users", "items")
HEAD = """# Metrics

Made by `make reference` from `workers/metrics.py`; a test holds it to that. Every role exposes all of these names,
`serve` at `/metrics` of its port, the others on `metrics_port` at `metrics_host`; those that a role does not set stay 0
or without samples. Histograms come as `_bucket`, `_sum` and `_count`. No label holds a user or an item. Beside these,
prometheus_client exports the process (`process_*`) and Python's garbage collector (`python_*`).

| name | type | unit | labels | what it is, and what to do when it moves |
|---|---|---|---|---|
"""


def listed() -> dict[str, MetricWrapperBase]:
    """All metrics by the name under which they are scraped."""
    found = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]
    return {name_of(metric): metric for metric in found}


def name_of(metric: MetricWrapperBase) -> str:
    (family,) = metric.describe()
    return family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")


def page() -> str:
    rows = []
    for name, metric in sorted(listed().items()):
        (family,) = metric.describe()
        unit = next((unit for unit in UNITS if unit in name.removesuffix("_total").split("_")), "")
        labels = ", ".join(f"`{label}`" for label in metric._labelnames)
        rows.append(f"| `{name}` | {family.type} | {unit} | {labels} | {family.documentation} |\n")
    return HEAD + "".join(rows)
