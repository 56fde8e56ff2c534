"""`upwell bench NAME`: what this machine does, each figure a ratio to a floor or a peer of the same run."""

import os
from typing import Annotated, Literal

import typer

Name = Literal["ingest", "freshness", "scale", "search", "swap", "encode", "learn", "gpu", "startup"]


def bench(
    name: Annotated[Name, typer.Argument(help="docs/performance.md says what each one measures.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object last.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: shows that it works, not how fast.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Alternating runs of each contender.")] = 5,
    size: Annotated[
        int | None, typer.Option(min=1000, help="Clicks, items or events; default: the benchmark's.")
    ] = None,
) -> None:
    """Measure one thing against its floor or its peers; medians of alternating runs, the machine's load beside."""
    os.environ["OMP_NUM_THREADS"] = "1"  # a core, as in the roles; two threads of a busy machine spin for one another
    import msgspec

    from workers.bench.harness import Options, measure
    from workers.logs import configure

    configure("WARNING", "bench")
    result = measure(name, Options(quick, rounds, size))
    for title, figures in (("ratio", result.ratios), ("value", result.values)):
        for key, figure in figures.items():
            typer.echo(f"{title}  {key:44} {figure}")
    typer.echo(f"load   {result.load[0]:.2f} before, {result.load[1]:.2f} after, {result.cores} cores")
    if json:
        typer.echo(msgspec.json.encode(result).decode())
