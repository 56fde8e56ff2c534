"""Apache Kafka's jars: pinned by Maven coordinates in jgo.toml, fetched once, checked at every start.

jgo resolves and downloads; it records SHA-256 sums in its lock and never looks at them again (measured),
so the check is here.
"""

import hashlib
import os
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stream.downloads import DOWNLOADS

LOCK = Path(__file__).with_name("jgo.lock.toml")
CACHE = DOWNLOADS / "kafka"


class BrokerError(RuntimeError):
    """The local broker cannot be brought up, and why."""


def fetch_jars(cache: Path = CACHE) -> list[Path]:
    """Paths of the locked jars under `cache`, in the lock's order; downloads what is missing.

    Raises BrokerError naming the jar whose SHA-256 is not the lock's.
    """
    jars = locked()
    if missing := {name: jar for name, jar in jars.items() if not (cache / name).exists()}:
        _download(missing, cache)
    for name, jar in jars.items():
        _check(jar, cache / name)
    return [cache / name for name in jars]


def locked() -> dict[str, dict[str, str]]:
    """File name -> the lock's entry, in its order."""
    return {f"{jar['artifactId']}-{jar['version']}.jar": jar for jar in tomllib.loads(LOCK.read_text())["dependencies"]}


def _download(jars: dict[str, dict[str, str]], cache: Path) -> None:
    """Into a folder beside the cache first: what is under its final name has been checked once."""
    try:
        from jgo.config import GlobalSettings
        from jgo.maven import MavenContext
    except ImportError as error:
        raise BrokerError("jgo is not installed: pip install 'upwell[local]'") from error
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as staging, ThreadPoolExecutor(8) as pool:
        maven = MavenContext(repo_cache=Path(staging), timeout=60)
        maven.remote_repos |= GlobalSettings.load().repositories  # a mirror of the user's, in ~/.config/jgo.conf

        def fetch(name: str) -> None:
            jar = jars[name]
            project = maven.project(jar["groupId"], jar["artifactId"])
            path: Path = project.at_version(jar["version"]).artifact().resolve()
            _check(jar, path)
            os.replace(path, cache / name)

        list(pool.map(fetch, jars))


def _check(jar: dict[str, str], path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != jar["sha256"]:
        raise BrokerError(
            f"{path.name}: SHA-256 is {found}, the lock says {jar['sha256']}; "
            f"if the cache was damaged, delete {path} and start again"
        )
