"""What an operator asks and does: topics, lag, backup, doctor, dead letters, generations, the A/B test, keys."""

import time
from pathlib import Path
from typing import Annotated

import typer

from workers import command
from workers.command import failing, refusing
from workers.keys import SCOPES, new_key

app = typer.Typer()
topics = typer.Typer(help="The topics on the cluster; without a command: create the missing ones.")
dead_letters = typer.Typer(no_args_is_help=True, help="Messages that could not be applied.")
generations = typer.Typer(no_args_is_help=True, help="What serves, and the way back.")
arms = typer.Typer(no_args_is_help=True, help="The A/B test: who is in which arm, and how the arms do.")
keys = typer.Typer(no_args_is_help=True, help="API keys.")
app.add_typer(topics, name="topics")
app.add_typer(dead_letters, name="dead-letters")
app.add_typer(generations, name="generations")
app.add_typer(arms, name="arms")
app.add_typer(keys, name="keys")


@topics.callback(invoke_without_command=True)
def create(context: typer.Context) -> None:
    """Create the topics that are missing; say what each is for."""
    if context.invoked_subcommand is not None:
        return
    from stream.topics import describe, ensure

    settings = command.settings_for("topics")
    with refusing():
        ensure(settings.topics, settings.connection)
    for topic in settings.topics.all():
        kept = "compacted" if topic.retention_ms is None else f"{topic.retention_ms / 86_400_000:g} days"
        typer.echo(f"{topic.name}  {topic.partitions} partitions, {kept}: {topic.about}")
    found = describe(settings.topics, settings.connection)
    if faults := [f"{each.topic.name}: {fault}" for each in found for fault in each.faults()]:
        typer.echo("\n".join([*faults, "`upwell topics fix` sets what can be set"]), err=True)


@topics.command("describe")
def describe_topics() -> None:
    """Each topic as it is, and what should be otherwise; exit code 1 where something should."""
    from stream.topics import describe

    settings = command.settings_for("topics")
    faulty = False
    for found in describe(settings.topics, settings.connection):
        faults = list(found.faults())
        faulty |= bool(faults)
        state = "; ".join(faults) or "as it should be"
        copies = f"{found.replicas} replicas (at least {found.min_isr} in sync)"
        typer.echo(f"{found.topic.name}  {found.partitions} partitions, {copies}: {state}")
    raise typer.Exit(int(faulty))


@topics.command("fix")
def fix_topics() -> None:
    """Create what is missing and set what differs; never the number of partitions."""
    from stream.topics import fix

    settings = command.settings_for("topics")
    with refusing():
        changes = fix(settings.topics, settings.connection)
    typer.echo("\n".join(changes) or "nothing to change")


@app.command()
def lag() -> None:
    """Clicks that the workers have not committed, by partition."""
    from workers.lag import read_offsets

    settings = command.settings_for("lag")
    clicks = read_offsets(settings).clicks
    for partition, place in clicks.items():
        committed = "nothing" if place.committed is None else place.committed
        typer.echo(f"{partition}  committed {committed} of {place.end}  {place.lag} behind")
    typer.echo(f"{sum(place.lag for place in clicks.values())} clicks behind in all")


@app.command()
def export(path: Annotated[Path, typer.Argument(help="JSON lines; compressed where it ends in .gz.")]) -> None:
    """Catalogue, user states and what serves into a file. It holds what users did."""
    from workers.backup import write_backup

    settings = command.settings_for("export")
    with failing(OSError):
        counts = write_backup(settings, path)
    typer.echo(f"{counts.items} items and {counts.users} users in {path}")


@app.command("import")
def import_(path: Annotated[Path, typer.Argument(help="What `upwell export` has written.")]) -> None:
    """What a file holds, into an installation that has no states yet; the artifact store beside it."""
    from stream.topics import ensure
    from workers.backup import BadBackup, read_backup, restore

    settings = command.settings_for("import")
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


@app.command()
def doctor() -> None:
    """Look at what Upwell needs; exit code 1 when something is missing."""
    from workers.doctor import examine

    settings = command.settings_for("doctor", reach_kafka=False)
    findings = list(examine(settings))
    for good, what in findings:
        typer.echo(f"{'ok  ' if good else 'FAIL'} {what}")
    raise typer.Exit(0 if all(good for good, _ in findings) else 1)


