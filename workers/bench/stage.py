"""A local Kafka with fresh topics, and processes that work on them."""

import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from model.user_state import decode_state
from stream.broker import LocalBroker
from stream.events import Artifact, Item, encode
from stream.ports import free_port
from stream.producer import partition_of
from stream.topics import ensure
from workers.bench.harness import await_true, cpu_s
from workers.observe import num_committed, scrape
from workers.sender import BatchSender
from workers.settings import PREFIX, Indexer, Kafka, Serve, Settings, Trainer, Worker
from workers.states import raw_states

Keyed = Sequence[tuple[str, bytes]]


class Stage:
    """One broker; `fresh` makes topics that nobody has used, `running` a process on them."""

    def __init__(self, broker: LocalBroker, folder: Path) -> None:
        self.broker, self.folder = broker, folder

    def fresh(self, partitions: int = 8) -> Settings:
        kafka = Kafka(bootstrap=self.broker.bootstrap, prefix=f"b{secrets.token_hex(4)}", partitions=partitions)
        settings = Settings(
            kafka=kafka,
            worker=Worker(metrics_port=free_port()),
            trainer=Trainer(metrics_port=free_port()),
            indexer=Indexer(metrics_port=free_port()),
            serve=Serve(port=free_port()),
            artifacts=str(self.folder / "artifacts"),
            cache=self.folder / "cache",
            log_level="WARNING",
        )
        ensure(settings.topics, settings.connection)
        return settings

    @contextmanager
    def running(self, settings: Settings, module: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """`python -P -m MODULE ARGUMENTS` with these settings; its stdout is ours to read, its log in the folder."""
        log = self.folder / f"{module}-{secrets.token_hex(3)}.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],
                env=os.environ | environment(settings),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            yield process
        except BaseException as error:
            error.add_note(log.read_text()[-2000:])
            raise
        finally:
            process.terminate()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@contextmanager
def stage() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="upwell-bench-") as name, LocalBroker(Path(name) / "kafka") as broker:
        yield Stage(broker, Path(name))


def environment(settings: Settings) -> dict[str, str]:
    """The variables that make a process load these settings, as far as they were given."""
    return dict(_variables(PREFIX, settings.model_dump(mode="json", exclude_unset=True, exclude_none=True)))


def _variables(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _variables(f"{prefix}{name.upper()}__", value)
        else:
            yield prefix + name.upper(), value if isinstance(value, str) else json.dumps(value)


def write_clicks(settings: Settings, clicks: Keyed) -> None:
    """All of them at once, in batches, to the partitions that a producer takes."""
    batches: dict[int, list[tuple[bytes, bytes]]] = {}
    for user_id, raw in clicks:
        batches.setdefault(partition_of(user_id, settings.kafka.partitions), []).append((user_id.encode(), raw))
    asyncio.run(write(settings, [(settings.topics.clicks.name, *batch) for batch in batches.items()]))


def announce(settings: Settings, items: Sequence[Item], artifact: Artifact) -> None:
    """The catalogue, then the generation that serves it."""
    topics = settings.topics
    catalogue = [(item.item_id.encode(), encode(item)) for item in items]
    generation = [(artifact.name.encode(), encode(artifact))]
    asyncio.run(write(settings, [(topics.items.name, 0, catalogue), (topics.generations.name, 0, generation)]))


async def write(settings: Settings, batches: Sequence[tuple[str, int, Sequence[tuple[bytes, bytes]]]]) -> None:
    sender = BatchSender(settings.connection)
    await sender.start()
    for topic, partition, records in batches:
        await sender.send(topic, partition, records)
    await sender.stop()


def said(process: "subprocess.Popen[str]", word: str) -> str:
    """What follows the word on the next line that begins with it. Raises EOFError when the process has ended before."""
    assert process.stdout is not None
    for line in process.stdout:
        first, _, rest = line.strip().partition(" ")
        if first == word:
            return rest
    raise EOFError(f"{process.args!r} ended and never said {word}")


def worker_metrics(settings: Settings) -> dict[str, float]:
    return scrape(f"http://127.0.0.1:{settings.worker.metrics_port}/metrics")


def await_worker(settings: Settings, serves: bool) -> None:
    """Until the worker's exporter answers and, where it has one to take in, its generation serves."""
    wanted = "upwell_swaps_total{served}" if serves else "upwell_restored_users"
    await_true(
        lambda: worker_metrics(settings).get(wanted, 0.0) >= float(serves) and bool(worker_metrics(settings)), wanted
    )


def clicks_per_cpu_s(
    stage: Stage,
    clicks: Keyed,
    generation: Artifact | None = None,
    items: Sequence[Item] = (),
    partitions: int = 8,
    workers: int = 1,
) -> float:
    """Of the workers and their search processes together, until all clicks are committed. No generation: the fold path.

    Raises AssertionError where the states do not count every click once.
    """
    settings = stage.fresh(partitions)
    if generation is not None:
        announce(settings, items, generation)
    with ExitStack() as stack:
        own = [settings.model_copy(update={"worker": Worker(metrics_port=free_port())}) for _ in range(workers)]
        running = [stack.enter_context(stage.running(one, "workers.cli", "worker")) for one in own]
        for one in own:
            await_worker(one, serves=generation is not None)
        before = sum(cpu_s(process.pid) for process in running)
        write_clicks(settings, clicks)
        await_true(lambda: num_committed(settings) >= len(clicks), "all clicks committed", pause_s=0.3)
        used = sum(cpu_s(process.pid) for process in running) - before
    applied = sum(decode_state(raw).applied for raw in raw_states(settings).values())
    assert applied == len(clicks), f"{applied} of {len(clicks)} clicks applied"
    return len(clicks) / used
