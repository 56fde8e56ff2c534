"""All roles on one machine: started together, restarted when they fall, ended together.

Each role runs under stream/guard.py, in a session of its own: Ctrl-C reaches only this process, which ends
them in order, and a kill -9 of this process ends them too.
"""

import os
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any

import structlog

from stream.broker import LocalBroker
from stream.guard import guarded
from stream.kraft import require_free
from stream.ports import free_port
from stream.topics import ensure
from workers.processes import stop_on_signal
from workers.settings import Kafka, Serve, Settings, load_settings

log = structlog.get_logger()

ROLES = ("indexer", "trainer", "worker", "serve")
BACKGROUND = ("indexer", "trainer")  # they give way to those that answer, where all share the cores
BACKOFF_S = 1.0
LOOK_S = 0.5
LOG_BYTES = 50_000_000  # of a role's log; as much again of what was written before
KAFKA, LOGS = Path("data/kafka"), Path("data/logs")
# What the settings may say of a Kafka and a local one does not have.
NO_LOGIN = {"UPWELL_KAFKA__TLS": "false"} | {
    f"UPWELL_KAFKA__{name}": "null" for name in ("CA_FILE", "CERT_FILE", "KEY_FILE", "USERNAME", "PASSWORD", "REPLICAS")
}
HOPELESS = (2, 65)  # bad configuration, too many bad events: a restart would not help


class Roles:
    """The role processes; a context manager. `environment` is added to ours, `logs` is where they write."""

    def __init__(self, environment: dict[str, str], logs: Path | None = None) -> None:
        self._environment, self._logs = environment, logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.pids: dict[str, int] = {}
        self.restarts = 0
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._restart_fallen, name="roles", daemon=True)

    def __enter__(self) -> "Roles":
        for role in ROLES:
            self._start(role)
        self._watch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stopping.set()
        self._watch.join()
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            process.wait()

    @property
    def failed(self) -> str | None:
        """The role that ended for good, if one did: its log says why."""
        return next((role for role, process in self._running.items() if process.poll() in HOPELESS), None)

    def _start(self, role: str) -> None:
        command = [sys.executable, "-P", "-m", "workers.cli", role]  # -P: the working directory may hold a model.py
        if role in BACKGROUND:
            command = ["nice", "-n", "5", *command]
        if self._logs:
            self._logs.mkdir(parents=True, exist_ok=True)
        with (self._logs / f"{role}.log").open("ab") if self._logs else nullcontext() as out:
            self._running[role], pid = guarded(command, out, os.environ | self._environment)
        if pid:  # none: the guard could not start it, and is found ended at the next look
            self.pids[role] = pid

    def _restart_fallen(self) -> None:
        while not self._stopping.wait(BACKOFF_S):
            try:
                for role, process in list(self._running.items()):
                    code = process.poll()
                    if code is None or code in HOPELESS:
                        continue
                    self._start(role)
                    self.restarts += 1
                    log.error("role restarted", role=role, code=code)
                self._cap_logs()
            except OSError as error:  # no process or disk to be had now: the next look tries again
                log.error("roles not looked after", reason=str(error))

    def _cap_logs(self) -> None:
        """The roles append, so they write on at the new end; what they write between copy and cut is lost."""
        for file in self._logs.glob("*.log") if self._logs else ():
            if file.stat().st_size > LOG_BYTES:
                with suppress(OSError):  # a full disk: room comes first
                    shutil.copyfile(file, f"{file}.1")
                os.truncate(file, 0)


def run_up(bootstrap: str | None, home: Path | None) -> int:
    """All roles on this Kafka, or on a local one (`home`: as LocalBroker's), until a signal; the exit code.

    Raises BrokerError, also where serve's port is taken: another program would answer in its place; WrongTopic.
    """
    given = load_settings()
    if given.serve.port:
        require_free(given.serve.port)
    stop, own, ready, variables = stop_on_signal(), None, False, dict[str, str]()
    with ExitStack() as stack:
        if bootstrap is None:
            own = stack.enter_context(LocalBroker(KAFKA, home=home))
            bootstrap, variables = own.bootstrap, of_local_kafka(given.kafka)
            if "bootstrap" in given.kafka.model_fields_set and given.kafka.bootstrap != bootstrap:
                print(f"{given.kafka.bootstrap} is not used: --broker {given.kafka.bootstrap} would", file=sys.stderr)
        os.environ |= (variables := {"UPWELL_KAFKA__BOOTSTRAP": bootstrap} | variables)
        os.environ |= missing_ports(load_settings())
        settings = load_settings()
        ensure(settings.topics, settings.connection)
        roles = stack.enter_context(Roles({}, LOGS))
        export = " ".join(f"{name}={value}" for name, value in variables.items())
        print(f"export {export}  # in another terminal, for upwell's commands", flush=True)
        print(f"starting; what the roles say is in {LOGS}", flush=True)
        while not stop.wait(LOOK_S):
            if own and not own.running:
                print(f"Kafka has ended: see {KAFKA / 'broker.log'}", file=sys.stderr)
                return 1
            if roles.failed:
                print(f"{roles.failed} has ended for good: see {LOGS / roles.failed}.log", file=sys.stderr)
                return 1
            if not ready and (ready := _answers(settings.serve)):
                scheme = "https" if settings.serve.cert_file else "http"
                print(f"ready: {scheme}://{settings.serve.host}:{settings.serve.port}/", flush=True)
    return 0


def of_local_kafka(given: Kafka) -> dict[str, str]:
    """Variables that take back what the settings say of another Kafka."""
    plain = Kafka()
    fields = {name: name.removeprefix("UPWELL_KAFKA__").lower() for name in NO_LOGIN}
    return {name: NO_LOGIN[name] for name, field in fields.items() if getattr(given, field) != getattr(plain, field)}


def missing_ports(settings: Settings) -> dict[str, str]:
    """Variables that give each role a port of its own where the settings leave it open: serve asks the worker's."""
    ports = {
        "SERVE__PORT": settings.serve.port,
        "WORKER__METRICS_PORT": settings.worker.metrics_port,
        "TRAINER__METRICS_PORT": settings.trainer.metrics_port,
        "INDEXER__METRICS_PORT": settings.indexer.metrics_port,
    }
    return {f"UPWELL_{name}": str(free_port()) for name, port in ports.items() if port == 0}


def _answers(serve: Serve) -> bool:
    """uvicorn listens once all before it is done: then /livez answers, be it by HTTP or HTTPS."""
    try:
        socket.create_connection((serve.host, serve.port), timeout=LOOK_S).close()
    except OSError:
        return False
    return True
