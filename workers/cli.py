"""The command `upwell`. Heavy imports happen inside the commands: `upwell --help` does not load torch."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer
from kafka.errors import KafkaError

from stream.consumer import MissingTopic
from stream.events import BadEvent
from stream.jars import BrokerError
from stream.producer import BufferFull, DeliveryError
from workers import cli_ops, command
from workers.cli_bench import bench
from workers.cli_erase import erase
from workers.command import failing, naming_extras, refusing
from workers.settings import ConfigError, Settings, load_settings
from workers.up import run_up
from workers.watch import watch

app = typer.Typer(no_args_is_help=True, add_completion=False)
app.command()(watch)
app.command()(erase)
app.command()(bench)
app.add_typer(cli_ops.app)

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


@app.command()
def worker() -> None:
    """Fold clicks into user states and send fresh recommendations (Faust)."""
    settings = command.settings_for("worker")
    from workers.worker_process import run_worker

    run_worker(settings)


@app.command()
def trainer() -> None:
    """Fine-tune on the newest clicks, again and again; publish what wins."""
    settings = command.settings_for("trainer")
    from workers.trainer import run_trainer

    raise typer.Exit(run_trainer(settings))


@app.command()
def indexer() -> None:
    """Encode item texts and build generations."""
    settings = command.settings_for("indexer")
    from workers.indexer import run_indexer

    raise typer.Exit(run_indexer(settings))


@app.command()
def serve() -> None:
    """HTTP: recommendations, events in, health, metrics, the page."""
    settings = command.settings_for("serve")
    from workers.server import run_server

    with refusing():
        raise typer.Exit(run_server(settings))


@app.command()
def up(broker: Broker = None) -> None:
    """All roles on this machine, until Ctrl-C. Without --broker: on a local Kafka under data/kafka."""
    if broker is not None:
        os.environ["UPWELL_KAFKA__BOOTSTRAP"] = broker
    with refusing():
        _on_one_machine(command.settings_for("up", reach_kafka=broker is not None))
    with refusing(), failing(BrokerError, OSError):
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
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the API; 0: a free one.")] = 8080,
    broker: Broker = None,
) -> None:
    """The whole service on a real event stream, watched live."""
    from stream.datasets import NoDataset
    from workers.demo import DemoOptions, run_demo

    options = DemoOptions(check, stream, events or (30_000 if check else None), rate, port, broker, kafka_home())
    with refusing(), failing(BrokerError, NoDataset, BadEvent, OSError):
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

    settings, stop = command.settings_for("replay"), stop_on_signal()
    with failing(NoDataset):
        dataset = load_dataset(stream)
    events = shifted(dataset.events, int(time.time() * 1000))[:limit]
    hidden = settings.privacy.pseudonyms
    with failing(BadEvent), ClickProducer(settings.connection, settings.topics, hidden) as producer:
        for item in dataset.items:
            producer.send_item(item)
        sent = sum(1 for _ in track(send(producer, events, rate, stop), dataset.name, total=len(events)))
    typer.echo(f"{sent} events and {len(dataset.items)} items sent")


@app.command()
def evaluate(
    stream: Annotated[str, typer.Argument(help="ml-100k, a folder of events.jsonl and items.jsonl, or a CSV.")],
    arms: Annotated[str, typer.Option(help="Comma-separated; default: the product and all cheap ones.")] = "",
    mode: Literal["strict", "line", "both"] = "both",
    limit: Annotated[int | None, typer.Option(min=10, help="Only the first so many events.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Default: out/evaluate/STREAM; what it holds is kept.")] = None,
    columns: Annotated[str | None, typer.Option(help="Of a CSV: user=…,item=…,ts=…[,type=…,value=…,title=…].")] = None,
) -> None:
    """Test, then learn: the product and what could stand in its place, on a recorded stream, in process."""
    from model.arms.catalogue import CHEAP
    from workers.evaluate import Options, run

    with refusing():
        settings = load_settings()
    options = Options(
        settings,
        stream,
        arms=tuple(arms.split(",")) if arms else CHEAP,
        modes=("strict", "line") if mode == "both" else (mode,),
        limit=limit,
        seed=seed,
        out=out or Path("out/evaluate") / Path(stream).stem,
        columns=columns,
    )
    with failing(ValueError, OSError, code=2):
        run(options)


def main() -> None:
    # Kafka is away, or empty: a trace would say no more.
    with naming_extras(), failing(KafkaError, DeliveryError, BufferFull, MissingTopic):
        app()


if __name__ == "__main__":
    main()
