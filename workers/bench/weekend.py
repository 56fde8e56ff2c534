"""The peer of `upwell bench freshness`: what one writes in a weekend.

Faust as it comes, a click an event; a user is the mean of the text vectors of the last 50 items; hnswlib in this
process; one `topic.send` a list. State lives in memory alone: nothing survives a restart.

    python -m workers.bench.weekend NUM_ITEMS DIM      prints "ready"
"""

import sys
from typing import Any

import hnswlib
import msgspec

from stream.events import decode_click
from workers.bench.data import clustered
from workers.bench.floors import plain_app
from workers.faust_batches import execute
from workers.settings import load_settings

K, HISTORY = 20, 50


def main(num_items: str, dim: str) -> None:
    settings = load_settings()
    vectors = clustered(int(num_items), int(dim))
    index = hnswlib.Index(space="cosine", dim=int(dim))
    index.init_index(len(vectors), M=16, ef_construction=100, random_seed=0)
    index.add_items(vectors)
    users: dict[str, list[int]] = {}
    app = plain_app(settings, "weekend")
    raw = {"value_type": bytes, "value_serializer": "raw"}
    clicks = app.topic(settings.topics.clicks.name, **raw)
    lists = app.topic(settings.topics.recommendations.name, **raw)

    @app.agent(clicks)  # type: ignore[untyped-decorator]
    async def recommend(stream: Any) -> None:
        async for value in stream:
            click = decode_click(value)
            history = users.setdefault(click.user_id, [])
            history.append(int(click.item_id.removeprefix("item-")) % len(vectors))
            rows, distances = index.knn_query(vectors[history[-HISTORY:]].mean(axis=0), K)
            items = [
                {"item_id": f"item-{row:07d}", "score": 1 - float(distance)}
                for row, distance in zip(rows[0], distances[0], strict=True)
            ]
            answer = {"user_id": click.user_id, "event_id": click.event_id, "items": items}
            await lists.send(key=click.user_id, value=msgspec.json.encode(answer))

    print("ready", flush=True)
    execute(app)


if __name__ == "__main__":
    main(*sys.argv[1:])
