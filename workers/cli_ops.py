"""`upwell topics`, `lag`, `doctor`, `export`, `import`: what an operator asks and does."""

from pathlib import Path
from typing import Annotated

import typer

from workers.failing import failing

topics = typer.Typer(help="The topics on the cluster; without a command: create the missing ones.")


@topics.callback(invoke_without_command=True)
def create(context: typer.Context) -> None:
    """Create the topics that are missing; say what each is for."""
    if context.invoked_subcommand is not None:
        return
    from stream.topics import ensure
    from workers.cli import refusing, settings_for

    settings = settings_for("topics")
    with refusing():
        ensure(settings.topics, settings.connection)
    for topic in settings.topics.all():
        kept = "compacted" if topic.retention_ms is None else f"{topic.retention_ms / 86_400_000:g} days"
        typer.echo(f"{topic.name}  {topic.partitions} partitions, {kept}: {topic.about}")


@topics.command("describe")
def describe_topics() -> None:
    """Each topic as it is, and what should be otherwise; exit code 1 where something should."""
    from workers.cli import settings_for
    from workers.topic_report import describe

    settings = settings_for("topics")
    faulty = False
    for found in describe(settings):
        faults = list(found.faults())
        faulty |= bool(faults)
        state = "; ".join(faults) or "as it should be"
        typer.echo(f"{found.topic.name}  {found.partitions} partitions, {found.replicas} replicas: {state}")
    raise typer.Exit(int(faulty))


@topics.command("fix")
def fix_topics() -> None:
    """Create what is missing and set what differs; never the number of partitions."""
    from workers.cli import refusing, settings_for
    from workers.topic_report import fix

    settings = settings_for("topics")
    with refusing():
        changes = fix(settings)
    typer.echo("\n".join(changes) or "nothing to change")


def lag() -> None:
    """Clicks that the workers have not committed, by partition."""
    from workers.cli import settings_for
    from workers.lag import read_offsets

    settings = settings_for("lag")
    clicks = read_offsets(settings).clicks
    for partition, place in clicks.items():
        committed = "nothing" if place.committed is None else place.committed
        typer.echo(f"{partition}  committed {committed} of {place.end}  {place.lag} behind")
    typer.echo(f"{sum(place.lag for place in clicks.values())} clicks behind in all")


def export(path: Annotated[Path, typer.Argument(help="JSON lines; compressed where it ends in .gz.")]) -> None:
    """Catalogue, user states and what serves into a file. It holds what users did."""
    from workers.backup import write_backup
    from workers.cli import settings_for

    settings = settings_for("export")
    with failing(OSError):
        counts = write_backup(settings, path)
    typer.echo(f"{counts.items} items and {counts.users} users in {path}")


def import_(path: Annotated[Path, typer.Argument(help="What `upwell export` has written.")]) -> None:
    """What a file holds, into an installation that has no states yet; the artifact store beside it."""
    from stream.topics import ensure
    from workers.backup import BadBackup, read_backup, restore
    from workers.cli import refusing, settings_for

    settings = settings_for("import")
    with failing(BadBackup, OSError):
        backup = read_backup(path)
        with refusing():
            ensure(settings.topics, settings.connection)
        announced = restore(settings, backup)
    typer.echo(f"{len(backup.items)} items and {len(backup.users)} users sent")
    typer.echo(f"{', '.join(announced) or 'nothing'} announced")
    for artifact in backup.announced.values():
        if artifact.name not in announced:
            typer.echo(f"{artifact.name} is not in {settings.artifacts}: what it had learned is lost", err=True)
