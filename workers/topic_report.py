"""`upwell topics describe` and `fix`: the topics as they are beside the topics as they should be."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import kafka
from kafka.admin import ConfigResource

from stream.topics import Topic, check_partitions, ensure
from workers.settings import Settings


class Found(NamedTuple):
    """One topic on the cluster; partitions 0: it is not there."""

    topic: Topic
    partitions: int
    replicas: int  # of the partition that has the fewest
    out_of_sync: int  # partitions of which a replica is behind
    differing: dict[str, tuple[str, str]]  # setting -> as it is, as it should be

    def faults(self) -> Iterator[str]:
        """What is not as it should be."""
        if not self.partitions:
            yield "missing"
            return
        if self.partitions != self.topic.partitions:
            yield f"{self.partitions} partitions, the settings say {self.topic.partitions}"
        if self.out_of_sync:
            yield f"{self.out_of_sync} partitions with a replica that is behind"
        for name, (found, wanted) in self.differing.items():
            yield f"{name} is {found}, should be {wanted}"


def describe(settings: Settings) -> list[Found]:
    """Raises KafkaError."""
    table = {topic.name: topic for topic in settings.topics.all()}
    with kafka.KafkaAdminClient(**settings.connection.kafka_python()) as admin:
        there = [name for name in table if name in set(admin.list_topics())]
        parts = {found["name"]: found["partitions"] for found in admin.describe_topics(there)} if there else {}
        resources = [ConfigResource("TOPIC", name) for name in there]
        configs = admin.describe_configs(resources, config_filter="all")["topic"] if there else {}
    return [_found(topic, parts.get(name, []), configs.get(name, {})) for name, topic in table.items()]


def _found(topic: Topic, partitions: list[dict[str, Any]], config: dict[str, dict[str, str]]) -> Found:
    return Found(
        topic,
        len(partitions),
        min((len(part["replica_nodes"]) for part in partitions), default=0),
        sum(len(part["isr_nodes"]) < len(part["replica_nodes"]) for part in partitions),
        {
            name: (config[name]["value"], wanted)
            for name, wanted in topic.config().items()
            if config and set(config[name]["value"].split(",")) != set(wanted.split(","))
        },
    )


def fix(settings: Settings) -> list[str]:
    """Create what is missing, set what differs but the partitions; a sentence for each change.

    Raises KafkaError, and WrongTopic before anything is changed.
    """
    found = describe(settings)
    for each in found:
        if each.partitions:
            check_partitions(each.topic, each.partitions)
    changes = {each.topic.name: {name: pair[1] for name, pair in each.differing.items()} for each in found}
    resources = [ConfigResource("TOPIC", name, configs) for name, configs in changes.items() if configs]
    if resources:
        with kafka.KafkaAdminClient(**settings.connection.kafka_python()) as admin:
            admin.alter_configs(resources)
    ensure(settings.topics, settings.connection)
    created = [f"{each.topic.name}: created" for each in found if not each.partitions]
    return created + [f"{name}: {key} = {value}" for name, configs in changes.items() for key, value in configs.items()]
