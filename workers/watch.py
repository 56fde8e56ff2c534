"""`upwell watch`: one user's list in the terminal, as it moves."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from stream.answers import Answer, Status, Update
from stream.client import ApiError, Client
from stream.text import shown
from workers.command import failing


def watch(
    user_id: Annotated[str, typer.Argument(metavar="USER")],
    url: Annotated[str, typer.Option(help="Of the service.")] = "http://127.0.0.1:8080",
    key_file: Annotated[Path | None, typer.Option(help="Holds the API key, where one is needed.")] = None,
    k: Annotated[int, typer.Option(min=1, max=200, help="Places to show.")] = 10,
    json: Annotated[bool, typer.Option("--json", help="One line of JSON an update, for programs.")] = False,
    updates: Annotated[int | None, typer.Option(min=1, help="End after so many.")] = None,
) -> None:
    """One user's recommendations in the terminal, as they move; until Ctrl-C."""
    with failing(OSError, ValueError):
        client = Client(url, key_file.read_text(encoding="utf-8") if key_file else None)
    with suppress(KeyboardInterrupt), failing(ApiError), client:
        (_print if json else _draw)(client, user_id, k, updates)


def _print(client: Client, user_id: str, _: int, updates: int | None) -> None:
    for update in client.updates(user_id):
        if isinstance(update, Update):
            sys.stdout.buffer.write(msgspec.json.encode(update) + b"\n")
            sys.stdout.flush()
            updates = updates and updates - 1
            if updates == 0:
                return


def _draw(client: Client, user_id: str, k: int, updates: int | None) -> None:
    console, places = Console(), dict[str, int]()
    answer = client.recommendations(user_id, k, explain=True)
    with Live(table(answer, places, k), console=console, auto_refresh=False) as screen:
        for update in client.updates(user_id):
            if isinstance(update, Status):
                lost = Text("" if update.connected else "reconnecting; the list is the last one known", "yellow")
                screen.update(Group(table(answer, places, k), lost), refresh=True)
                continue
            places = {place.item_id: at for at, place in enumerate(answer.items)}
            answer = update
            screen.update(table(answer, places, k), refresh=True)
            updates = updates and updates - 1
            if updates == 0:
                return


def table(answer: Answer, places: dict[str, int], k: int) -> Table:
    """places: item -> its place in the list before; empty: nothing is marked as moved."""
    path = answer.path if isinstance(answer, Update) else None
    folded = f"state updated after {path.updated_ms - path.clicked_ms} ms, " if path and path.updated_ms else ""
    hops = (
        f"  ·  click {path.partition}:{path.offset}: {folded}published after {path.published_ms - path.clicked_ms} ms, "
        f"here after {path.pushed_ms - path.clicked_ms} ms"
        if path
        else ""
    )
    caption = f"{answer.source}  ·  generation {answer.generation}{'  ·  stale' if answer.stale else ''}{hops}"
    drawn = Table(title=_text(answer.user_id or ""), caption=_text(caption), expand=True)
    drawn.add_column()
    drawn.add_column("item", ratio=3)
    drawn.add_column()
    drawn.add_column("because of", ratio=4)
    drawn.add_column("score", justify="right")
    for at, place in enumerate(answer.items[:k]):
        because = ", ".join(f"{one.title or one.item_id} {one.share:.0%}" for one in place.because)
        title, moved = _text(place.title or place.item_id), move(places, place.item_id, at)
        drawn.add_row(str(at + 1), title, moved, _text(because), f"{place.score:.3f}")
    return drawn


def _text(words: str) -> Text:
    """Of strangers: no markup, and no command to the terminal."""
    return Text(shown(words))


def move(places: dict[str, int], item_id: str, at: int) -> Text:
    if not places or places.get(item_id) == at:
        return Text()
    if item_id not in places:
        return Text("new", "cyan")
    by = places[item_id] - at
    return Text(f"▲{by}" if by > 0 else f"▼{-by}", "green" if by > 0 else "dim")
