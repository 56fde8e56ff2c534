"""upwell erase: users forgotten from the command line."""

import sys
import time
from functools import cache, partial
from typing import Annotated

import msgspec
import typer

POLL_S = 0.5


def erase(
    users: Annotated[list[str] | None, typer.Argument(help="Their ids; - reads them from standard input.")] = None,
    wait: Annotated[bool, typer.Option(help="Until state, lists and dead letters are gone.")] = False,
    status: Annotated[list[str] | None, typer.Option(help="Of an earlier erasure, by its receipt.")] = None,
) -> None:
    """Forget users: one JSON receipt a line, which says where each erasure stands."""
    from stream.events import BadEvent
    from stream.producer import ClickProducer
    from workers import erasure
    from workers.cli import settings_for

    settings = settings_for("erase")
    wanted = [line.strip() for line in sys.stdin] if users == ["-"] else users or []
    try:
        receipts = [erasure.status(settings, receipt) for receipt in status or []]
        longest_ms = cache(partial(erasure.longest_ms, settings))
        with ClickProducer(settings.connection, settings.topics, settings.privacy.pseudonyms) as producer:
            receipts += [erasure.ask(producer, user_id, longest_ms) for user_id in wanted]
    except (BadEvent, erasure.UnknownReceipt) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    for receipt in receipts:
        while wait and not receipt.cleared:
            time.sleep(POLL_S)
            receipt = erasure.status(settings, receipt.receipt)
        typer.echo(msgspec.json.encode(receipt).decode())
