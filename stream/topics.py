"""The topics: one table, and its creation on a cluster."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import kafka
from kafka.admin import ConfigResource

from stream.connection import Connection
from stream.events import MAX_ITEM_BYTES

DAY_MS = 24 * 60 * 60 * 1000
MIB = 1024 * 1024
ALREADY_EXISTS = 36  # Kafka's error code TOPIC_ALREADY_EXISTS
MIN_ISR = "min.insync.replicas"
BY_USER = ("clicks", "users", "recommendations")  # have as many partitions as kafka.partitions says
SAFE = 3  # brokers: from there on one can be lost with neither writes nor data


@dataclass(frozen=True)
class Topic:
    """One topic; compacted: the newest record a key is kept, for `retention_ms` or (None) without end.

    lag_ms: how much longer Kafka may hold what retention or a tombstone has ended: it deletes whole segments and
    compacts closed ones, and keeps a tombstone as long again for readers that were behind.
    replicas: of each partition, all but one of which must have a write before it counts; None: both as the cluster's
    defaults say.
    """

    name: str
    about: str
    partitions: int
    retention_ms: int | None
    compacted: bool = False
    lag_ms: int = DAY_MS
    max_message_bytes: int = MAX_ITEM_BYTES + MIB // 16  # of a batch: keys, headers and framing on top
    replicas: int | None = None

    @property
    def cleanup(self) -> list[str]:
        """Kafka's cleanup.policy."""
        return [*(["compact"] if self.compacted else []), *([] if self.retention_ms is None else ["delete"])]

    def config(self) -> dict[str, str]:
        """Kafka's topic settings, by their own names."""
        settings: dict[str, object] = {
            "cleanup.policy": ",".join(self.cleanup),
            "retention.ms": -1 if self.retention_ms is None else self.retention_ms,
            "segment.ms": self.lag_ms,
            "max.message.bytes": self.max_message_bytes,
            # The broker's clock: a stamp of the producer's could make a replayed old click expire at once.
            "message.timestamp.type": "LogAppendTime",
        }
        if self.compacted:
            # The open segment is never compacted: small ones keep the read at start-up short, and the lag
            # bounds how long an erased user's record survives its tombstone.
            settings |= {"segment.bytes": 64 * MIB, "min.cleanable.dirty.ratio": 0.2}
            settings |= {"max.compaction.lag.ms": self.lag_ms, "delete.retention.ms": self.lag_ms}
        if self.replicas is not None:
            settings[MIN_ISR] = max(1, self.replicas - 1)  # so one broker may be lost, and neither writes nor data are
        return {key: str(value) for key, value in settings.items()}


