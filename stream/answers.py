"""What the HTTP routes take and give: the bodies, with their bounds and, for OpenAPI, their meaning."""

from typing import Annotated, Any

from msgspec import Meta, Struct

from stream.events import EventType, Id, Item, Source

MAX_K = 200
Share = Annotated[float, Meta(ge=0, le=1)]
Ids = Annotated[list[Id], Meta(max_length=1000)]
Moment = Annotated[  # narrower than on the wire: seconds would be January 1970, a click of which moves no list
    int,
    Meta(ge=4 * 10**9, lt=2**53, description="milliseconds since the epoch, UTC; a smaller number would be seconds"),
]


class Wishes(Struct, kw_only=True, forbid_unknown_fields=True):
    """What may stand in a list, and how it is chosen."""

    k: Annotated[int, Meta(ge=1, le=MAX_K, description="items wanted; fewer come only where fewer are eligible")] = 20
    categories: Annotated[Ids, Meta(description="only items in one of these; none: any")] = []
    exclude: Annotated[Ids, Meta(description="item ids that must not come")] = []
    exclude_seen: Annotated[bool, Meta(description="no item that the user has had an event with")] = True
    available_only: Annotated[bool, Meta(description="no item whose `available` is false")] = True
    max_age: (
        Annotated[int, Meta(ge=0, le=10**10, description="seconds since the item's `published_ms`, at most")] | None
    ) = None
    diversity: Annotated[Share, Meta(description="0: the best items; 1: the most different ones")] | None = None
    explore: (
        Annotated[Share, Meta(description="share of the places that are drawn at random; see `propensity`")] | None
    ) = None
    explain: Annotated[bool, Meta(description="say which clicks speak for each item")] = False


class Visit(Struct, kw_only=True, forbid_unknown_fields=True):
    """One event of a guest."""

    item_id: Id
    event_type: EventType = "click"
    value: float | None = None
    ts_ms: Moment | None = None


class Guest(Wishes, kw_only=True, forbid_unknown_fields=True):
    """Nobody that is known: what is said here makes the list, and is not kept."""

    history: Annotated[list[Visit], Meta(max_length=1000, description="oldest first")] = []
    items: Annotated[Ids, Meta(description="items to start from, each as one click now")] = []
    text: Annotated[str, Meta(max_length=8000, description="what is wanted, in words; stands alone")] = ""


class Reason(Struct):
    """A click of the user's that speaks for an item, and its share in that."""

    item_id: str
    title: str
    share: Annotated[float, Meta(description="of `explained`; the shares of an item add up to 1 over all its clicks")]


class RankedItem(Struct):
    """One place in a list."""

    item_id: str
    score: float
    title: str
    propensity: Annotated[float, Meta(description="the chance with which the item was in this list")] = 1.0
    because: list[Reason] = []
    explained: Annotated[
        float, Meta(description="part of what speaks for the item that `because` divides; the rest is not by click")
    ] = 0.0


class AsOf(Struct):
    """The newest click behind an answer: its place in the clicks topic (offset -1: none)."""

    partition: int
    offset: int


class Answer(Struct, kw_only=True):
    """A list of recommendations and what it rests on."""

    user_id: str | None
    items: list[RankedItem]
    generation: str
    source: Source
    fallback: Annotated[str | None, Meta(description="why the list is not personal, where it should be")] = None
    as_of: AsOf | None
    age_ms: Annotated[int | None, Meta(description="since Kafka took the user's newest state; null: there is none")]
    stale: Annotated[bool, Meta(description="min_offset was not reached in time, or Kafka is out of reach")] = False
    arm: str = "default"


class Similar(Struct):
    """What goes with an item, itself left out."""

    item_id: str
    items: list[RankedItem]
    generation: str


class ItemOut(Struct):
    """What is shown of an item of the catalogue."""

    item_id: str
    title: str
    categories: list[str]
    available: bool


class ItemsOut(Struct):
    """The items that have the words asked for."""

    items: list[ItemOut]


class Past(Struct):
    """One event of a user's history; `ts_ms` is the event's own, since the epoch."""

    item_id: str
    title: str
    weight: Annotated[float, Meta(description="how much the event says about taste; negative: against the item")]
    ts_ms: int


class UserOut(Struct, kw_only=True):
    """What is kept of a user, newest first."""

    user_id: str
    clicks: Annotated[int, Meta(description="events applied")]
    seen: Annotated[int, Meta(description="different items that are remembered, worker.seen at most")]
    history: list[Past]
    as_of: AsOf
    arm: str


