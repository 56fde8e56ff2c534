"""The command `upwell`. Heavy imports happen inside the commands: `upwell --help` does not load torch."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from kafka.errors import KafkaError

from stream.consumer import MissingTopic
from stream.jars import BrokerError
from stream.producer import BufferFull, DeliveryError
from stream.topics import WrongTopic
from workers import cli_arms, cli_ops, tracing
from workers.cli_bench import bench
from workers.cli_erase import erase
from workers.cli_keys import keys
from workers.failing import failing, naming_extras
from workers.logs import configure
from workers.settings import ConfigError, Settings, load_settings
from workers.up import ROLES, run_up
from workers.watch import watch

EX_CONFIG = 2
KEYED = ("worker", "serve")  # roles that know a user's partition

app = typer.Typer(no_args_is_help=True, add_completion=False)
dead_letters = typer.Typer(no_args_is_help=True, help="Messages that could not be applied.")
generations = typer.Typer(no_args_is_help=True, help="What serves, and the way back.")
app.add_typer(dead_letters, name="dead-letters")
app.add_typer(generations, name="generations")
app.command()(watch)
app.add_typer(keys, name="keys")
app.add_typer(cli_arms.app, name="arms")
app.command()(erase)
app.add_typer(cli_ops.topics, name="topics")
app.command("lag")(cli_ops.lag)
app.command("export")(cli_ops.export)
app.command("import")(cli_ops.import_)
app.command()(bench)

Broker = Annotated[str | None, typer.Option(help="HOST:PORT of your own Kafka; default: a local one.")]


def say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("upwell"))
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[bool, typer.Option("--version", callback=say_version, is_eager=True, help="And end.")] = False,
) -> None:
    """Streaming online-learning recommendations."""


@contextmanager
def refusing() -> Iterator[None]:
    """Bad configuration, or topics that are not as it says, ends the process with one line a key or topic."""
    try:
        yield
    except (ConfigError, WrongTopic) as error:
        typer.echo(f"configuration:\n{error}", err=True)
        raise typer.Exit(EX_CONFIG) from error


def settings_for(role: str, reach_kafka: bool = True) -> Settings:
    """Settings, with logs configured; bad configuration ends the process with one line a key.

    So does a Kafka that answers and does not let us in, or has other partitions. One that does not answer is no matter
    of configuration: roles wait for it, a command ends, with exit code 1.
    """
    with refusing():
        settings = load_settings()
        if reach_kafka:
            from workers.preflight import check_access, check_keyed

            if not check_access(settings.connection) and role not in (*ROLES, "up"):
                typer.echo(f"no Kafka answers at {settings.kafka.bootstrap}", err=True)
                raise typer.Exit(1)  # Kafka's clients would try for 30 s and more
            if role in KEYED:
                check_keyed(settings)
        processors = tracing.start(settings, role)
    configure(settings.log_level, role, *processors)
    if role not in ROLES:  # a command ends with what went wrong: Kafka's client would log it forty times before
        logging.getLogger("kafka").setLevel(logging.CRITICAL)
    return settings


@app.command()
def worker() -> None:
    """Fold clicks into user states and send fresh recommendations (Faust)."""
    settings = settings_for("worker")
    from workers.worker_process import run_worker

    raise typer.Exit(run_worker(settings))


@app.command()
def trainer() -> None:
    """Fine-tune on the newest clicks, again and again; publish what wins."""
    settings = settings_for("trainer")
    from workers.trainer import run_trainer

    raise typer.Exit(run_trainer(settings))


@app.command()
def indexer() -> None:
    """Encode item texts and build generations."""
    settings = settings_for("indexer")
    from workers.indexer import run_indexer

    raise typer.Exit(run_indexer(settings))


@app.command()
def serve() -> None:
    """HTTP: recommendations, events in, health, metrics, the page."""
    settings = settings_for("serve")
    from workers.keys import load_keys

    with refusing():
        keys = load_keys(settings.serve)
    from workers.server import run_server

    raise typer.Exit(run_server(settings, keys))


@app.command()
def up(broker: Broker = None) -> None:
    """All roles on this machine, until Ctrl-C. Without --broker: on a local Kafka under data/kafka."""
    if broker is not None:
        os.environ["UPWELL_KAFKA__BOOTSTRAP"] = broker
    with refusing():
        _on_one_machine(settings_for("up", reach_kafka=broker is not None))
    with refusing(), failing(BrokerError):
        raise typer.Exit(run_up(broker, kafka_home()))


def _on_one_machine(settings: Settings) -> None:
    """Raises ConfigError where roles would fight for a port, as with the image's: there each has its own machine."""
    ports = [port for role in (settings.worker, settings.trainer, settings.indexer) if (port := role.metrics_port)]
    if len(set(ports)) < len(ports):
        raise ConfigError(f"worker, trainer and indexer share a metrics_port, {ports[0]}: 0 takes a free one")


