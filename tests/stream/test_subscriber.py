import kafka

from stream.connection import Connection
from stream.events import OFFSET_HEADER, Ranked, Recommendations, encode
from stream.subscriber import Subscriber
from stream.topics import Topics


def recommendation(user: str, offset: int = 1) -> Recommendations:
    return Recommendations(
        user_id=user,
        items=[Ranked("a", 0.5)],
        generation="g",
        source="personal",
        partition=0,
        offset=offset,
        event_id="e",
        clicked_ms=1,
        sent_ms=2,
    )


def test_from_now_and_from_the_beginning(connection: Connection, topics: Topics) -> None:
    producer = kafka.KafkaProducer(**connection.kafka_python())

    def send(user: str) -> None:
        producer.send(topics.recommendations.name, encode(recommendation(user)), user.encode()).get(5)

    send("before")
    with Subscriber(connection, topics) as now, Subscriber(connection, topics, from_beginning=True) as all_of_it:
        send("after")  # before the first poll: "now" is when the subscriber was made
        assert next(iter(now)) == recommendation("after")
        seen = iter(all_of_it)
        assert {next(seen).user_id, next(seen).user_id} == {"before", "after"}
    producer.close()


def test_what_cannot_be_read_takes_nothing_along(connection: Connection, topics: Topics) -> None:
    """A list of a later release between two of ours, and an erasure behind it, in one poll."""
    erased: list[str] = []
    later = encode(recommendation("u")).replace(b'"version":1', b'"version":2')
    producer = kafka.KafkaProducer(**connection.kafka_python())
    for key, value in ((b"a", encode(recommendation("a"))), (b"u", later), (b"gone", None), (b"\xff", None),
                       (b"b", encode(recommendation("b")))):  # fmt: skip
        producer.send(topics.recommendations.name, value, key, partition=0).get(5)
    with Subscriber(connection, topics, from_beginning=True, on_erased=erased.append) as subscriber:
        seen = list[str]()
        while len(seen) < 2:
            seen += [answer.user_id for answer in subscriber.poll()]
    assert (seen, erased) == (["a", "b"], ["gone"])
    producer.close()


def test_of_an_erased_user_no_list_from_before_the_wish_follows(connection: Connection, topics: Topics) -> None:
    """A worker that is behind still sends them between the null of who asks and its own."""
    erased: list[str] = []
    producer = kafka.KafkaProducer(**connection.kafka_python())

    def send(value: bytes | None, wish: int | None = None) -> None:
        headers = [] if wish is None else [(OFFSET_HEADER, b"%d" % wish)]
        producer.send(topics.recommendations.name, value, b"u", headers=headers, partition=0).get(5)

    for wish in (7, 9):  # asked twice
        send(None, wish)
    for offset, wish in ((5, 7), (8, 9)):  # the list of a click before the wish, and the worker's null
        send(encode(recommendation("u", offset)))
        send(None, wish)
    send(encode(recommendation("u", 12)))
    with Subscriber(connection, topics, from_beginning=True, on_erased=erased.append) as subscriber:
        seen = list[int]()
        while 12 not in seen:
            seen += [answer.offset for answer in subscriber.poll()]
        assert (seen, erased, subscriber._erased) == ([12], ["u"] * 4, {})
    producer.close()
