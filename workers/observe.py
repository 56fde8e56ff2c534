"""What the demo sees of the service from outside: its topic, its API, its metrics."""

import http.client
import json
import math
import threading
import time
import urllib.request
from typing import Any, Self
from urllib.parse import quote

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from stream.consumer import committed_offsets
from stream.subscriber import Subscriber
from workers.settings import Settings

REQUESTS_A_SECOND = 20.0
# Of this machine's roles: by http_proxy urllib would ask a proxy for 127.0.0.1, too.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def scrape(url: str) -> dict[str, float]:
    """Samples of an exporter by name, label values in braces; empty when it does not answer, or not so."""
    try:
        with DIRECT.open(url, timeout=2) as answer:
            text = answer.read().decode()
        return {
            sample.name + (f"{{{','.join(sample.labels.values())}}}" if sample.labels else ""): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    except (OSError, http.client.HTTPException, ValueError):
        return {}


def num_committed(settings: Settings) -> int:
    """Clicks below the worker group's committed offsets: applied, answered and in Kafka for good."""
    return sum(committed_offsets(settings.connection, settings.group, settings.topics.clicks.name).values())


class Observer:
    """A subscriber of the recommendations topic and a client of the API; a context manager."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._stop = settings, threading.Event()
        self._address = f"127.0.0.1:{settings.serve.port}"
        self.url = f"http://{self._address}/"
        self.requests = self.failed_requests = self.empty_requests = 0
        self.generations: set[str] = set()
        self.generation = ""
        self._latency_ms: list[float] = []
        self.user_id: str | None = None  # whose list the next request asks for
        self._began = time.monotonic()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._subscribe, self._ask)]

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def await_ready(self, timeout_s: float, stop: threading.Event) -> bool:
        """Until server and worker serve a generation; False when that takes too long or `stop` is set."""
        deadline = time.monotonic() + timeout_s
        while not stop.wait(0.2) and time.monotonic() < deadline:
            try:
                with DIRECT.open(f"{self.url}readyz", timeout=2):
                    if self.num_generations() > 0:
                        return True
            except OSError:
                continue
        return False

    def _subscribe(self) -> None:
        """A downstream service: from Kafka's stamp of a list's newest click until the list is in our hands."""
        with Subscriber(self._settings.connection, self._settings.topics) as subscriber:
            while not self._stop.is_set():
                for answer in subscriber.poll(0.2):
                    self._latency_ms.append(time.time() * 1000 - answer.clicked_ms)
                    self.generations.add(answer.generation)
                    self.generation = answer.generation

    def _ask(self) -> None:
        """Requests without pause, swaps or not."""
        connection = http.client.HTTPConnection(self._address, timeout=5)
        while not self._stop.wait(1 / REQUESTS_A_SECOND):
            if self.user_id is None:
                continue
            self.requests += 1
            try:
                connection.request("GET", f"/v1/users/{quote(self.user_id, safe='')}/recommendations?k=10")
                answer = connection.getresponse()
                body = json.loads(answer.read())
                self.failed_requests += answer.status != 200
                self.empty_requests += answer.status == 200 and not body["items"]
            except (OSError, http.client.HTTPException, ValueError):
                self.failed_requests += 1
                connection.close()

    def _worker(self) -> dict[str, float]:
        return scrape(f"http://127.0.0.1:{self._settings.worker.metrics_port}/metrics")

    def num_generations(self) -> int:
        """Taken in by the worker since its start."""
        return int(self._worker().get("upwell_swaps_total{served}", 0))

    def num_applied(self) -> int:
        return int(self._worker().get("upwell_clicks_total{applied}", 0))

    def clicks_a_second(self, sent: int) -> float:
        return sent / max(1e-3, time.monotonic() - self._began)

    def latency_ms(self, newest: int = 0) -> tuple[float, float]:
        """p50 and p99 over the newest so many lists, 0: all."""
        p50, p99 = np.percentile(self._latency_ms[-newest:] or [math.nan], [50, 99])
        return float(p50), float(p99)

    def hit_rates(self) -> tuple[float, float, int]:
        """HR@10 of the served lists and of decayed popularity over all scored clicks, and how many they are."""
        found = self._worker()
        scored = found.get("upwell_scored_clicks_total", 0)
        served, popular = (found.get(f"upwell_hits_total{{{name}}}", 0) for name in ("served", "popularity"))
        return served / (scored or math.nan), popular / (scored or math.nan), int(scored)