def kafka_home() -> Path | None:
    """An unpacked Kafka to use for the local broker, where its jars cannot be fetched."""
    home = os.environ.get("KAFKA_HOME")
    return Path(home) if home else None


@app.command()
def demo(
    check: Annotated[bool, typer.Option("--check", help="Judge the run; print one JSON summary last.")] = False,
    stream: Annotated[str, typer.Option(help="ml-100k, or a folder of events.jsonl and items.jsonl.")] = "ml-100k",
    events: Annotated[int | None, typer.Option(min=1, help="How many; default: all, with --check 30,000.")] = None,
    rate: Annotated[float, typer.Option(min=0.1, help="Events a second.")] = 80.0,
    port: Annotated[int, typer.Option(help="Of the API; 0: a free one.")] = 8080,
    broker: Broker = None,
) -> None:
    """The whole service on a real event stream, watched live."""
    from stream.datasets import NoDataset
    from workers.demo import DemoOptions, run_demo

    options = DemoOptions(check, stream, events or (30_000 if check else None), rate, port, broker, kafka_home())
    with refusing(), failing(BrokerError, NoDataset):
        raise typer.Exit(run_demo(options))


@app.command()
def replay(
    stream: Annotated[str, typer.Argument(help="ml-100k, or a folder of events.jsonl and items.jsonl.")],
    rate: Annotated[float, typer.Option(min=0.1, help="Events a second.")] = 80.0,
    limit: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Send a recorded catalogue and its events to the topics, in time order, as if they happened now."""
    import time

    from rich.progress import track

    from stream.datasets import NoDataset, load_dataset
    from stream.producer import ClickProducer
    from stream.replay import replay as send
    from stream.replay import shifted
    from workers.processes import stop_on_signal

    settings, stop = settings_for("replay"), stop_on_signal()
    with failing(NoDataset):
        dataset = load_dataset(stream)
    events = shifted(dataset.events, int(time.time() * 1000))[:limit]
    with ClickProducer(settings.connection, settings.topics, settings.privacy.pseudonyms) as producer:
        for item in dataset.items:
            producer.send_item(item)
        sent = sum(1 for _ in track(send(producer, events, rate, stop), dataset.name, total=len(events)))
    typer.echo(f"{sent} events and {len(dataset.items)} items sent")


@app.command()
def evaluate(
    stream: Annotated[str, typer.Argument(help="ml-100k, a folder of events.jsonl and items.jsonl, or a CSV.")],
    arms: Annotated[str, typer.Option(help="Comma-separated; default: the product and all cheap ones.")] = "",
    mode: Annotated[str, typer.Option(help="strict, line or both.")] = "both",
    limit: Annotated[int | None, typer.Option(min=10, help="Only the first so many events.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Default: out/evaluate/STREAM; what it holds is kept.")] = None,
    columns: Annotated[str | None, typer.Option(help="Of a CSV: user=…,item=…,ts=…[,type=…,value=…,title=…].")] = None,
) -> None:
    """Test, then learn: the product and what could stand in its place, on a recorded stream, in process."""
    from workers.evaluate import main as evaluate_stream

    with refusing():
        settings = load_settings()
    raise typer.Exit(evaluate_stream(settings, stream, arms, mode, limit, seed, out, columns))


@app.command()
def doctor() -> None:
    """Look at what Upwell needs; exit code 1 when something is missing."""
    from workers.doctor import examine

    settings = settings_for("doctor", reach_kafka=False)
    findings = list(examine(settings))
    for good, what in findings:
        typer.echo(f"{'ok  ' if good else 'FAIL'} {what}")
    raise typer.Exit(0 if all(good for good, _ in findings) else 1)


@dead_letters.command("list")
def list_dead_letters(limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 50) -> None:
    """One line a dead letter: place, cause, the beginning of the message."""
    from workers.dead_letters import describe, read

    settings = settings_for("dead-letters")
    for offset, letter in read(settings)[-limit:]:
        typer.echo(describe(offset, letter))


@dead_letters.command("replay")
def replay_dead_letters(
    offset: Annotated[list[int] | None, typer.Option(help="Only these, by their number in the list.")] = None,
) -> None:
    """Send the kept messages to their topics again, for example after a release that can read them, and take them off
    the list; one that is refused again comes back under a new number."""
    from workers.dead_letters import read, resend

    settings = settings_for("dead-letters")
    letters = dict(read(settings))
    if missing := sorted(set(offset or ()) - letters.keys()):
        typer.echo(f"no dead letter {', '.join(map(str, missing))}: nothing is sent", err=True)
        raise typer.Exit(1)
    sent, kept = resend(settings, [letter for at, letter in letters.items() if not offset or at in offset])
    typer.echo(f"{sent} sent again, {kept} cannot be (only a part of an oversized message is kept)")


@generations.command("list")
def list_generations() -> None:
    """What is announced and kept, oldest first, and which of them serves."""
    settings = settings_for("generations")
    from workers.generations import listed

    for artifact, mark in listed(settings):
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in sorted(artifact.metrics.items()))
        typer.echo(f"{artifact.name}  {mark:6}  trained as {artifact.parent or '-'}  {metrics}")


@generations.command("refused")
def list_refused() -> None:
    """The candidates that the gate has turned down, oldest first, and why."""
    settings = settings_for("generations")
    from model.checkpoint import verdicts

    for name, reason in verdicts(f"{settings.store}/refused").items():
        typer.echo(f"{name}  {reason}")


@generations.command("show")
def show_generation(name: str) -> None:
    """Its manifest, after its files have been verified."""
    settings = settings_for("generations")
    import msgspec

    from model.manifest import DamagedGeneration
    from workers.generations import UnknownGeneration, find, manifest

    with failing(UnknownGeneration, DamagedGeneration):
        shown = manifest(settings, find(settings, name))
    typer.echo(msgspec.json.format(msgspec.json.encode(shown)).decode())


@generations.command("rollback")
def rollback_generation(
    name: Annotated[str | None, typer.Argument(help="Default: the one before the newest.")] = None,
) -> None:
    """Serve an earlier one; the next that wins at the gate comes after it."""
    settings = settings_for("generations")
    from workers.generations import NothingMoves, UnknownGeneration, roll_back

    with failing(UnknownGeneration, NothingMoves):
        typer.echo(f"{roll_back(settings, name).name} is announced again")


@generations.command("pin")
def pin_generation(
    name: Annotated[str | None, typer.Argument(help="Left out: nothing is pinned any more.")] = None,
) -> None:
    """Serve this one, whatever comes after it."""
    settings = settings_for("generations")
    from workers.generations import UnknownGeneration, pin

    with failing(UnknownGeneration):
        pin(settings, name)
    typer.echo(f"{name} is pinned" if name else "nothing is pinned")


def main() -> None:
    # Kafka is away, or empty: a trace would say no more.
    with naming_extras(), failing(KafkaError, DeliveryError, BufferFull, MissingTopic):
        app()


if __name__ == "__main__":
    main()
