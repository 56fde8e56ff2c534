"""upwell erase: users forgotten from the command line."""

import sys
import time
from functools import cache, partial
from typing import Annotated

import msgspec
import typer

from workers import command
from workers.command import failing

POLL_S = 0.5


def erase(
    users: Annotated[list[str] | None, typer.Argument(help="Their ids; - reads them from standard input.")] = None,
    wait: Annotated[bool, typer.Option(help="Until state, lists and dead letters are gone.")] = False,
    status: Annotated[list[str] | None, typer.Option(help="Of an earlier erasure, by its receipt.")] = None,
) -> None:
    """Forget users: one JSON receipt a line as soon as there is one; with --wait another when the erasure is done."""
    if not users and not status:
        raise typer.BadParameter("a user id, -, or --status RECEIPT is needed")
    import kafka

    from stream.answers import Erased
    from stream.events import BadEvent
    from stream.producer import BufferFull, ClickProducer, DeliveryError
    from workers import erasure

    settings = command.settings_for("erase")
    wanted = [line.strip() for line in sys.stdin if line.strip()] if users == ["-"] else users or []
    pending: list[str] = []

    def say(erased: Erased) -> None:
        typer.echo(msgspec.json.encode(erased).decode())
        if not erased.cleared:
            pending.append(erased.receipt)

    with failing(BadEvent, erasure.UnknownReceipt, DeliveryError, BufferFull, kafka.errors.KafkaError):
        for receipt in status or []:
            say(erasure.status(settings, receipt))
        longest_ms = cache(partial(erasure.longest_ms, settings))
        with ClickProducer(settings.connection, settings.topics, settings.privacy.pseudonyms) as producer:
            for user_id in wanted:
                say(erasure.ask(producer, user_id, longest_ms))
        for receipt in pending if wait else []:
            while not (erased := erasure.status(settings, receipt)).cleared:
                time.sleep(POLL_S)
            typer.echo(msgspec.json.encode(erased).decode())
