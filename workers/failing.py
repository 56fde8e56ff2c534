"""How a command ends that could not do what it was asked."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def failing(*errors: type[Exception], code: int = 1) -> Iterator[None]:
    """One of these errors ends the process with its own words and this exit code; any other has its trace."""
    try:
        yield
    except errors as error:
        typer.echo(str(error), err=True)
        raise SystemExit(code) from error  # not typer.Exit, which means nothing outside of a command: main()
