"""A real Prometheus of Debian's package on deploy/prometheus: its configuration, with other targets and seconds."""

import json
import os
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from stream.ports import free_port
from tests.workers.service import until

FOLDER = Path(__file__).parents[2] / "deploy/prometheus"
RULES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((FOLDER / "rules").glob("*.yml"))}

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None and "CI" not in os.environ,
    reason="no Prometheus here: apt-get install --no-install-recommends prometheus",
)


class Prometheus:
    """Its HTTP API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
            return json.load(answer)["data"]

    def query(self, expr: str) -> list[float]:
        """Values of an instant query."""
        return [float(sample["value"][1]) for sample in self.get("query", query=expr)["result"]]

    @property
    def up(self) -> dict[str, str]:
        """Job -> health of its target."""
        return {target["labels"]["job"]: target["health"] for target in self.get("targets")["activeTargets"]}

    def answers(self) -> bool:
        try:
            self.get("query", query="1")
        except OSError:
            return False
        return True


@contextmanager
def running_prometheus(folder: Path, targets: Mapping[str, str]) -> Iterator[Prometheus]:
    """targets: job -> HOST:PORT; every job of the configuration has to have one."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        del job["dns_sd_configs"]
        job.pop("authorization", None)  # on loopback no key is asked for
        job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
    shutil.copytree(FOLDER / "rules", folder / "rules")
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        prometheus = Prometheus(f"http://{address}")
        until(prometheus.answers, "Prometheus answers")
        yield prometheus
    finally:
        process.terminate()
        process.wait()
