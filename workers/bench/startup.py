"""How long each role takes from its start until it is ready, on a warm cache, and what it holds in memory then.

Beside it, in the same run: a Python that imports torch and ends. Ready is: worker and server serve the announced
generation; trainer and indexer answer at their exporter, which comes after their imports.
"""

import subprocess
import sys
import time
from functools import partial

from workers.bench import data
from workers.bench.harness import Options, alternate, await_true, medians, ratio, rss_mib, seconds
from workers.bench.stage import Stage, announce, stage
from workers.observe import scrape
from workers.settings import Settings

ROLES = ("worker", "serve", "trainer", "indexer")


def is_ready(role: str, settings: Settings) -> bool:
    port = settings.serve.port if role == "serve" else getattr(settings, role).metrics_port
    found = scrape(f"http://127.0.0.1:{port}/metrics")
    return found.get("upwell_swaps_total{served}", 0) > 0 if role in ("worker", "serve") else bool(found)


def start(stage: Stage, settings: Settings, role: str, memory_mib: dict[str, float]) -> float:
    """Seconds until it is ready; what it and its children hold then goes into `memory_mib`."""
    began = time.monotonic()
    with stage.running(settings, "workers.cli", role) as process:
        await_true(lambda: is_ready(role, settings), f"{role} ready")
        took = time.monotonic() - began
        memory_mib[role] = rss_mib(process.pid)
    return took


def work(options: Options) -> tuple[dict[str, float], dict[str, float | str]]:
    num_items = 200 if options.quick else 10_000
    memory_mib: dict[str, float] = {}
    roles = ROLES[:1] if options.quick else ROLES
    with stage() as set_up:
        settings = set_up.fresh()
        model = data.made_up_model(num_items, data.SMALL, 200)
        announce(settings, data.items(num_items), data.generation(set_up.folder / "g1", model))
        contenders = {role: partial(start, set_up, settings, role, memory_mib) for role in roles}
        torch = partial(subprocess.run, [sys.executable, "-c", "import torch"], check=True)
        runs = alternate(contenders | {"import torch": lambda: seconds(torch)}, options.rounds)
    values = {f"ready_s {name}": figure for name, figure in medians(runs).items()}
    values |= {f"memory_mib {role}": mib for role, mib in memory_mib.items()}
    return {f"{role} / import torch": ratio(runs, role, "import torch") for role in roles}, values
