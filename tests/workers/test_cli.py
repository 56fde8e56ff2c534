"""What commands print, and how they end, in this process: without logging, which they set up for good."""

import fcntl
import json
import os
import re
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kafka
import pytest
from kafka.structs import OffsetAndMetadata
from typer.testing import Result

from stream.connection import Connection
from stream.consumer import MissingTopic, read_window
from stream.datasets import Dataset
from stream.events import DeadLetter, Erasure, decode, encode
from stream.jars import BrokerError
from stream.ports import free_port
from stream.producer import BufferFull, ClickProducer, DeliveryError, Producer
from stream.replay import replay
from tests.workers.console_fake import fake_api
from tests.workers.service import clicks, until, upwell_here
from workers import demo, erasure
from workers.arms import arm_of
from workers.backup import write_backup
from workers.check import fold_offline
from workers.cli import main
from workers.observe import Observer
from workers.settings import Arm, Privacy, Serve, Settings, Trainer, Worker

Upwell = Callable[..., Result]


class Ready(BaseHTTPRequestHandler):
    """Server and worker in one, once they serve a generation."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'# TYPE upwell_swaps_total counter\nupwell_swaps_total{result="served"} 1\n')


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    (tmp_path / "key").write_text("k" * 32)
    return settings.model_copy(update={"privacy": Privacy(key_file=tmp_path / "key")})


@pytest.fixture
def upwell(settings: Settings) -> Upwell:
    return partial(upwell_here, settings)


def said(settings: Settings) -> list[tuple[bytes | None, bytes | None]]:
    """Key and value of what stands in the clicks topic."""
    records = read_window(settings.connection, settings.topics.clicks.name)
    return [(record.key, record.value) for record in records]


def test_each_line_is_a_user_and_a_blank_one_is_none(upwell: Upwell, settings: Settings) -> None:
    done = upwell("erase", "-", input="u\n\n  \n v \n")
    assert (done.exit_code, done.stderr) == (0, "")
    assert len({json.loads(line)["receipt"] for line in done.stdout.splitlines()}) == 2
    assert settings.privacy.pseudonyms
    hidden = {settings.privacy.pseudonyms.of(user) for user in "uv"}
    assert {decode(value, Erasure).user_id for _, value in said(settings)} == hidden


@pytest.mark.parametrize("error", [DeliveryError, BufferFull, kafka.errors.KafkaConnectionError])
def test_no_receipt_is_lost_with_the_wish_that_fails(
    upwell: Upwell, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    asked: Any = erasure.ask

    def ask(producer: Any, user_id: str, longest_ms: Any) -> Any:
        if user_id == "v":
            raise error("Kafka is away")
        return asked(producer, user_id, longest_ms)

    monkeypatch.setattr(erasure, "ask", ask)
    done = upwell("erase", "u", "v")
    (receipt,) = done.stdout.splitlines()
    assert json.loads(receipt)["cleared"] is False
    assert done.exit_code == 1 and "Kafka is away" in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_erasure_of_nobody_is_refused(upwell: Upwell) -> None:
    done = upwell("erase")
    assert done.exit_code == 2 and "a user id" in done.stderr


@pytest.mark.parametrize("error", [DeliveryError, BufferFull, kafka.errors.KafkaTimeoutError, MissingTopic])
def test_a_kafka_that_is_away_is_one_line(
    settings: Settings, error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(_: Settings) -> None:
        raise error("nobody answers")

    monkeypatch.setattr("workers.command.settings_for", lambda role: settings)
    monkeypatch.setattr("workers.lag.read_offsets", away)
    monkeypatch.setattr(sys, "argv", ["upwell", "lag"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 1 and "nobody answers" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("command", [["lag"], ["erase", "u"], ["dead-letters", "list"]], ids=" ".join)
def test_a_kafka_without_topics_is_told_so(
    settings: Settings, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = settings.model_copy(update={"kafka": settings.kafka.model_copy(update={"prefix": "nowhere"})})
    monkeypatch.setattr("workers.command.settings_for", lambda role: empty)
    monkeypatch.setattr(sys, "argv", ["upwell", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.startswith("no such topic: nowhere.") and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "package", "extra", "module"),
    [
        (["evaluate", "ml-100k"], "matplotlib", "report", "workers.report"),
        (["bench", "scale"], "psutil", "bench", "workers.bench.harness"),
        (["bench", "search"], "faiss", "bench", "workers.bench.search"),
    ],
)
def test_what_only_an_extra_brings_is_named(
    command: list[str],
    package: str,
    extra: str,
    module: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A wheel with no extras: `upwell evaluate` ended with fifty lines of trace."""
    for name in (module, "workers.evaluate"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("workers.logs.configure", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["upwell", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert (ended.value.code, said) == (1, f"{package} is not installed: pip install 'upwell[{extra}]'\n")


def test_a_dead_letter_that_is_not_there_is_not_replayed(upwell: Upwell, settings: Settings) -> None:
    topics = settings.topics
    letter = DeadLetter(topic=topics.clicks.name, partition=0, offset=0, cause="", key=b"u", payload=b"{", ts_ms=0)
    with Producer(settings.connection) as producer:
        producer.send_raw(topics.dead_letters.name, b"place", encode(letter))
    done = upwell("dead-letters", "replay", "--offset", "0", "--offset", "999999")
    assert (done.exit_code, done.stderr) == (1, "no dead letter 999999: nothing is sent\n")
    assert said(settings) == []
    done = upwell("dead-letters", "replay", "--offset", "0")
    assert done.exit_code == 0 and said(settings) == [(b"u", b"{")]


def test_what_is_asked_and_limited(upwell: Upwell, settings: Settings, tmp_path: Path) -> None:
    topics = settings.topics
    with ClickProducer(settings.connection, topics) as producer:
        for click in clicks(30):
            producer.send(click)
        for at in range(3):
            letter = DeadLetter(topic="clicks", partition=0, offset=at, cause="c", key=None, payload=b"{", ts_ms=0)
            producer.send_raw(topics.dead_letters.name, b"%d" % at, encode(letter))
    done = upwell("lag")
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "30 clicks behind in all")
    done = upwell("dead-letters", "list", "--limit", "2")
    assert done.exit_code == 0 and [line.split()[1] for line in done.stdout.splitlines()] == [
        "clicks[0]@1",
        "clicks[0]@2",
    ]
    (tmp_path / "items.jsonl").write_text('{"item_id":"i","title":"t"}\n')
    event = '{"user_id":"u","item_id":"i","event_type":"click","ts":%d}\n'
    (tmp_path / "events.jsonl").write_text("".join(event % at for at in range(3)))
    assert "2 events and 1 items sent" in upwell("replay", str(tmp_path), "--limit", "2").stdout
    assert len(said(settings)) == 32
    assert upwell("topics", "describe").exit_code == 0
    other = settings.model_copy(update={"kafka": settings.kafka.model_copy(update={"partitions": 5})})
    done = upwell_here(other, "topics", "describe")
    assert done.exit_code == 1 and "3 partitions, the settings say 5" in done.stdout


def test_an_erasure_is_waited_for_and_asked_after(
    upwell: Upwell, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one who commits, and so clears, is here the command's own pause."""

    def commit(_: float) -> None:
        with closing(kafka.KafkaConsumer(**settings.connection.kafka_python(), group_id=settings.group)) as group:
            parts = [kafka.TopicPartition(settings.topics.clicks.name, part) for part in range(3)]
            group.assign(parts)
            group.commit({part: OffsetAndMetadata(end, "", -1) for part, end in group.end_offsets(parts).items()})

    def cleared(*arguments: str) -> list[bool]:
        done = upwell("erase", *arguments)
        assert done.exit_code == 0, done.output
        return [json.loads(line)["cleared"] for line in done.stdout.splitlines()]

    receipt = json.loads(upwell("erase", "u").stdout)["receipt"]
    assert cleared("--status", receipt) == [False]
    monkeypatch.setattr("workers.cli_erase.time", SimpleNamespace(sleep=commit))
    assert cleared("v", "--wait") == [False, True]
    assert cleared("--status", receipt) == [True]


def test_arms_are_told(settings: Settings) -> None:
    """By the id that stands in the topics."""
    tested = settings.model_copy(update={"arms": {"wide": Arm(share=0.5)}})
    assert tested.privacy.pseudonyms
    dealt = {user: arm_of(tested, tested.privacy.pseudonyms.of(user)) for user in "abcdefgh"}
    assert dealt != {user: arm_of(tested, user) for user in dealt}
    assert {user: upwell_here(tested, "arms", "of", user).stdout.strip() for user in dealt} == dealt
    done = upwell_here(tested, "arms", "report", "--hours", "1")
    assert done.exit_code == 0
    assert [line.split()[:2] for line in done.stdout.splitlines()[1:]] == [["default", "0"], ["wide", "0"]]


def test_an_export_that_cannot_be_written_says_so(upwell: Upwell, tmp_path: Path) -> None:
    done = upwell("export", str(tmp_path / "none" / "all.jsonl"))
    assert done.exit_code == 1 and "No such file" in done.stderr and len(done.stderr.splitlines()) == 1
    done = upwell("export", str(tmp_path))
    assert (done.exit_code, done.stderr) == (1, f"{tmp_path} is a folder\n")


def test_an_export_that_is_interrupted_leaves_nothing_of_the_users(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "out").mkdir()
    monkeypatch.setattr("workers.backup.raw_states", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_backup(settings, tmp_path / "out" / "all.jsonl.gz")
    assert not list((tmp_path / "out").iterdir())


def test_a_replay_shows_no_user_id(upwell: Upwell, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"item_id":"i","title":"t"}\n')
    (tmp_path / "events.jsonl").write_text('{"user_id":"someone","item_id":"i","event_type":"click","ts":1}\n')
    done = upwell("replay", str(tmp_path))
    assert done.exit_code == 0, done.output
    ((key, value),) = said(settings)
    assert settings.privacy.pseudonyms and key == settings.privacy.pseudonyms.of("someone").encode()
    assert b"someone" not in (value or b"someone")


def test_a_replay_of_nothing_says_so(upwell: Upwell) -> None:
    done = upwell("replay", "nowhere")
    assert done.exit_code == 1 and "nowhere: no items.jsonl" in done.stderr


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        (b'{"user_id":"u","item_id":"i","event_type":"view"}', "events.jsonl, line 1: .*ts"),
        (b'{"user_id":"u","item_id":"caf\xe9","event_type":"view","ts":1}', "events.jsonl, line 1: .*utf-8"),
        (b'{"user_id":"%s","item_id":"i","event_type":"view","ts":1}' % (b"u" * 300), "user_id"),
    ],
)
@pytest.mark.parametrize("command", [["replay"], ["demo", "--port", "0", "--stream"]], ids=["replay", "demo"])
def test_a_stream_that_cannot_be_read_is_one_line(
    upwell: Upwell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str], line: bytes, cause: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "items.jsonl").write_text('{"item_id":"i","title":"t"}\n')
    (tmp_path / "events.jsonl").write_bytes(line)
    done = upwell(*command, str(tmp_path))
    assert done.exit_code == 1 and re.search(cause, done.stderr) and len(done.stderr.splitlines()) == 1, done.output


def test_a_port_that_is_none_is_refused(upwell: Upwell) -> None:
    done = upwell("demo", "--port", "70000")
    assert done.exit_code == 2 and "65535" in done.stderr


def test_a_demo_stands_beside_the_installation_that_the_environment_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "configure", lambda *_: None)
    for name in [name for name in os.environ if name.startswith("UPWELL_")]:
        monkeypatch.delenv(name)
    real = {
        "UPWELL_KAFKA__BOOTSTRAP": "real:9092",
        "UPWELL_KAFKA__PREFIX": "real",
        "UPWELL_ARTIFACTS": "s3://real",
        "UPWELL_WORKER__GROUP": "real",
        "UPWELL_SERVE__PORT": "80",
        "UPWELL_WORKER__METRICS_PORT": "9100",
        "UPWELL_TRAINER__METRICS_PORT": "9100",
        "UPWELL_INDEXER__METRICS_PORT": "9100",
        "UPWELL_METRICS_HOST": "192.0.2.1",
        "UPWELL_SERVE__HOST": "192.0.2.1",
        "UPWELL_SERVE__KEYS_FILE": "/keys",
        "UPWELL_SERVE__CERT_FILE": "/dev/null",
        "UPWELL_SERVE__KEY_FILE": "/dev/null",
    }
    login = {
        "UPWELL_KAFKA__TLS": "true",
        "UPWELL_KAFKA__CA_FILE": "/ca",
        "UPWELL_KAFKA__USERNAME": "me",
        "UPWELL_KAFKA__PASSWORD": "p",
        "UPWELL_KAFKA__REPLICAS": "3",
    }
    for name, value in (real | login | {"UPWELL_WORKER__K": "30"}).items():
        monkeypatch.setenv(name, value)
    made = demo._settings("own:9092", 8081, local=False)
    assert made.kafka.username == "me" and made.kafka.tls and made.kafka.replicas == 3  # --broker: as the settings say
    made = demo._settings("own:9092", 8081, local=True)
    assert made.connection == Connection("own:9092") and made.kafka.replicas is None
    assert (made.serve.host, made.metrics_host) == ("127.0.0.1", "127.0.0.1")
    assert (made.serve.keys_file, made.serve.cert_file, made.serve.key_file) == (None, None, None)
    assert (made.kafka.bootstrap, made.serve.port, made.worker.k) == ("own:9092", 8081, 30)
    assert {name: os.environ[name] for name in real}.items().isdisjoint(real.items())
    assert "real" not in (made.artifacts, made.kafka.prefix, made.group)


