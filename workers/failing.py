"""How a command ends that could not do what it was asked."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

EXTRAS = {"matplotlib": "report", "faiss": "bench", "psutil": "bench", "usearch": "bench"}  # package -> who brings it


@contextmanager
def failing(*errors: type[Exception], code: int = 1) -> Iterator[None]:
    """One of these errors ends the process with its own words and this exit code; any other has its trace."""
    try:
        yield
    except errors as error:
        typer.echo(str(error), err=True)
        raise SystemExit(code) from error  # not typer.Exit, which means nothing outside of a command: main()


@contextmanager
def naming_extras() -> Iterator[None]:
    """A package that only an extra of ours brings ends the process with the extra's name."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        typer.echo(f"{package} is not installed: pip install 'upwell[{EXTRAS[package]}]'", err=True)
        raise SystemExit(1) from error
