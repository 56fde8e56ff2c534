"""Is everything there that Upwell needs?"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version

import fsspec
import kafka
import torch
from kafka.errors import KafkaError

from stream.topics import ensure
from workers.preflight import check_access
from workers.settings import ConfigError, Settings

MIN_FREE_GB = 2.0
PACKAGES = ("upwell", "torch", "transformers", "hnswlib", "faust-streaming", "aiokafka", "kafka-python")
Finding = tuple[bool, str]


def examine(settings: Settings) -> Iterator[Finding]:
    """(good, sentence) for the broker, the topics, versions, device, disk and clock."""
    yield True, ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    yield True, f"device: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}"
    yield from _broker(settings)
    yield _artifacts(settings.artifacts)
    free_gb = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    yield free_gb > MIN_FREE_GB, f"disk: {free_gb:.1f} GB free for building generations, {MIN_FREE_GB} wanted"
    yield time.time() > 1_700_000_000, f"clock: {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}"


def _broker(settings: Settings) -> Iterator[Finding]:
    address = settings.kafka.bootstrap
    try:
        check_access(settings.connection)
        with kafka.KafkaAdminClient(**settings.connection.kafka_python(), bootstrap_timeout_ms=5000) as admin:
            brokers = admin.describe_cluster()["brokers"]
        yield True, f"broker: {address} answers, {len(brokers)} in the cluster"
        ensure(settings.topics, settings.connection)
        yield True, f"topics: {settings.kafka.prefix}.* are there, as they should be"
    except (KafkaError, OSError) as error:
        yield False, f"broker: {address}: {error}"
    except ConfigError as error:
        yield False, f"broker: {error}"
    except ValueError as error:
        yield False, f"topics: {error}"


def _artifacts(url: str) -> Finding:
    try:
        store, root = fsspec.core.url_to_fs(url)
        store.makedirs(root, exist_ok=True)
        probe = f"{root}/.doctor"
        store.pipe_file(probe, b"")
        store.rm_file(probe)
    except Exception as error:  # each store has errors of its own
        return False, f"artifacts: {url}: {error}"
    return True, f"artifacts: {url} can be written"