class Topics:
    """All topics of one installation.

    prefix: the installation's name; partitions: of every topic keyed by user, the bound on the number of
    workers; clicks_days: how far back a trainer can replay, and how long an erased user's id is still on a disk;
    replicas: Topic's.
    """

    def __init__(
        self, prefix: str = "upwell", partitions: int = 8, clicks_days: float = 30, replicas: int | None = None
    ) -> None:
        if partitions < 1:
            raise ValueError(f"partitions: {partitions}, at least 1")
        clicks_ms = int(clicks_days * DAY_MS)

        lag_ms = min(DAY_MS, clicks_ms // 10)

        def topic(
            name: str, about: str, parts: int, retention_ms: int | None = None, compacted: bool = False, **rest: int
        ) -> Topic:
            compacted = compacted or retention_ms is None
            return Topic(f"{prefix}.{name}", about, parts, retention_ms, compacted, lag_ms, replicas=replicas, **rest)

        self.prefix = prefix
        self.clicks = topic(
            "clicks",
            "What users do, and their wish to be erased, keyed by user: one user, one partition, one order. "
            "The partition is murmur2 of the key, as Kafka's Java client has it (librdkafka: "
            "`partitioner=murmur2_random`); of transactions what is committed is read.",
            partitions,
            clicks_ms,
        )
        self.items = topic("items", "The catalogue, keyed by item; a null value removes the item.", min(partitions, 4))
        self.vectors = topic(
            "vectors", "Text vectors of the items, keyed by item, made by the indexer.", min(partitions, 4)
        )
        self.users = topic(
            "users",
            "State of each user, keyed and partitioned like the clicks: the changelog of the workers.",
            partitions,
        )
        self.recommendations = topic(
            "recommendations",
            "Fresh recommendations, keyed by user; a null value: the user is erased, forget the lists you hold.",
            partitions,
            min(DAY_MS, clicks_ms),
        )
        self.models = topic("models", "Trained models, announced by the trainer.", 1)
        self.generations = topic("generations", "Published generations, announced by the indexer.", 1)
        self.dead_letters = topic(
            "dead-letters",
            "Messages that could not be applied, with their cause and their bytes, keyed by their place; a null value: "
            "the user that it was of is erased.",
            1,
            clicks_ms,
            compacted=True,
            max_message_bytes=2 * MIB,  # the refused message itself, a third larger in base64
        )

    def all(self) -> tuple[Topic, ...]:
        return tuple(value for value in vars(self).values() if isinstance(value, Topic))


class WrongTopic(ValueError):
    """A topic on the cluster is not as the settings say; the text names it and what to do."""


class Found(NamedTuple):
    """One topic on the cluster; partitions 0: it is not there."""

    topic: Topic
    partitions: int
    replicas: int  # of the partition that has the fewest
    min_isr: int  # min.insync.replicas; 0: not ours to read
    brokers: int  # of the cluster
    out_of_sync: int  # partitions of which a replica is behind
    differing: dict[str, tuple[str, str]] | None  # setting -> as it is, as it should be; None: not ours to read

    def faults(self) -> Iterator[str]:
        """What is not as it should be."""
        if not self.partitions:
            yield "missing"
            return
        if self.partitions != self.topic.partitions:
            yield f"{self.partitions} partitions, the settings say {self.topic.partitions}"
        if self.topic.replicas not in (None, self.replicas):
            yield f"{self.replicas} replicas, the settings say {self.topic.replicas}"
        if self.brokers >= SAFE and self.min_isr and not 1 < self.min_isr < self.replicas:
            loss = "what it has acknowledged is lost" if self.min_isr == 1 else "nothing can be written"
            yield f"{self.replicas} replicas with {MIN_ISR} {self.min_isr}: without one broker {loss}"
        if self.out_of_sync:
            yield f"{self.out_of_sync} partitions with a replica that is behind"
        for name, (found, wanted) in (self.differing or {}).items():
            yield f"{name} is {found}, should be {wanted}"


def describe(topics: Topics, connection: Connection) -> list[Found]:
    """All topics as they are. Raises KafkaError."""
    with kafka.KafkaAdminClient(**connection.kafka_python()) as admin:
        return _describe(admin, topics, set(admin.list_topics()), len(admin.describe_cluster()["brokers"]))


def ensure(topics: Topics, connection: Connection) -> None:
    """Creates what is missing and waits until it can be used; safe to run from several processes at once.

    Raises WrongTopic for one that exists with another number of partitions, cleanup policy or clock.
    """
    names = {topic.name for topic in topics.all()}
    with kafka.KafkaAdminClient(**connection.kafka_python()) as admin:
        missing = names - set(admin.list_topics())
        if missing:
            _create([topic for topic in topics.all() if topic.name in missing], admin)
        admin.wait_for_topics(list(names), timeout_ms=30_000)
        for found in _describe(admin, topics, names):
            topic = found.topic
            check_partitions(topic, found.partitions)
            differing = _differing(found)
            for key in ("cleanup.policy", "message.timestamp.type"):  # the second: windows go by the broker's clock
                if key in differing:
                    value, wanted = differing[key]
                    raise WrongTopic(
                        f"{topic.name} is '{value}', it has to be '{wanted}': `upwell topics fix` makes it so"
                    )


def fix(topics: Topics, connection: Connection) -> list[str]:
    """Create what is missing, set what differs but partitions and replicas; a sentence for each change.

    Raises KafkaError, and WrongTopic before anything is changed.
    """
    found = describe(topics, connection)
    missing, changes = [each.topic for each in found if not each.partitions], dict[str, dict[str, str]]()
    for each in found:
        if each.partitions:
            check_partitions(each.topic, each.partitions)
            _check_replicas(each)
            changes[each.topic.name] = {key: wanted for key, (_, wanted) in _differing(each).items()}
    resources = [ConfigResource("TOPIC", name, configs) for name, configs in changes.items() if configs]
    with kafka.KafkaAdminClient(**connection.kafka_python()) as admin:
        if missing:
            _create(missing, admin)
            admin.wait_for_topics([topic.name for topic in missing], timeout_ms=30_000)
        if resources:  # not looked at afterwards: the controller answers before each broker has taken them over
            admin.alter_configs(resources)
    created = [f"{topic.name}: created" for topic in missing]
    return created + [f"{name}: {key} = {value}" for name, configs in changes.items() for key, value in configs.items()]


def delete(topics: Topics, connection: Connection) -> None:
    """Raises KafkaError."""
    with kafka.KafkaAdminClient(**connection.kafka_python()) as admin:
        admin.delete_topics([topic.name for topic in topics.all()])


def check_partitions(topic: Topic, found: int) -> None:
    """Raises WrongTopic. The number is never changed: users would move to other partitions, away from their states."""
    if found == topic.partitions:
        return
    if topic.name.rpartition(".")[2] in BY_USER:
        raise WrongTopic(
            f"{topic.name} has {found} partitions, the settings say {topic.partitions}: set kafka.partitions to what "
            "is there, or `upwell export`, start under a new kafka.prefix, and `upwell import`"
        )
    raise WrongTopic(
        f"{topic.name} has {found} partitions, it has to have {topic.partitions}: delete it, with what it holds, and "
        f"run `upwell topics`, or create it with {topic.partitions}"
    )


def _differing(found: Found) -> dict[str, tuple[str, str]]:
    """Raises WrongTopic."""
    if found.differing is None:
        raise WrongTopic(f"{found.topic.name}: this login may not read its settings: it needs DescribeConfigs")
    return found.differing


def _check_replicas(found: Found) -> None:
    """Raises WrongTopic for fewer than the settings say: with more of them to wait for than there are, writes end."""
    if found.replicas < (found.topic.replicas or 1):
        raise WrongTopic(
            f"{found.topic.name} has {found.replicas} replicas, the settings say {found.topic.replicas}: add them with "
            "Kafka's kafka-reassign-partitions, or set kafka.replicas to what is there"
        )


def _describe(admin: kafka.KafkaAdminClient, topics: Topics, there: set[str], brokers: int = 0) -> list[Found]:
    names = [topic.name for topic in topics.all() if topic.name in there]
    parts = {found["name"]: found["partitions"] for found in admin.describe_topics(names)} if names else {}
    resources = [ConfigResource("TOPIC", name) for name in names]
    configs = admin.describe_configs(resources, config_filter="all")["topic"] if names else {}
    return [_found(topic, parts.get(topic.name, []), configs.get(topic.name, {}), brokers) for topic in topics.all()]


def _found(topic: Topic, partitions: list[dict[str, Any]], config: dict[str, dict[str, str]], brokers: int) -> Found:
    differing = {
        key: (value, wanted)
        for key, wanted in topic.config().items()
        if key in config and set((value := config[key]["value"]).split(",")) != set(wanted.split(","))
    }
    return Found(
        topic,
        len(partitions),
        min((len(part["replica_nodes"]) for part in partitions), default=0),
        int(config.get(MIN_ISR, {}).get("value", 0)),
        brokers,
        sum(len(part["isr_nodes"]) < len(part["replica_nodes"]) for part in partitions),
        differing if config else None,  # kafka-python passes over a refusal
    )


def _create(topics: list[Topic], admin: kafka.KafkaAdminClient) -> None:
    wanted = {
        topic.name: {
            "num_partitions": topic.partitions,
            "replication_factor": -1 if topic.replicas is None else topic.replicas,  # -1: the cluster's default
            "configs": topic.config(),
        }
        for topic in topics
    }
    for result in admin.create_topics(wanted, raise_errors=False)["topics"]:
        if result["error_code"] not in (0, ALREADY_EXISTS):
            raise kafka.errors.for_code(result["error_code"])(f"{result['name']}: {result['error_message']}")
