"""What `upwell demo` and `upwell up` have started ends with them: in order, and on kill -9 of them all the same."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kafka
import pytest

from stream.broker import LocalBroker
from stream.connection import Connection
from stream.guard import guarded
from stream.jars import BrokerError
from tests.workers.service import until
from workers import up
from workers.observe import scrape
from workers.settings import Settings, Worker

ROOT = Path(__file__).parents[2]
DEADLINE_S = 120.0
UPWELL = (sys.executable, "-m", "workers.cli")
DEMO = ("demo", "--port", "0", "--rate", "50")


def running_under(folder: Path) -> dict[int, str]:
    """Processes that were started for this test: their working folder is its own."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == folder:
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def environment() -> dict[str, str]:
    """Ours without settings, and what a process in a folder of its own needs of them."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("UPWELL_")}
    cache = str(ROOT / ".cache" / "upwell")
    return clean | {"PYTHONPATH": str(ROOT), "UPWELL_CACHE": cache, "UPWELL_SERVE__PORT": "0"}


@contextmanager
def running(folder: Path, *command: str, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """`upwell COMMAND`; whatever a test finds, nothing of it outlives the test."""
    with subprocess.Popen(
        [*UPWELL, *command],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        **{"stderr": subprocess.DEVNULL} | more,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            for left in running_under(folder):
                with suppress(ProcessLookupError):
                    os.kill(left, signal.SIGKILL)


def wait_until_gone(folder: Path) -> dict[int, str]:
    deadline = time.monotonic() + DEADLINE_S
    while (left := running_under(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_nothing_is_left_behind(tmp_path: Path, number: signal.Signals) -> None:
    wanted = ("kafka.Kafka", "cli worker", "cli trainer", "cli indexer", "cli serve", "workers.search")
    deadline = time.monotonic() + DEADLINE_S
    with running(tmp_path, *DEMO) as demo:
        while not all(any(name in line for line in running_under(tmp_path).values()) for name in wanted):
            assert demo.poll() is None, f"ended with {demo.returncode}"
            assert time.monotonic() < deadline, running_under(tmp_path)
            time.sleep(0.2)
        demo.send_signal(number)
        code = demo.wait(DEADLINE_S)
        assert wait_until_gone(tmp_path) == {}
    assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)


def test_a_check_that_does_not_hold_fails_and_still_prints_its_summary(broker: LocalBroker, tmp_path: Path) -> None:
    """40 events see no two swaps: the exit code says so, and the last line is the summary. On another Kafka."""
    with running(tmp_path, *DEMO, "--check", "--events", "40", "--broker", broker.bootstrap) as demo:
        out, _ = demo.communicate(timeout=150)
        assert demo.returncode == 1
        assert wait_until_gone(tmp_path) == {}
    with kafka.KafkaAdminClient(bootstrap_servers=broker.bootstrap) as admin:
        assert not [name for name in admin.list_topics() if name.startswith("demo-")]
    summary = json.loads(out.splitlines()[-1])
    assert (summary["events"], summary["applied"], summary["state_identical"]) == (40, 40, True)
    assert summary["broker"] == broker.bootstrap
    assert set(summary) == {
        "events", "applied", "dead_letters", "generations", "swaps", "requests", "failed_requests", "empty_requests",
        "hr10", "hr10_popularity", "click_to_recommendation_ms", "state_identical", "broker", "seconds",
    }  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_up_says_what_one_needs_and_ends_with_its_kafka(tmp_path: Path) -> None:
    with running(tmp_path, "up", stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        export, logs, ready = (process.stdout.readline() for _ in range(3))
        assert export.startswith("export UPWELL_KAFKA__BOOTSTRAP=127.0.0.1:") and "data/logs" in logs
        url = ready.removeprefix("ready: ").strip()
        assert scrape(f"{url}metrics")
        worker_log = tmp_path / "data" / "logs" / "worker.log"
        until(lambda: "metrics served" in worker_log.read_text(), "the worker says where its metrics are")
        told = next(json.loads(line) for line in worker_log.read_text().splitlines() if "metrics served" in line)
        assert scrape(told["url"])
        (serve, *_) = (pid for pid, line in running_under(tmp_path).items() if "cli serve" in line)
        port = told["url"].removesuffix("/metrics").rsplit(":", 1)[1]
        assert f"UPWELL_WORKER__METRICS_PORT={port}".encode() in Path(f"/proc/{serve}/environ").read_bytes()

        second = subprocess.run(
            [*UPWELL, "up"], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60
        )
        assert second.returncode == 1 and len(second.stderr.splitlines()) == 1 and "is in use" in second.stderr

        found = running_under(tmp_path).items()
        (java,) = (pid for pid, line in found if "kafka.Kafka" in line and "guard" not in line)
        os.kill(java, signal.SIGKILL)
        assert process.wait(DEADLINE_S) == 1
        assert process.stderr.read().splitlines()[-1] == "Kafka has ended: see data/kafka/broker.log"
        assert wait_until_gone(tmp_path) == {}


def test_a_role_whose_guard_cannot_fork_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "guard.py"
    script.write_text(
        f"import os, pathlib, sys, time\n"
        f"once = pathlib.Path({str(tmp_path)!r}) / sys.argv[-1]\n"
        "if not once.exists():\n    once.touch()\n    sys.exit(1)\n"
        "print(os.getpid(), flush=True)\ntime.sleep(60)\n"
    )
    monkeypatch.setattr("stream.guard.__file__", str(script))
    monkeypatch.setattr(up, "BACKOFF_S", 0.05)
    with up.Roles({}) as roles:
        until(lambda: roles.pids.keys() == set(up.ROLES), "each has been started again")
    assert roles.restarts == len(up.ROLES)


def test_roles_import_nothing_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = list[list[str]]()

    def taken(command: list[str], *_: object) -> tuple[SimpleNamespace, None]:
        commands.append(command)
        return SimpleNamespace(), None

    monkeypatch.setattr(up, "guarded", taken)
    up.Roles({})._start("worker")
    (tmp_path / "workers.py").touch()
    command = [*commands[0][:-1], "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_roles_are_restarted_after_a_look_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more processes, a full disk, or somebody tidied the logs away: the thread ended, and nothing was restarted."""
    script, failing = tmp_path / "guard.py", threading.Event()
    script.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    monkeypatch.setattr("stream.guard.__file__", str(script))
    monkeypatch.setattr(up, "BACKOFF_S", 0.05)
    tried = list[str]()

    def scarce(command: list[str], *rest: Any) -> Any:
        tried.append(command[-1])
        if failing.is_set():
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return guarded(command, *rest)

    monkeypatch.setattr(up, "guarded", scarce)
    with up.Roles({}, tmp_path / "logs") as roles:
        failing.set()
        shutil.rmtree(tmp_path / "logs")
        fallen = roles.pids["worker"]
        roles._running["worker"].kill()
        until(lambda: tried.count("worker") > 3, "it is tried again and again")
        failing.clear()
        until(lambda: roles.pids["worker"] != fallen, "the worker is started again")
    assert (tmp_path / "logs" / "worker.log").exists()


