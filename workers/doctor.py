"""Is everything there that Upwell needs? Looked at, not changed."""

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import fsspec
import kafka
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import get_protocol
from kafka.errors import KafkaError

from stream.consumer import MissingTopic, end_offsets, read_window
from stream.events import Artifact
from stream.topics import describe
from workers.announcements import newest_model, read_announcements
from workers.lag import read_offsets
from workers.preflight import check_access
from workers.settings import ConfigError, Settings

MIN_FREE_GB = 2.0
MAX_SKEW_S = 2.0
PROBE_BYTES = 64 * 1024  # a full disk takes an empty file
PACKAGES = ("upwell", "torch", "transformers", "hnswlib", "faust-streaming", "aiokafka", "kafka-python")
Finding = tuple[bool, str]


def examine(settings: Settings) -> Iterator[Finding]:
    """(good, sentence) for versions, device, the broker, its topics and clock, the artifact store and disks."""
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    yield True, f"versions: Python {platform.python_version()}, {packages}"
    yield True, f"machine: {platform.system()} {platform.machine()}, {os.cpu_count()} processors"
    yield True, f"device: {_device()}"
    yield from _broker(settings)
    yield _artifacts(settings.artifacts, _announced(settings))
    yield from _disks(settings)


def _device() -> str:
    if not torch.cuda.is_available():
        return f"CPU (torch is {f'built for CUDA {torch.version.cuda}' if torch.version.cuda else 'without CUDA'})"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _broker(settings: Settings) -> Iterator[Finding]:
    address = settings.kafka.bootstrap
    try:
        check_access(settings.connection)
        with kafka.KafkaAdminClient(**settings.connection.kafka_python(), bootstrap_timeout_ms=5000) as admin:
            brokers = admin.describe_cluster()["brokers"]
        yield True, f"broker: {address} answers, {len(brokers)} in the cluster"
        found = describe(settings.topics, settings.connection)
        faults = [f"{each.topic.name}: {fault}" for each in found for fault in each.faults()]
        told = "; ".join(faults) or f"{settings.kafka.prefix}.* are there, as they should be"
        yield not faults, f"topics: {told}"
        if not all(each.partitions for each in found):
            return  # nor is there a lag, nor a stamp
        lag = sum(place.lag for place in read_offsets(settings).clicks.values())
        yield True, f"lag: {lag} clicks are not committed by {settings.group}"
        yield _clock(settings)
    except (KafkaError, OSError) as error:
        yield False, f"broker: {address}: {error}"
    except ConfigError as error:
        yield False, f"broker: {error}"


def _clock(settings: Settings) -> Finding:
    """Our clock against Kafka's stamp of the newest click: one from the future says that ours is behind."""
    now_ms, topic = time.time() * 1000, settings.topics.clicks.name
    last = {partition: max(0, end - 1) for partition, end in end_offsets(settings.connection, topic).items()}
    stamps = [record.timestamp for record in read_window(settings.connection, topic, offsets=last)]
    ahead_s = (max(stamps, default=0) - now_ms) / 1000
    told = f"{-ahead_s:.0f} s after Kafka's newest click" if stamps else "no click to compare it with"
    if ahead_s > MAX_SKEW_S:
        told = f"behind Kafka's by {ahead_s:.0f} s or more"
    return ahead_s <= MAX_SKEW_S, f"clock: {time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}, {told}"


def _announced(settings: Settings) -> list[Artifact] | None:
    """The newest model and what serves; None where Kafka does not say."""
    try:
        if not check_access(settings.connection):
            return None
        found = [newest_model(settings), *read_announcements(settings).wanted()[:1]]
    except MissingTopic:
        return []
    except (KafkaError, OSError, ConfigError):
        return None
    return [artifact for artifact in found if artifact]


def _artifacts(url: str, announced: list[Artifact] | None) -> Finding:
    """Its folder is made only where nothing has been announced: else the store is not mounted, or another one."""
    try:
        store, root = fsspec.core.url_to_fs(url)
        if announced is None and not store.exists(root):
            return True, f"artifacts: {url} is not there; Kafka does not say whether it should be"
        if announced == []:
            store.makedirs(root, exist_ok=True)
        probe = f"{root}/.doctor"
        try:
            store.pipe_file(probe, bytes(PROBE_BYTES))
        finally:
            if store.exists(probe):
                store.rm_file(probe)
        for artifact in announced or ():
            place, path = fsspec.core.url_to_fs(artifact.url)
            if not place.exists(path):
                return False, f"artifacts: {artifact.name} is announced, and nothing is at {artifact.url}"
    except Exception as error:  # each store has errors of its own
        return False, f"artifacts: {url}: {error}"
    return True, f"artifacts: {url} can be written{', and what serves is there' if announced else ''}"


def _disks(settings: Settings) -> Iterator[Finding]:
    """Where generations are built, where fetched ones and vectors lie, and a store that is a folder."""
    places = [("building generations", Path(tempfile.gettempdir())), ("the cache", settings.cache)]
    if get_protocol(settings.artifacts) in LocalFileSystem.protocol:
        places.append(("the artifact store", Path(fsspec.core.url_to_fs(settings.artifacts)[1])))
    for use, folder in places:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        free_gb = shutil.disk_usage(there).free / 1e9
        yield free_gb > MIN_FREE_GB, f"disk: {free_gb:.1f} GB free for {use} in {folder}, {MIN_FREE_GB} wanted"
