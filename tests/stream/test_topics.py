import secrets
from concurrent.futures import ThreadPoolExecutor

import kafka
import pytest
from kafka.admin import ConfigResource

from stream.connection import Connection
from stream.topics import DAY_MS, MIN_ISR, Found, Topic, Topics, WrongTopic, check_partitions, describe, ensure, fix


def test_the_cluster_has_what_the_table_says(connection: Connection, topics: Topics) -> None:
    with kafka.KafkaAdminClient(**connection.kafka_python()) as admin:
        for topic in topics.all():
            (found,) = admin.describe_topics([topic.name])
            assert len(found["partitions"]) == topic.partitions
            configs = admin.describe_configs([ConfigResource("TOPIC", topic.name)], config_filter="all")
            settings = {key: entry["value"] for key, entry in configs["topic"][topic.name].items()}
            assert topic.config().items() <= settings.items()


def test_users_and_clicks_share_their_partitions() -> None:
    topics = Topics("x", partitions=5)
    assert topics.users.partitions == topics.clicks.partitions == 5
    assert [t.name for t in topics.all() if t.compacted] == [
        "x.items", "x.vectors", "x.users", "x.models", "x.generations", "x.dead-letters",
    ]  # fmt: skip
    assert topics.clicks.config()["retention.ms"] == str(30 * 24 * 3600 * 1000)
    assert all(t.config()["retention.ms"] == "-1" for t in topics.all() if t.cleanup == ["compact"])
    assert all(topic.about.endswith(".") for topic in topics.all())


def test_nothing_of_a_user_is_kept_for_longer_than_the_window() -> None:
    """Retention of what is deleted, and the four steps of a tombstone in what is compacted without end.

    Lists, each with ids of what its user did, are kept for a day at most: a server reads them all at its start.
    """
    for days in (30.0, 1.0, 0.001):
        window_ms = days * 24 * 3600 * 1000
        topics = Topics("x", clicks_days=days)
        for topic in (topics.clicks, topics.recommendations, topics.dead_letters, topics.users):
            config = topic.config()
            if "delete" in topic.cleanup:
                at_most = DAY_MS if topic is topics.recommendations else window_ms
                assert int(config["retention.ms"]) == min(at_most, window_ms)
            else:
                steps = ("segment.ms", "max.compaction.lag.ms", "max.compaction.lag.ms", "delete.retention.ms")
                assert sum(int(config[step]) for step in steps) <= window_ms / 2
            assert int(config["segment.ms"]) <= window_ms / 10


def test_ensure_from_several_processes_at_once(connection: Connection) -> None:
    topics = Topics(f"t{secrets.token_hex(4)}", partitions=2)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(ensure, topics, connection) for _ in range(4)]:
            done.result()


def test_another_partition_count_is_refused_by_name(connection: Connection, topics: Topics) -> None:
    with pytest.raises(WrongTopic, match=rf"{topics.prefix}\.clicks has 3 partitions, the settings say 4"):
        ensure(Topics(topics.prefix, partitions=4), connection)


@pytest.mark.parametrize("kind", [name for name, value in vars(Topics()).items() if isinstance(value, Topic)])
def test_the_way_out_is_one_that_leads_out(kind: str) -> None:
    """kafka.partitions says nothing of the number of models, dead letters or (above four) items."""
    topic = getattr(Topics("x", partitions=8), kind)
    with pytest.raises(WrongTopic, match=rf"x\.\S+ has 9 partitions, .* {topic.partitions}: ") as refused:
        check_partitions(topic, 9)
    assert ("set kafka.partitions" in str(refused.value)) == (kind in ("clicks", "users", "recommendations"))


def test_one_broker_may_be_lost(connection: Connection) -> None:
    """With three replicas writes wait for two: `tests/chaos/test_cluster.py` makes them on three brokers."""
    for replicas, least in ((1, "1"), (2, "1"), (3, "2"), (5, "4")):
        assert all(topic.config()[MIN_ISR] == least for topic in Topics("x", replicas=replicas).all())
    assert not any(MIN_ISR in topic.config() for topic in Topics("x").all())  # the cluster's
    alone = Topics(f"t{secrets.token_hex(4)}", partitions=1, replicas=1)
    ensure(alone, connection)
    for found in describe(alone, connection):
        assert (found.replicas, found.min_isr, found.brokers, [*found.faults()]) == (1, 1, 1, [])
    with pytest.raises(kafka.errors.InvalidReplicationFactorError):
        ensure(Topics(f"t{secrets.token_hex(4)}", partitions=1, replicas=3), connection)


def test_more_replicas_to_wait_for_than_there_are_is_refused(connection: Connection, topics: Topics) -> None:
    with pytest.raises(WrongTopic, match=rf"{topics.prefix}\.\S+ has 1 replicas, the settings say 3"):
        fix(Topics(topics.prefix, topics.clicks.partitions, replicas=3), connection)
    assert {found.min_isr for found in describe(topics, connection)} == {1}


@pytest.mark.parametrize(
    ("brokers", "replicas", "min_isr", "fault"),
    [
        (3, 3, 2, None),
        (5, 3, 2, None),
        (1, 1, 1, None),
        (3, 3, 0, None),  # a login that may not read it
        (3, 1, 1, "1 replicas with min.insync.replicas 1: without one broker what it has acknowledged is lost"),
        (3, 3, 1, "3 replicas with min.insync.replicas 1: without one broker what it has acknowledged is lost"),
        (3, 3, 3, "3 replicas with min.insync.replicas 3: without one broker nothing can be written"),
    ],
)
def test_topics_that_do_not_outlive_a_broker(brokers: int, replicas: int, min_isr: int, fault: str | None) -> None:
    clicks = Topics("x").clicks
    found = Found(clicks, clicks.partitions, replicas, min_isr, brokers, out_of_sync=0, differing={})
    assert [*found.faults()] == ([fault] if fault else [])


def test_another_clock_is_refused_by_name(connection: Connection) -> None:
    """A producer's stamps would move the windows, and which clicks are taken."""
    topics = Topics(f"t{secrets.token_hex(4)}", partitions=2)
    with kafka.KafkaAdminClient(**connection.kafka_python()) as admin:
        admin.create_topics({topics.clicks.name: {"num_partitions": 2, "configs": {}}})
    with pytest.raises(WrongTopic, match=rf"{topics.prefix}\.clicks is 'CreateTime', it has to be 'LogAppendTime'"):
        ensure(topics, connection)


def test_another_cleanup_policy_is_refused_by_name(connection: Connection) -> None:
    topics = Topics(f"t{secrets.token_hex(4)}", partitions=2)
    with kafka.KafkaAdminClient(**connection.kafka_python()) as admin:
        admin.create_topics({topics.users.name: {"num_partitions": 2, "configs": {"cleanup.policy": "delete"}}})
    with pytest.raises(WrongTopic, match=rf"{topics.prefix}\.users is 'delete', it has to be 'compact'"):
        ensure(topics, connection)


def test_a_login_that_may_not_read_the_settings(
    connection: Connection, topics: Topics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kafka-python passes over the refusal: a role must not start on topics that nobody has looked at."""
    monkeypatch.setattr(kafka.KafkaAdminClient, "describe_configs", lambda *_, **__: {"topic": {}})
    assert not [fault for found in describe(topics, connection) for fault in found.faults()]
    with pytest.raises(WrongTopic, match="DescribeConfigs"):
        ensure(topics, connection)
