"""`upwell keys`: who may call the API."""

from typing import Annotated

import typer

from workers.failing import failing
from workers.keys import SCOPES, new_key

keys = typer.Typer(no_args_is_help=True, help="API keys.")


@keys.callback()
def group() -> None:
    """API keys."""


@keys.command()
def new(
    scope: Annotated[list[str], typer.Option(help=f"{', '.join(SCOPES)}; once for each.")],
    name: Annotated[str, typer.Option(help="Whose it is; letters, digits, dots, dashes.")] = "key",
) -> None:
    """Print a new key, once, and the line for serve.keys_file, which holds only its hash."""
    with failing(ValueError, code=2):
        key, line = new_key(name, scope)
    typer.echo(f"{key}\nfor serve.keys_file:\n{line}")