def test_logs_do_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "guard.py"
    script.write_text(
        "import os, sys, time\n"
        "print(os.getpid(), flush=True)\n"
        "while True:\n    print('line', file=sys.stderr, flush=True)\n    time.sleep(0.001)\n"
    )
    monkeypatch.setattr("stream.guard.__file__", str(script))
    monkeypatch.setattr(up, "BACKOFF_S", 0.02)
    monkeypatch.setattr(up, "LOG_BYTES", 1000)
    with up.Roles({}, tmp_path):
        until(lambda: len(list(tmp_path.glob("*.log.1"))) == len(up.ROLES), "each log has been copied")
        for log in tmp_path.glob("*.log"):
            until(lambda log=log: log.stat().st_size < 500, f"{log.name} has been cut", 20.0)  # type: ignore[misc]
    for log in tmp_path.glob("*.log*"):
        assert set(log.read_text().split()) <= {"line"}


def test_a_port_that_is_taken_is_told_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """serve would be restarted for ever, and "ready" said of whoever listens there."""
    monkeypatch.chdir(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("UPWELL_SERVE__PORT", str(port := taken.getsockname()[1]))
        with pytest.raises(BrokerError, match=f"port {port} is taken"):
            up.run_up(None, None)
    assert not list(tmp_path.iterdir())


def test_up_on_a_kafka_of_its_own_leaves_out_what_the_settings_say_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It spoke TLS to a broker that has none, and asked one broker for three replicas."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if "UPWELL_" not in name})
    other = {"BOOTSTRAP": "real:9093", "TLS": "true", "USERNAME": "me", "PASSWORD": "p", "REPLICAS": "3"}
    os.environ |= {f"UPWELL_KAFKA__{name}": value for name, value in other.items()}
    own, asked = SimpleNamespace(bootstrap="127.0.0.1:1", running=False), list[tuple[Connection, int | None]]()
    monkeypatch.setattr(up, "LocalBroker", lambda *_, **__: nullcontext(own))
    monkeypatch.setattr(up, "Roles", lambda *_: nullcontext(SimpleNamespace(failed=None)))
    monkeypatch.setattr(up, "ensure", lambda topics, connection: asked.append((connection, topics.clicks.replicas)))
    monkeypatch.setattr(up, "stop_on_signal", threading.Event)
    assert up.run_up(None, None) == 1
    assert asked == [(Connection("127.0.0.1:1"), None)]
    told = capsys.readouterr()
    assert "real:9093 is not used" in told.err
    export, _, _ = told.out.partition("  #")
    assert export.split() == [
        "export",
        "UPWELL_KAFKA__BOOTSTRAP=127.0.0.1:1",
        "UPWELL_KAFKA__TLS=false",
        "UPWELL_KAFKA__USERNAME=null",
        "UPWELL_KAFKA__PASSWORD=null",
        "UPWELL_KAFKA__REPLICAS=null",
    ]


@pytest.mark.parametrize("command", [("up",), DEMO], ids=["up", "demo"])
def test_a_folder_that_cannot_be_written_is_named_in_one_line(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "data").touch()
    done = subprocess.run([*UPWELL, *command], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "data" in line and "Errno" in line


def test_only_a_port_that_is_left_open_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("UPWELL_")]:  # the suite's service has all of them
        monkeypatch.delenv(name)
    given = up.missing_ports(Settings(worker=Worker(metrics_port=9100)))
    assert given.keys() == {"UPWELL_TRAINER__METRICS_PORT", "UPWELL_INDEXER__METRICS_PORT"}
