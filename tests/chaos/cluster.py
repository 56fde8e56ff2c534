"""Three brokers on loopback, each a controller too; who of them holds which office, and whether all are in sync."""

import contextlib
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

import kafka

from stream.broker import LocalBroker
from stream.connection import Connection
from stream.kraft import cluster_id
from stream.ports import free_port
from workers.settings import Settings

NODES = (1, 2, 3)
# Without its second compiler a node starts in 4 s of a core where it took 8, format included.
JAVA = ("-Xmx256m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
INTERNAL = ("offsets.topic", "transaction.state.log", "share.coordinator.state.topic")


class Cluster:
    """`nodes` by id; a context manager. Each node ends with this process, as LocalBroker does.

    Kafka's own topics have three replicas of which two must be in sync. For ours the brokers' defaults stay Apache's,
    one and one: what we get of more is Upwell's doing.
    """

    def __init__(self, folder: Path) -> None:
        ports, controllers, cluster = {n: free_port() for n in NODES}, {n: free_port() for n in NODES}, cluster_id()
        common: dict[str, object] = {
            "controller.quorum.voters": ",".join(f"{n}@127.0.0.1:{port}" for n, port in controllers.items()),
            **{f"{topic}.replication.factor": 3 for topic in INTERNAL},
            **{f"{topic}.min.isr": 2 for topic in INTERNAL if topic != "offsets.topic"},
        }
        self.nodes = {
            n: LocalBroker(
                folder / f"kafka-{n}",
                ports[n],
                java=JAVA,
                cluster=cluster,
                settings=common
                | {
                    "node.id": n,
                    "listeners": f"PLAINTEXT://127.0.0.1:{ports[n]},CONTROLLER://127.0.0.1:{controllers[n]}",
                },
            )
            for n in NODES
        }
        self.connection = Connection(",".join(f"127.0.0.1:{port}" for port in ports.values()))

    def start(self, *nodes: int) -> None:
        """At once: one alone has no quorum to come up in."""
        with ThreadPoolExecutor(len(NODES)) as pool:
            list(pool.map(lambda n: self.nodes[n].start(), nodes))

    def stop(self, node: int) -> None:
        """SIGTERM: it hands its partitions over first."""
        self.nodes[node].stop()

    def kill(self, node: int) -> None:
        """SIGKILL."""
        pid = self.nodes[node].pid
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        self.nodes[node].stop()

    def __enter__(self) -> Self:
        try:
            self.start(*NODES)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in NODES:  # nothing is to be kept, and the last one would wait for its quorum
            self.kill(node)

    @contextlib.contextmanager
    def admin(self) -> Iterator[kafka.KafkaAdminClient]:
        with kafka.KafkaAdminClient(**self.connection.kafka_python()) as admin:
            yield admin

    def whole(self) -> bool:
        """Every replica of every partition, Kafka's own among them, is in sync."""
        with contextlib.suppress(kafka.errors.KafkaError), self.admin() as admin:
            parts = [part for topic in admin.describe_topics() for part in topic["partitions"]]
            return all(set(part["isr_nodes"]) == set(part["replica_nodes"]) == set(NODES) for part in parts)
        return False

    def leader(self, topic: str) -> int:
        """Of its first partition."""
        with self.admin() as admin:
            (found,) = admin.describe_topics([topic])
        return int(found["partitions"][0]["leader_id"])

    def offices(self, settings: Settings) -> dict[str, int]:
        """Office -> the node that holds it now."""
        topics, group = settings.topics, settings.group
        with self.admin() as admin:
            groups = [n for n in NODES if any(found["group_id"] == group for found in admin.list_groups([n]))]
            transactional_id = f"{topics.users.name}-0"
            writer = admin.describe_transactions([transactional_id])[transactional_id]
            quorum = admin.describe_metadata_quorum()
        return {
            "leader of clicks": self.leader(topics.clicks.name),
            "group coordinator": groups[0],
            "transaction coordinator": writer.coordinator_id,
            "leader of users": self.leader(topics.users.name),
            "controller": quorum["topics"][0]["partitions"][0]["leader_id"],
        }
