"""docs/reference, made from the code: the HTTP API, the topics, the settings, the commands, metrics. `make reference`.

The first three are JSON Schema underneath, and are shown by one kind of table.
"""

import html
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from prometheus_client.metrics import MetricWrapperBase
from typer.cli import get_docs_for_click

from stream.asyncapi import messages, schema
from stream.topics import DAY_MS, Topic, Topics
from workers import metrics
from workers.cli import app
from workers.keys import OPEN
from workers.routes import PROBLEMS
from workers.server import build_app
from workers.service import Service
from workers.settings import Settings

Schema = dict[str, Any]
LARGE = 2**53  # from there on a bound is the format's, and says nothing
MADE = "Made by `make reference` from the code; a test holds it to that.\n"
TABLE = "\n| name | type | default | what it is |\n|---|---|---|---|\n"
BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}",
          "maxLength": "at most {} characters", "maxItems": "at most {}"}  # fmt: skip
UNITS = ("seconds", "bytes", "clicks", "users", "items")
METRICS_HEAD = """# Metrics

Made by `make reference` from `workers/metrics.py`; a test holds it to that. Every role exposes all of these names,
`serve` at `/metrics` of its port, the others on `metrics_port` at `metrics_host`; those that a role does not set stay 0
or without samples. Histograms come as `_bucket`, `_sum` and `_count`. No label holds a user or an item. Beside these,
prometheus_client exports the process (`process_*`) and Python's garbage collector (`python_*`).

| name | type | unit | labels | what it is, and what to do when it moves |
|---|---|---|---|---|
"""


