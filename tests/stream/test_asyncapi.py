"""The published documents are those of the code, and real messages fit them."""

from pathlib import Path

import jsonschema
import msgspec
import pytest

from stream.asyncapi import asyncapi, documents, messages, schema
from stream.events import (
    WIRE_TYPES,
    Artifact,
    Click,
    DeadLetter,
    Erasure,
    Event,
    Item,
    ItemVector,
    Ranked,
    Recommendations,
    encode,
)
from stream.topics import Topics

DOCS = Path(__file__).parents[2] / "docs" / "api"
EXAMPLES: list[Event] = [
    Click(event_id="e", user_id="u", item_id="i", ts_ms=1, value=2.5, context={"page": "home"}),
    Item(item_id="i", title="t", categories=["c"], published_ms=3),
    ItemVector(item_id="i", encoder="minilm", text_hash="00", vector=b"\x00<"),
    Recommendations(
        user_id="u", items=[Ranked("i", 0.5)], generation="g", source="personal", partition=0, offset=7,
        event_id="e", clicked_ms=1, sent_ms=2,
    ),
    Artifact(name="g", url="file:///g", manifest_sha256="0", created_ms=1, encoder="e", offsets={0: 3}),
    DeadLetter(topic="t", partition=0, offset=0, cause="c", key=None, payload=b"\xff", ts_ms=1),
    Erasure(event_type="erase", user_id="u", requested_ms=1),
]  # fmt: skip


def test_the_committed_documents_are_the_code_s() -> None:
    """After a change: make schemas."""
    assert {path.name: path.read_text() for path in DOCS.iterdir()} == documents()


def test_there_is_an_example_of_every_type() -> None:
    assert {type(example) for example in EXAMPLES} == set(WIRE_TYPES)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_real_messages_fit_their_schema(example: Event) -> None:
    own = schema(type(example))
    jsonschema.Draft202012Validator.check_schema(own)
    body = msgspec.json.decode(encode(example))
    jsonschema.validate(body, own)
    for broken in [body | {"version": 99}, body | {"version": "1"}, None]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, own)


def test_every_topic_is_described() -> None:
    topics = Topics("shop")
    channels = asyncapi(topics)["channels"]
    assert {channel["address"] for channel in channels.values()} == {topic.name for topic in topics.all()}
    assert {topic.name for topic, _ in messages(topics)} == {topic.name for topic in topics.all()}
