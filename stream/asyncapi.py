"""The topics and what is said on them, as documents for other languages: AsyncAPI 3 and JSON Schema.

python -m stream.asyncapi docs/api       writes asyncapi.json and one schema a wire type
"""

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from stream.events import WIRE_TYPES, Artifact, Click, DeadLetter, Erasure, Event, Item, ItemVector, Recommendations
from stream.topics import Topic, Topics

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def messages(topics: Topics) -> list[tuple[Topic, list[type[Event]]]]:
    """Each topic and the types of its records; none: binary, private to Upwell."""
    return [
        (topics.clicks, [Click, Erasure]),
        (topics.items, [Item]),
        (topics.vectors, [ItemVector]),
        (topics.users, []),
        (topics.recommendations, [Recommendations]),
        (topics.models, [Artifact]),
        (topics.generations, [Artifact]),
        (topics.dead_letters, [DeadLetter]),
    ]


def schema(kind: type[Event]) -> dict[str, Any]:
    """JSON Schema of one wire type, complete in itself."""
    (reference,), definitions = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    own = definitions.pop(reference["$ref"].rpartition("/")[2])
    rest = {"$defs": definitions} if definitions else {}
    return {"$schema": DIALECT, "$id": f"upwell/{kind.__name__}.json", **own, **rest}


def asyncapi(topics: Topics) -> dict[str, Any]:
    """The AsyncAPI 3.0 document of one installation."""
    _, schemas = msgspec.json.schema_components(WIRE_TYPES, ref_template="#/components/schemas/{name}")
    channels, operations = {}, {}
    for topic, kinds in messages(topics):
        name = topic.name.removeprefix(f"{topics.prefix}.")
        records: dict[str, Any] = {
            kind.__name__: {
                "contentType": "application/json",
                "payload": {"$ref": f"#/components/schemas/{kind.__name__}"},
            }
            for kind in kinds
        } or {"record": {"contentType": "application/msgpack", "payload": {"type": "string", "format": "binary"}}}
        channels[name] = {
            "address": topic.name,
            "description": topic.about,
            "messages": records,
            "bindings": {"kafka": {"topic": topic.name, "partitions": topic.partitions, "topicConfiguration": {
                "cleanup.policy": topic.cleanup}}},
        }  # fmt: skip
        action = "receive" if topic in (topics.clicks, topics.items) else "send"
        operations[f"{action}-{name}"] = {"action": action, "channel": {"$ref": f"#/channels/{name}"}}
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Upwell",
            "version": "1",
            "description": "Clicks and items in, fresh recommendations out. Actions are seen from Upwell.",
            "license": {"name": "Apache-2.0"},
        },
        "channels": channels,
        "operations": operations,
        "components": {"schemas": schemas},
    }


def documents() -> dict[str, str]:
    """File name -> text."""
    found = {f"{kind.__name__}.json": schema(kind) for kind in WIRE_TYPES} | {"asyncapi.json": asyncapi(Topics())}
    return {name: json.dumps(document, indent=2) + "\n" for name, document in found.items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in documents().items():
        (folder / name).write_text(text)