class Erased(Struct, kw_only=True):
    """A user's wish to be erased, and how far it has come."""

    receipt: str
    partition: int
    offset: int
    requested_ms: Annotated[int | None, Meta(description="since the epoch; null: no longer known")]
    cleared: Annotated[bool, Meta(description="state, seen items, lists and dead letters are gone")] = False
    gone: Annotated[bool, Meta(description="the wish and all before it have left Kafka, too")] = False
    gone_by_ms: Annotated[
        int | None,
        Meta(
            description="gone by then at the latest, as the topics are set now; the trainer leaves the user out long "
            "before. null: gone, or a topic is kept without end"
        ),
    ] = None


class Rejected(Struct):
    """An entry that no reader could use, and why."""

    index: Annotated[int, Meta(description="position in the request, from 0")]
    cause: str


class Delivered(Struct, omit_defaults=True):
    """Where an entry lies in Kafka; an event's `offset` is what `min_offset` takes."""

    index: int
    partition: int
    offset: int
    event_id: str | None = None
    item_id: str | None = None


class Receipt(Struct):
    """What has become of each entry. `results` lie in Kafka; `rejected` ones never will."""

    accepted: int
    rejected: list[Rejected]
    results: list[Delivered]


class EventIn(Struct, kw_only=True, forbid_unknown_fields=True):
    """A click as it comes over HTTP. Give `event_id` yourself to make sending it again harmless."""

    user_id: Id
    item_id: Id
    event_type: EventType = "click"
    event_id: Id | None = None
    ts_ms: Moment | None = None
    value: float | None = None
    context: dict[str, str] = {}


class ItemIn(Item, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An item as it comes over HTTP: here a misspelt field is refused. What else you know goes into `attributes`."""

    published_ms: Moment | None = None


class Path(Struct):
    """A click's way, each moment in ms since the epoch. Clocks: Kafka's (clicked, published), the worker's (updated,
    sent), this server's."""

    event_id: str
    partition: int
    offset: int
    clicked_ms: Annotated[int, Meta(description="Kafka took the click")]
    sent_ms: Annotated[int, Meta(description="the worker had vector and list, and sent it")]
    published_ms: Annotated[int, Meta(description="Kafka took the list")]
    seen_ms: Annotated[int, Meta(description="this server read it")]
    pushed_ms: int
    updated_ms: Annotated[
        int | None,
        Meta(description="the worker had the click in the user's state; null: its release says nothing of it"),
    ] = None
    traceparent: Annotated[str | None, Meta(description="of the click's trace (W3C), where it brought one")] = None


class Update(Answer, kw_only=True):
    """A list as it is pushed; `path` is null where no click made it: at the start, after a swap."""

    path: Path | None = None


class Ticket(Struct):
    """The right to open one user's stream for a minute, without a key."""

    ticket: Annotated[str, Meta(description="for /v1/stream; empty where no key is needed")]
    until_ms: Annotated[int, Meta(description="the stream can be opened until then; an open one stays open")]


class Status(Struct):
    """What a stream says when there is no list to send, and when Kafka comes or goes."""

    connected: Annotated[bool, Meta(description="to Kafka")]
    generation: str | None


class GenerationFigures(Struct):
    """What this server serves, since when (ms since the epoch), and the loads since its start."""

    name: str | None
    created_ms: int | None
    items: int
    swaps: int


class Latency(Struct):
    """From Kafka's stamp of a click to the worker's of its list, in ms; null before the first."""

    p50: float | None
    p99: float | None


class HitRate(Struct):
    """Live HR@10, from 0 to 1: of what was served, and of decayed popularity on the same clicks."""

    served: float | None
    popularity: float | None


class Figures(Struct):
    """For charts. `hit_rate` is the worker's, null where its exporter is not on this machine."""

    now_ms: int
    generation: GenerationFigures
    events_total: Annotated[int, Meta(description="events applied, in all states")]
    click_to_recommendation_ms: Annotated[Latency, Meta(description="of the newest 1,000 lists")]
    hit_rate: HitRate
    streams: Annotated[int, Meta(description="open here")]


class Problem(Struct, omit_defaults=True):
    """What is wrong, by name."""

    status_code: int
    detail: str
    extra: Annotated[
        dict[str, Any] | None, Meta(description="where all entries are rejected: `rejected`, as in a Receipt")
    ] = None