def type_of(field: Schema) -> str:
    """A schema in a few words: integer ≥ 1 ≤ 200, array of string, Answer (a link to its table)."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    for key in ("anyOf", "oneOf", "allOf"):
        if key in field:
            return " or ".join(dict.fromkeys(type_of(one) for one in field[key]))
    if "properties" in field:
        return type_of({"$ref": field["title"]})
    words = str(field.get("type", "any"))
    if isinstance(inner := field.get("items"), dict):
        words += f" of {type_of(inner)}"
    return " ".join(
        [words, *(text.format(f"{field[key]:.15g}") for key, text in BOUNDS.items() if field.get(key, LARGE) < LARGE)]
    )


def row(name: str, field: Schema, required: bool) -> str:
    default = "required" if required else f"`{json.dumps(field['default'])}`" if "default" in field else ""
    cells = (f"`{name}`", type_of(field), default, field.get("description", ""))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def table(kind: Schema, prefix: str = "") -> str:
    required = kind.get("required", ())
    rows = (row(prefix + name, field, name in required) for name, field in kind["properties"].items())
    return TABLE + "".join(rows)


def types(schemas: dict[str, Schema], level: str) -> Iterator[str]:
    for name, kind in sorted(schemas.items()):
        if "properties" in kind:
            about = f"\n{kind['description']}\n" if "description" in kind else ""
            yield f"\n{level} {name}\n{about}{table(kind)}"


def answers(responses: dict[str, Schema]) -> Iterator[str]:
    """Each status, with what a good one holds."""
    for status, answer in responses.items():
        schemas = [content["schema"] for content in answer.get("content", {}).values() if content.get("schema")]
        yield f"{status} {type_of(schemas[0])}" if schemas and status < "300" else status


def api() -> str:
    document = build_app(Service(Settings.model_construct()), OPEN).openapi_schema.to_schema()
    text = f"# HTTP API\n\n{MADE}\n{document['info']['description']} `/schema` of a server has it for programs.\n"
    text += "\n| status | what it means |\n|---|---|\n"
    text += "".join(f"| {status} | {meaning} |\n" for status, meaning in PROBLEMS.items())
    schemas = dict(document["components"]["schemas"])
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            scopes = ", ".join(f"`{scope}`" for one in route.get("security") or () for scope in one["key"])
            text += f"\n## {method.upper()} {path}\n\n{route['summary']}. {route.get('description', '')}\n\n"
            text += f"Scope: {scopes or 'none'}. Answers: {', '.join(answers(route['responses']))}.\n"
            if parameters := route.get("parameters"):
                lines = (row(one["name"], one["schema"], one.get("required", False)) for one in parameters)
                text += TABLE + "".join(lines)
            for media, body in route.get("requestBody", {}).get("content", {}).items():
                text += f"\nBody: {media}, {type_of(body['schema'])}.\n"
                schemas |= {one["title"]: one for one in body["schema"].get("anyOf", ()) if "properties" in one}
    return text + "\n## Types\n" + "".join(types(schemas, "###"))


def kept(topic: Topic) -> str:
    days = "without end" if topic.retention_ms is None else f"{topic.retention_ms / DAY_MS:g} days"
    return f"the newest record of a key, {days}" if topic.compacted else days


def topics() -> str:
    about = "Names and figures are those of the default settings. For programs: [AsyncAPI 3](../api/asyncapi.json)."
    text = f"# Topics\n\n{MADE}\n{about}\n\n| topic | partitions | kept | records | what it is for |\n"
    text += "|---|---|---|---|---|\n"
    kinds: dict[str, Schema] = {}
    for topic, records in messages(Topics()):
        kinds |= {kind.__name__: schema(kind) for kind in records}
        links = ", ".join(f"[{kind.__name__}](#{kind.__name__.lower()})" for kind in records) or "private"
        text += f"| `{topic.name}` | {topic.partitions} | {kept(topic)} | {links} | {topic.about} |\n"
    inner = {name: kind for one in kinds.values() for name, kind in one.get("$defs", {}).items()}
    return text + "".join(types(kinds | inner, "##"))


def settings() -> str:
    document = Settings.model_json_schema()
    fields, kinds = document["properties"], document["$defs"]
    sections = {name: field["$ref"].rpartition("/")[2] for name, field in fields.items() if "$ref" in field}
    top = {name: field for name, field in fields.items() if name not in sections} | {"arms": {"type": "object"}}
    text = f"# Settings\n\n{MADE}\n`kafka.bootstrap` is `bootstrap` under `[kafka]` in `upwell.toml`, or the variable\n"
    text += "`UPWELL_KAFKA__BOOTSTRAP`, which wins. An unknown name is refused.\n"
    text += "\n## Without a section\n" + table({"properties": top})
    for name, kind in sections.items():
        text += f"\n## {name}\n" + table(kinds[kind], f"{name}.")
    return text + "\n## arms.NAME\n" + table(kinds["Arm"], "arms.NAME.")


def commands() -> str:
    command = typer.main.get_command(app)
    made = html.unescape(get_docs_for_click(obj=command, ctx=typer.Context(command), name="upwell"))
    # Each command has a section, and --help.
    made = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+|\*\*Usage\*\*:\n\n|\* `--help`: .*\n", "", made)
    made = re.sub(r"\*\*Options\*\*:\n\n(?!\*)|(?<=\n\n)\n", "", made)
    return made.replace("# `upwell`\n", f"# Commands\n\n{MADE}", 1).rstrip() + "\n"


def listed() -> dict[str, MetricWrapperBase]:
    """All metrics by the name under which they are scraped."""
    found = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]
    return {name_of(metric): metric for metric in found}


def name_of(metric: MetricWrapperBase) -> str:
    (family,) = metric.describe()
    return family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")


def metric_list() -> str:
    rows = []
    for name, metric in sorted(listed().items()):
        (family,) = metric.describe()
        unit = next((unit for unit in UNITS if unit in name.removesuffix("_total").split("_")), "")
        labels = ", ".join(f"`{label}`" for label in metric._labelnames)
        rows.append(f"| `{name}` | {family.type} | {unit} | {labels} | {family.documentation} |\n")
    return METRICS_HEAD + "".join(rows)


PAGES = {
    "api.md": api,
    "topics.md": topics,
    "settings.md": settings,
    "commands.md": commands,
    "../metrics.md": metric_list,
}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")
