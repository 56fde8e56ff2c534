"""`upwell watch` against the fake."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from stream.answers import EventIn, Update
from stream.client import Client
from tests.workers.console_fake import Fake, fake_api
from tests.workers.service import until
from workers.cli import app
from workers.watch import table


@pytest.fixture
def fake() -> Iterator[tuple[Fake, str]]:
    with fake_api() as running:
        yield running


@pytest.mark.parametrize("as_json", [False, True])
def test_a_click_is_seen(fake: tuple[Fake, str], as_json: bool) -> None:
    with Client(fake[1]) as sender:

        def click() -> None:
            until(lambda: bool(fake[0].last_ids), "the stream is open")  # it pushes no click from before
            sender.send(EventIn(user_id="u", item_id="i3", event_id="e-1"))

        clicking = Thread(target=click)
        clicking.start()
        options = ["--url", fake[1], "--updates", "1", *(["--json"] if as_json else [])]
        done = CliRunner().invoke(app, ["watch", "u", *options], env={"COLUMNS": "140"})
        clicking.join()
    assert done.exit_code == 0, done.output
    if as_json:
        update = msgspec.json.decode(done.output, type=Update)
        assert update.path is not None and update.path.event_id == "e-1"
    else:
        assert "chess, part 0 61%" in done.output  # because
        assert "published after 7 ms, here after 9 ms" in done.output


def test_moves_are_marked_and_titles_are_no_markup(fake: tuple[Fake, str]) -> None:
    with Client(fake[1]) as client:
        answer = client.recommendations("u", k=3)
    first, second, third = answer.items
    answer.items[0] = msgspec.structs.replace(first, title="[red]x[/red]")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(answer, {first.item_id: 1, second.item_id: 0}, 10))
    rows = [line for line in console.export_text().splitlines() if any(m in line for m in ("▲", "▼", "new"))]
    assert ["▲1" in rows[0], "▼1" in rows[1], "new" in rows[2]] == [True, True, True]
    assert "[red]x[/red]" in rows[0] and third.title in rows[2]


def test_a_stranger_s_title_does_nothing_to_the_terminal(fake: tuple[Fake, str]) -> None:
    evil = "ok\x1b]52;c;cm0=\x1b\\\x1b[2J\x9b31m\u202e　é"
    with Client(fake[1]) as client:
        client.send(EventIn(user_id="u", item_id="i3"))
        answer = client.recommendations("u", k=1, explain=True)
    (first,) = answer.items
    because = [msgspec.structs.replace(first.because[0], title=evil)]
    answer.items[0] = msgspec.structs.replace(first, title=evil, because=because)
    console = Console(width=200, file=(screen := io.StringIO()))
    console.print(table(msgspec.structs.replace(answer, user_id=evil, generation=evil), {}, 10))
    assert screen.getvalue().count(r"ok\x1b]52;c;cm0=\x1b\\x1b[2J\x9b31m\u202e　é") == 4
    assert not re.search("[\x1b\x9b\u202e]", screen.getvalue())


def test_a_refusal_ends_it_with_the_servers_words(fake: tuple[Fake, str], tmp_path: Path) -> None:
    fake[0].set(key="secret")
    key_file = tmp_path / "key"
    key_file.write_text("wrong\n")
    done = CliRunner().invoke(app, ["watch", "u", "--url", fake[1], "--key-file", str(key_file)])
    assert done.exit_code == 1
    assert "missing or unknown" in done.output
    done = CliRunner().invoke(app, ["watch", "u", "--key-file", "/nope"])
    assert done.exit_code == 1 and "No such file" in done.stderr and len(done.stderr.splitlines()) == 1
