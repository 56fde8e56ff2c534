"""For those who run it: health, metrics, figures, and the page."""

import time
from pathlib import Path

import numpy as np
from litestar import MediaType, Response, get
from litestar.exceptions import NotFoundException
from litestar.params import FromPath
from litestar.response import File
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

from stream.answers import Figures, GenerationFigures, HitRate, Latency
from workers.observe import scrape
from workers.routes import Served, route

CONSOLE = Path(__file__).with_name("console")
FILES = {f"/{path.relative_to(CONSOLE).as_posix()}": path for path in CONSOLE.rglob("*") if path.is_file()}


@get("/livez", sync_to_thread=False, media_type=MediaType.TEXT, summary="Alive", tags=["ops"], **route(None))
def livez() -> str:
    return "alive"


@get("/readyz", sync_to_thread=False, media_type=MediaType.TEXT, summary="Ready", tags=["ops"], **route(None, 503))
def readyz(service: Served) -> Response[str]:
    """200 once a generation is loaded and answers, and the users' states are caught up; 503 says which is missing."""
    missing = [
        name
        for name, there in {
            "generation": service.live.snapshot is not None and not service.live.search_died,
            "items": service.live.caught_up.is_set(),
            "states": service.users.caught_up.is_set(),
        }.items()
        if not there
    ]
    return Response(f"waiting for {', '.join(missing)}" if missing else "ready", status_code=503 if missing else 200)


@get("/metrics", sync_to_thread=False, media_type=MediaType.TEXT, summary="For Prometheus", tags=["ops"],
     **route("metrics"))  # fmt: skip
def prometheus() -> Response[bytes]:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


@get("/v1/figures", sync_to_thread=True, cache=1, summary="For charts", tags=["ops"], **route("read"))
def figures(service: Served) -> Figures:
    """At most one second old."""
    port, snapshot = service.settings.worker.metrics_port, service.live.snapshot
    latencies = service.updates.latencies_ms
    worker = scrape(f"http://127.0.0.1:{port}/metrics") if port else {}
    p50, p99 = np.percentile(latencies, [50, 99]).tolist() if latencies else (None, None)
    served, popularity = (worker.get(f"upwell_live_hit_rate_at_10{{{name}}}") for name in ("served", "popularity"))
    return Figures(
        now_ms=time.time_ns() // 1_000_000,
        generation=GenerationFigures(
            name=snapshot.name if snapshot else None,
            created_ms=snapshot.announced.created_ms if snapshot else None,
            items=len(snapshot.model.ids) if snapshot else 0,
            swaps=int(REGISTRY.get_sample_value("upwell_swaps_total", {"result": "served"}) or 0),
        ),
        events_total=service.users.applied,
        click_to_recommendation_ms=Latency(p50, p99),
        hit_rate=HitRate(served, popularity),
        streams=service.updates.num_open,
    )


@get("/", media_type=MediaType.HTML, sync_to_thread=False, include_in_schema=False, **route(None))
def page() -> str:
    """The console."""
    return (CONSOLE / "index.html").read_text(encoding="utf-8")


@get("/console/{file:path}", sync_to_thread=False, include_in_schema=False, **route(None))
def console(file: FromPath[str]) -> File:
    """Its files, without a key: they hold no data."""
    if file not in FILES:
        raise NotFoundException("no such file")
    return File(FILES[file], filename=FILES[file].name, content_disposition_type="inline")
