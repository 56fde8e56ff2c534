"""How a command begins, and how it ends that could not do what it was asked."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import typer

from stream.topics import WrongTopic
from workers import tracing
from workers.logs import configure
from workers.settings import ConfigError, Settings, load_settings
from workers.up import ROLES

EXTRAS = {"matplotlib": "report", "faiss": "bench", "psutil": "bench", "usearch": "bench"}  # package -> who brings it
KEYED = ("worker", "serve")  # roles that know a user's partition


@contextmanager
def failing(*errors: type[Exception], code: int = 1, head: str = "") -> Iterator[None]:
    """One of these errors ends the process with its own words and this exit code; any other has its trace."""
    try:
        yield
    except errors as error:
        typer.echo(f"{head}{error}", err=True)
        raise SystemExit(code) from error  # not typer.Exit, which means nothing outside of a command: main()


# Bad configuration, or topics that are not as it says: one line a key or topic.
refusing = partial(failing, ConfigError, WrongTopic, code=2, head="configuration:\n")


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


def check_device(settings: Settings, role: str) -> None:
    """Raises ConfigError where this role is to compute on a GPU and cannot: it would be slow in silence."""
    if getattr(getattr(settings, role, None), "device", "cpu") == "cpu":
        return
    import torch  # seconds, which only who asks for a GPU waits for here

    if not torch.cuda.is_available():
        raise ConfigError(f"{role}.device: torch finds no GPU: see `upwell doctor`")
    if role == "trainer" and torch.distributed.is_torchelastic_launched():
        raise ConfigError("trainer.device: several processes (torchrun) train on processors, by gloo")


def settings_for(role: str, reach_kafka: bool = True) -> Settings:
    """Settings, with logs configured; bad configuration ends the process with one line a key.

    So does a Kafka that answers and does not let us in, or has other partitions. One that does not answer is no matter
    of configuration: roles wait for it, a command ends, with exit code 1.
    """
    with refusing():
        settings = load_settings()
        for each in ROLES if role == "up" else (role,):
            check_device(settings, each)
        if reach_kafka:
            from workers.preflight import check_access, check_keyed

            if not check_access(settings.connection) and role not in (*ROLES, "up"):
                typer.echo(f"no Kafka answers at {settings.kafka.bootstrap}", err=True)
                raise SystemExit(1)  # Kafka's clients would try for 30 s and more
            if role in KEYED:
                check_keyed(settings)
        processors = tracing.start(settings, role)
    configure(settings.log_level, role, *processors)
    if role not in ROLES:  # a command ends with what went wrong: Kafka's client would log it forty times before
        logging.getLogger("kafka").setLevel(logging.CRITICAL)
    return settings
