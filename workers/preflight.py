"""Does Kafka let us in? Asked once before a role or a command starts, because both client libraries retry in silence.

A broker that is away is no bad configuration: a role goes on, ends by itself and is restarted. One that answers and
refuses us would refuse it each time.
"""

import asyncio
import ssl
import time
from typing import Any

import kafka
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaError, SaslAuthenticationFailed

from stream.connection import Connection
from stream.topics import check_partitions
from workers.settings import ConfigError, Settings

ANSWER_S = 5.0  # for a broker that closes connections: it may be starting or stopping


def check_access(connection: Connection) -> bool:
    """Whether a bootstrap server answers. Raises ConfigError, a line an address, where TLS or the login fails at one
    and no other answers."""
    try:
        options = connection.kafka_python()
    except OSError as error:
        raise ConfigError(f"kafka.ca_file, kafka.cert_file, kafka.key_file: {error}") from error
    refused = []
    for address in options.pop("bootstrap_servers"):
        try:
            if asyncio.run(_knock(address, options)):
                return True
        except ConfigError as error:
            refused.append(error)
    if refused:
        raise ConfigError("\n".join(map(str, refused))) from refused[0]
    return False


def check_keyed(settings: Settings) -> None:
    """Raises WrongTopic where a topic keyed by user has another number of partitions than the settings say, be it that
    somebody added some: users would begin anew in other partitions than their states. What is missing is passed over.
    """
    topics = settings.topics
    keyed = {topic.name: topic for topic in (topics.clicks, topics.users, topics.recommendations)}
    options = settings.connection.kafka_python() | {"bootstrap_timeout_ms": int(1000 * ANSWER_S)}
    try:
        with kafka.KafkaAdminClient(**options) as admin:
            there = keyed.keys() & set(admin.list_topics())
            found = {topic["name"]: topic["partitions"] for topic in admin.describe_topics(list(there)) if there}
    except kafka.errors.KafkaError:  # does not answer now: no matter of configuration
        return
    for name, partitions in found.items():
        check_partitions(keyed[name], len(partitions))


async def _knock(address: str, options: dict[str, Any]) -> bool:
    host, _, port = address.rpartition(":")
    ends = time.monotonic() + ANSWER_S
    while True:
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), ANSWER_S)
            writer.close()
            await writer.wait_closed()
        except OSError:  # a TimeoutError is one
            return False
        link = AIOKafkaConnection(host, int(port), **options)
        try:
            async with asyncio.timeout(ANSWER_S):
                await link.connect()
                await link.close()
            return True
        except TimeoutError:
            return False
        except SaslAuthenticationFailed as error:
            await asyncio.wait([link.close()], timeout=ANSWER_S)  # TLS says goodbye first; else a socket is left
            raise ConfigError(f"kafka.username, kafka.password, kafka.mechanism: {address}: {error}") from error
        except ssl.SSLError as error:
            raise ConfigError(f"kafka.tls, kafka.ca_file: {address}: {error}") from error
        except (KafkaError, OSError) as error:
            if time.monotonic() > ends:
                what = "speaks no TLS, or is no Kafka" if "ssl_context" in options else "wants TLS, or is no Kafka"
                raise ConfigError(f"kafka.tls: {address} closes the connection: it {what}") from error
        await asyncio.sleep(1)