def test_a_demo_beside_another_service_refuses_and_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would ask that service's API and judge its answers, or empty the folder of the demo that runs."""
    monkeypatch.setattr(demo, "FOLDER", tmp_path)
    monkeypatch.setattr(demo, "load_dataset", lambda _: Dataset("x", [], []))
    (kept := tmp_path / "kafka").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BrokerError, match=f"port {port} is taken"):
            demo.run_demo(demo.DemoOptions(True, "x", 10, 1.0, port, None, None))
    with (kept / "broker.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(str(os.getpid()))
        lock.flush()
        with pytest.raises(BrokerError, match="in use"):
            demo.run_demo(demo.DemoOptions(True, "x", 10, 1.0, 0, None, None))
    assert (kept / "broker.lock").exists()
    with open(f"{tmp_path}.lock", "w") as other:  # of a demo on a Kafka that is not local
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(BrokerError, match="in use by another demo"):
            demo.run_demo(demo.DemoOptions(True, "x", 10, 1.0, 0, "127.0.0.1:1", None))
    assert (kept / "broker.lock").exists()


def test_a_demo_sends_and_is_judged_by_what_stands_in_the_topics(settings: Settings) -> None:
    sent = clicks(20, users=3)
    options = demo.DemoOptions(True, "x", 10, 1e6, 0, None, None)
    observer: Any = SimpleNamespace(url="")
    made = demo.Demo(settings, Dataset("x", [], sent), options, observer, threading.Event())
    with ClickProducer(settings.connection, settings.topics) as producer:
        assert len(list(replay(producer, made.events, 1e6, made.stop))) == 10
    assert settings.privacy.pseudonyms
    hidden = {settings.privacy.pseudonyms.of(click.user_id) for click in sent}
    assert {key.decode() for key, _ in said(settings) if key} == fold_offline(made.events, settings).keys() == hidden


def test_a_demo_asks_for_whatever_a_user_is_called() -> None:
    with fake_api() as (fake, url):
        watching = Observer(Settings(serve=Serve(port=int(url.rsplit(":", 1)[1].strip("/")))))
        fake.clicks["a b/c?ü"] = ["i1"]
        watching.user_id = "a b/c?ü"
        asking = threading.Thread(target=watching._ask)
        asking.start()
        until(lambda: watching.requests > 1, "it has asked")
        watching._stop.set()
        asking.join()
    assert watching.failed_requests == watching.empty_requests == 0


def test_a_proxy_is_not_asked_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind one the demo waited three minutes for a service that was ready, and ended."""
    asked = threading.Thread(
        target=(server := HTTPServer(("127.0.0.1", 0), Ready)).serve_forever, args=(0.05,), daemon=True
    )
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("urllib.request._opener", None)  # that an earlier test's environment has made
    port, stop = server.server_port, threading.Event()
    asked.start()
    try:
        watching = Observer(Settings(serve=Serve(port=port), worker=Worker(metrics_port=port)))
        assert watching.await_ready(2.0, stop)
    finally:
        server.shutdown()
        server.server_close()


def test_roles_of_one_machine_do_not_fight_for_a_port(
    settings: Settings,
) -> None:
    """The image sets 9100 for each."""
    worker, trainer = (kind(metrics_port=9100) for kind in (Worker, Trainer))
    shared = settings.model_copy(update={"worker": worker, "trainer": trainer})
    done = upwell_here(shared, "up")
    assert done.exit_code == 2 and "metrics_port, 9100" in done.stderr
