"""`upwell arms`: the A/B test in figures."""

import time
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The A/B test: who is in which arm, and how the arms do.")


@app.command()
def report(
    hours: Annotated[float, typer.Option(min=0.01, help="Back from now; the lists are kept for a day.")] = 24.0,
) -> None:
    """Hit rate of each arm, and what the lists of an exploring arm say of the others.

    A hit: a click on an item of the last list before it. Counted are clicks that weigh more than nothing, on items that
    their user has not clicked within the window. Intervals: 95 %, resampling users with all their clicks.
    """
    from workers.arm_report import lines
    from workers.cli import settings_for

    settings = settings_for("arms")
    for line in lines(settings, since_ms=int((time.time() - 3600 * hours) * 1000)):
        typer.echo(line)


@app.command()
def of(user_id: str) -> None:
    """The arm of a user."""
    from workers.arms import arm_of
    from workers.cli import settings_for

    settings = settings_for("arms", reach_kafka=False)
    pseudonyms = settings.privacy.pseudonyms
    typer.echo(arm_of(settings, pseudonyms.of(user_id) if pseudonyms else user_id))