@dead_letters.command("list")
def list_dead_letters(limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 50) -> None:
    """One line a dead letter: place, cause, the beginning of the message."""
    from workers.dead_letters import describe, read

    settings = command.settings_for("dead-letters")
    for offset, letter in read(settings)[-limit:]:
        typer.echo(describe(offset, letter))


@dead_letters.command("replay")
def replay_dead_letters(
    offset: Annotated[list[int] | None, typer.Option(help="Only these, by their number in the list.")] = None,
) -> None:
    """Send the kept messages to their topics again, for example after a release that can read them, and take them off
    the list; one that is refused again comes back under a new number."""
    from workers.dead_letters import read, resend

    settings = command.settings_for("dead-letters")
    letters = dict(read(settings))
    if missing := sorted(set(offset or ()) - letters.keys()):
        typer.echo(f"no dead letter {', '.join(map(str, missing))}: nothing is sent", err=True)
        raise typer.Exit(1)
    sent, kept = resend(settings, [letter for at, letter in letters.items() if not offset or at in offset])
    typer.echo(f"{sent} sent again, {kept} cannot be (only a part of an oversized message is kept)")


@generations.command("list")
def list_generations() -> None:
    """What is announced and kept, oldest first, and which of them serves."""
    settings = command.settings_for("generations")
    from workers.generations import listed

    for artifact, mark in listed(settings):
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in sorted(artifact.metrics.items()))
        typer.echo(f"{artifact.name}  {mark:6}  trained as {artifact.parent or '-'}  {metrics}")


@generations.command("refused")
def list_refused() -> None:
    """The candidates that the gate has turned down, oldest first, and why."""
    settings = command.settings_for("generations")
    from model.checkpoint import verdicts

    for name, reason in verdicts(f"{settings.store}/refused").items():
        typer.echo(f"{name}  {reason}")


@generations.command("show")
def show_generation(name: str) -> None:
    """Its manifest, after its files have been verified."""
    settings = command.settings_for("generations")
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
    settings = command.settings_for("generations")
    from model.manifest import DamagedGeneration
    from workers.generations import NothingMoves, UnknownGeneration, roll_back

    with failing(UnknownGeneration, NothingMoves, DamagedGeneration):
        typer.echo(f"{roll_back(settings, name).name} is announced again")


@generations.command("pin")
def pin_generation(
    name: Annotated[str | None, typer.Argument(help="Left out: nothing is pinned any more.")] = None,
) -> None:
    """Serve this one, whatever comes after it."""
    settings = command.settings_for("generations")
    from model.manifest import DamagedGeneration
    from workers.generations import UnknownGeneration, pin

    with failing(UnknownGeneration, DamagedGeneration):
        pin(settings, name)
    typer.echo(f"{name} is pinned" if name else "nothing is pinned")


@arms.command()
def report(
    hours: Annotated[float, typer.Option(min=0.01, help="Back from now; the lists are kept for a day.")] = 24.0,
) -> None:
    """Hit rate of each arm, and what the lists of an exploring arm say of the others.

    A hit: a click on an item of the last list before it. Counted are clicks that weigh more than nothing, on items that
    their user has not clicked within the window. Intervals: 95 %, resampling users with all their clicks.
    """
    from workers.arm_report import lines

    settings = command.settings_for("arms")
    for line in lines(settings, since_ms=int((time.time() - 3600 * hours) * 1000)):
        typer.echo(line)


@arms.command()
def of(user_id: str) -> None:
    """The arm of a user."""
    from workers.arms import arm_of

    settings = command.settings_for("arms", reach_kafka=False)
    pseudonyms = settings.privacy.pseudonyms
    typer.echo(arm_of(settings, pseudonyms.of(user_id) if pseudonyms else user_id))


@keys.command()
def new(
    scope: Annotated[list[str], typer.Option(help=f"{', '.join(SCOPES)}; once for each.")],
    name: Annotated[str, typer.Option(help="Whose it is; letters, digits, dots, dashes.")] = "key",
) -> None:
    """Print a new key, once, and the line for serve.keys_file, which holds only its hash."""
    with failing(ValueError, code=2):
        key, line = new_key(name, scope)
    typer.echo(f"{key}\nfor serve.keys_file:\n{line}")
