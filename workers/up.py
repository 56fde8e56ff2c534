"""All roles on one machine: started together, restarted when they fall, ended together.

Each role runs under stream/guard.py, in a session of its own: Ctrl-C reaches only this process, which ends
them in order, and a kill -9 of this process ends them too.
"""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import structlog

from stream import guard

log = structlog.get_logger()

ROLES = ("indexer", "trainer", "worker", "serve")
BACKGROUND = ("indexer", "trainer")  # they give way to those that answer, where all share the cores
BACKOFF_S = 1.0
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
        role_command = [sys.executable, "-m", "workers.cli", role]
        if role in BACKGROUND:
            role_command = ["nice", "-n", "5", *role_command]
        command = [sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), *role_command]
        out: Any = (self._logs / f"{role}.log").open("ab") if self._logs else None
        process = subprocess.Popen(
            command,
            env=os.environ | self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=out,
            start_new_session=True,
        )
        if out:
            out.close()
        assert process.stdout is not None
        with process.stdout as first_line:
            self.pids[role] = int(first_line.readline())
        self._running[role] = process

    def _restart_fallen(self) -> None:
        while not self._stopping.wait(BACKOFF_S):
            for role, process in list(self._running.items()):
                code = process.poll()
                if code is None or code in HOPELESS:
                    continue
                self.restarts += 1
                log.error("role restarted", role=role, code=code)
                self._start(role)
