"""The pipeline on a real Kafka, every role a process: what a click does, and what no crash undoes."""

import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from itertools import count, islice
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
import torch

from model.config import PER_ITEM
from model.generation import build_generation
from model.manifest import MANIFEST, manifest_sha256
from model.model import Model
from model.user_state import decode_state
from stream.broker import LocalBroker
from stream.consumer import end_offsets, read_window
from stream.events import Artifact, Click, DeadLetter, Item, Recommendations, decode, encode
from stream.ports import free_port
from stream.producer import ClickProducer, Producer
from stream.topics import ensure
from tests.workers.service import ITEMS, Service, clicks, until, upwell
from workers.announcements import read_announcements
from workers.check import count_applied, fold_offline
from workers.dead_letters import read, resend
from workers.observe import num_committed, scrape
from workers.settings import Kafka, Settings
from workers.up import HOPELESS

SENT = clicks(400)


def lists(service: Service) -> list[Recommendations]:
    records = read_window(service.settings.connection, service.settings.topics.recommendations.name)
    return [decode(record.value, Recommendations) for record in records]


def recommended(service: Service, user_id: str, k: int = 20) -> list[str]:
    status, answer = service.call(f"/v1/users/{user_id}/recommendations?k={k}")
    assert status == 200, answer
    return [item["item_id"] for item in answer["items"]]


def test_clicks_become_states_and_lists(service: Service) -> None:
    service.send(SENT)
    until(lambda: count_applied(SENT, service.states()) == len(SENT), "all clicks are applied")
    assert service.states() == fold_offline(SENT, service.settings)
    newest = {answer.user_id: answer for answer in lists(service)}
    assert newest.keys() == {click.user_id for click in SENT}
    for user_id, answer in newest.items():
        seen = {click.item_id for click in SENT if click.user_id == user_id}
        offered = [place.item_id for place in answer.items]
        assert len(offered) == len(set(offered)) == 20
        assert not seen & set(offered)
        assert answer.offset == decode_state(service.states()[user_id]).offset
        assert answer.clicked_ms <= answer.sent_ms
        assert [place.score for place in answer.items] == sorted((p.score for p in answer.items), reverse=True)


def test_the_api_answers_from_the_same_state(service: Service) -> None:
    status, answer = service.call("/v1/users/u1/recommendations?k=7")
    assert status == 200
    assert len(answer["items"]) == 7
    assert answer["source"] == "personal"
    assert answer["as_of"]["offset"] == decode_state(service.states()["u1"]).offset
    assert all(item["title"] for item in answer["items"])
    status, stranger = service.call("/v1/users/nobody/recommendations")
    assert (status, stranger["source"], len(stranger["items"])) == (200, "popular", 20)
    assert service.call("/v1/users/u1/recommendations?k=0")[0] == 400


def test_training_rounds_are_served_and_learn(service: Service) -> None:
    """Users walk through one shelf each; a trained generation knows the next item."""
    until(lambda: service.metric("upwell_swaps_total{served}") >= 2, "a trained generation serves in the worker")
    until(lambda: service.metric("upwell_swaps_total{served}", "serve") >= 2, "and in the server")
    following = clicks(440)[400:]
    known = sum(click.item_id in recommended(service, click.user_id, 3) for click in following)
    assert known >= 30  # of 40; chance is 1


def test_a_click_over_http_moves_the_list(service: Service) -> None:
    before = recommended(service, "http-user")
    status, answer = service.call("/v1/events", [{"user_id": "http-user", "item_id": before[0], "event_type": "like"}])
    assert (status, answer["accepted"], answer["rejected"]) == (202, 1, [])
    until(lambda: before[0] not in recommended(service, "http-user"), "the clicked item leaves the list")
    assert len(recommended(service, "http-user", 100)) == 100


@pytest.mark.parametrize(
    ("path", "body", "cause"),
    [
        ("/v1/events", b"{", "truncated"),
        ("/v1/events", {"user_id": "u"}, "item_id"),
        ("/v1/events", {"user_id": "u", "item_id": "i", "surprise": 1}, "surprise"),
        ("/v1/events", {"user_id": "u", "item_id": "i", "ts_ms": 99_999_999_999_999}, "in the future"),
        ("/v1/items", {"item_id": "x"}, "title"),
    ],
)
def test_bad_requests_are_refused_by_name(service: Service, path: str, body: object, cause: str) -> None:
    status, answer = service.call(path, body)
    assert status == 400
    assert cause in answer["detail"]


def test_oversized_bodies_are_refused(service: Service) -> None:
    """By the length that they announce: nothing of them is read."""
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", "/v1/events")
    connection.putheader("Content-Length", str(2 << 20))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_bad_messages_become_dead_letters_and_stop_nothing(service: Service) -> None:
    good = clicks(3, users=3, first=100_000)
    bad = {
        b"not json": "malformed",
        b'{"event_id":"x","user_id":"u","item_id":7,"ts_ms":1}': "item_id",
        b'{"event_id":"x","user_id":"u","item_id":"i","ts_ms":1,"value":NaN}': "malformed",
        b'{"version":9,"event_id":"x","user_id":"u","item_id":"i","ts_ms":1}': "version",
        b'{"event_id":"x","user_id":"u","item_id":"i","ts_ms":99999999999999}': "future",
        b'{"event_id":"x","user_id":"someone else","item_id":"i","ts_ms":1}': "key",
        b"x" * 900_000: "size",
        b"\xff\xfe": "malformed",
    }
    topic = service.settings.topics.clicks.name
    producer = Producer(service.settings.connection)
    for raw in bad:
        producer.send_raw(topic, b"u", raw)
    producer.send_raw(topic, b"u", None)
    producer.close()
    service.send(good)
    until(lambda: count_applied(good, service.states()) == 3, "good clicks behind bad ones are applied")
    until(lambda: len(read(service.settings)) == len(bad) + 1, "every bad message has a dead letter")
    letters = [letter for _, letter in read(service.settings)]
    for raw, cause in bad.items():
        (found,) = [letter for letter in letters if letter.payload is not None and raw.startswith(letter.payload)]
        assert cause in found.cause
        assert (found.topic, found.key) == (topic, b"u")
    assert len({(letter.partition, letter.offset) for letter in letters}) == len(letters)
    assert service.roles.restarts == 0


def test_an_item_is_recommended_as_soon_as_it_is_encoded(service: Service) -> None:
    """It is in no generation yet: the fresh segment has it. Once it is taken away, it is gone at once."""
    new = Item(item_id="new-one", title=f"{ITEMS[2].categories[0]}, the newest part", categories=ITEMS[2].categories)
    assert service.call("/v1/items", msgspec.to_builtins(new))[0] == 202
    until(lambda: "new-one" in recommended(service, "u2", 150), "the new item can be recommended")
    with ClickProducer(service.settings.connection, service.settings.topics) as producer:
        producer.remove_item("new-one")
    until(lambda: "new-one" not in recommended(service, "u2", 150), "the removed item is recommended no more")
    hidden = msgspec.structs.replace(ITEMS[8], available=False)
    assert service.call("/v1/items", msgspec.to_builtins(hidden))[0] == 202
    until(lambda: ITEMS[8].item_id not in recommended(service, "nobody", 150), "an unavailable item is hidden")


def test_a_click_on_an_item_not_seen_yet_is_kept(service: Service) -> None:
    early = Click(event_id="early", user_id="early-user", item_id="not-yet", ts_ms=time.time_ns() // 1_000_000)
    service.send([early])
    until(lambda: "early-user" in service.states(), "its user has a state")
    assert decode_state(service.states()["early-user"]).history[0].item_id == "not-yet"
    assert len(recommended(service, "early-user")) == 20


def test_a_bad_generation_is_refused_and_the_old_one_serves(service: Service) -> None:
    serving = service.call("/v1/users/u1/recommendations")[1]["generation"]
    refused = service.metric("upwell_swaps_total{refused}", "serve")
    (service.logs / "damaged").mkdir()
    (service.logs / "damaged" / MANIFEST).write_text("{}")
    bad = Artifact(name="bad", url=str(service.logs / "damaged"), manifest_sha256="0" * 64, created_ms=1, encoder="?")
    producer = Producer(service.settings.connection)
    producer.send_raw(service.settings.topics.generations.name, b"generation", encode(bad))
    producer.close()
    until(lambda: service.metric("upwell_swaps_total{refused}", "serve") > refused, "the generation is refused")
    assert service.call("/v1/users/u1/recommendations")[1]["generation"] == serving
    assert MANIFEST in service.log("serve")
    killed = service.roles.pids["worker"]
    os.kill(killed, signal.SIGKILL)
    until(lambda: service.roles.pids["worker"] != killed, "the worker is started again")
    until(lambda: service.metric("upwell_swaps_total{served}") == 1, "it serves the one before the bad newest")
    assert service.metric("upwell_swaps_total{refused}") == 1
    assert service.metric(f"upwell_generation_info{{{serving}}}") == 1


def test_the_way_back(service: Service) -> None:
    """Rolled back by hand, pinned and unpinned: the server follows each time."""

    def generations(*arguments: str) -> str:
        done = upwell("generations", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def serving() -> str:
        return str(service.call("/v1/users/u1/recommendations")[1]["generation"])

    names = [line.split()[0] for line in generations("list").splitlines() if not line.startswith("bad")]
    newest, earlier = serving(), names[0]
    assert newest != earlier
    generations("pin", earlier)
    until(lambda: serving() == earlier, "the pinned one serves")
    assert f"{earlier}  pinned" in generations("list")
    generations("pin")
    until(lambda: serving() == newest, "without the pin the newest serves again")
    generations("rollback", earlier)
    until(lambda: serving() == earlier, "the one announced again serves")
    assert generations("list").splitlines()[-1].startswith(f"{earlier}  serves")
    assert json.loads(generations("show", earlier))["version"] == earlier
    generations("rollback", newest)
    until(lambda: serving() == newest, "and back again")
    unknown = upwell("generations", "rollback", "nothing")
    assert unknown.returncode == 1
    assert "no generation nothing" in unknown.stderr


def test_a_planted_drop_is_rolled_back_by_itself(service: Service, tmp_path: Path) -> None:
    """A generation that is whole and answers its probes, of a model whose items have changed places."""
    settings = service.settings
    good = read_announcements(settings).wanted()[0]
    model = Model.load(Path(good.url.removeprefix("file://")) / "model")
    shuffled = torch.from_numpy(np.random.default_rng(0).permutation(len(model.ids)))
    mixed = {name: array[shuffled] if name in PER_ITEM else array for name, array in model.arrays.items()}
    broken = Model(model.config, model.ids, mixed, model.tower)
    build_generation(tmp_path / "drop", broken, version="drop", encoder=good.encoder, offsets={})
    sha = manifest_sha256(tmp_path / "drop")
    drop = msgspec.structs.replace(good, name="drop", url=str(tmp_path / "drop"), manifest_sha256=sha)
    producer = Producer(settings.connection)
    producer.send_raw(settings.topics.generations.name, b"drop", encode(drop))
    producer.close()
    trainer = service.roles.pids["trainer"]
    os.kill(trainer, signal.SIGSTOP)  # its next round would replace the drop, too
    try:
        until(lambda: service.metric("upwell_generation_info{drop}") == 1, "the drop serves")
        again = [msgspec.structs.replace(click, user_id=f"again-{click.user_id}") for click in clicks(400)]
        service.send([msgspec.structs.replace(click, event_id=f"again-{click.event_id}") for click in again])
        until(lambda: service.metric("upwell_rollbacks_total") >= 1, "it is rolled back")
        until(lambda: service.metric(f"upwell_generation_info{{{good.name}}}") == 1, "the one before serves again")
    finally:
        os.kill(trainer, signal.SIGCONT)


def test_a_store_that_cannot_be_written_stops_nothing(service: Service) -> None:
    """A file where its folder was: writes and reads fail (root heeds no permissions). Nothing falls."""
    store, restarts = service.logs / "artifacts", service.roles.restarts
    published = service.log("indexer").count("generation published")
    store.rename(service.logs / "away")
    store.write_text("")
    try:
        users = [msgspec.structs.replace(click, event_id=f"full-{click.event_id}") for click in clicks(400)]
        service.send([msgspec.structs.replace(click, user_id=f"full-{click.user_id}") for click in users])
        until(lambda: "model not stored" in service.log("trainer"), "the trainer says so")
        new = Item(item_id="while-full", title="Encoded all the same")
        assert service.call("/v1/items", msgspec.to_builtins(new))[0] == 202
        until(lambda: "while-full" in recommended(service, "u2", 150), "new items are still taken in")
        good, models = read_announcements(service.settings).wanted()[0], service.settings.topics.models.name
        there = msgspec.structs.replace(good, name="there", url=f"{store}/there")
        with Producer(service.settings.connection) as producer:
            producer.send_raw(models, b"there", encode(there))
        until(lambda: "generation not stored" in service.log("indexer"), "the indexer says so, too")
        assert len(recommended(service, "u1")) == 20
    finally:
        store.unlink()
        (service.logs / "away").rename(store)
    turn = count()

    def published_again() -> bool:
        """New users click until a candidate wins: what the same ones click again is no evidence at the gate."""
        name = f"space{next(turn)}"
        mine = [msgspec.structs.replace(click, event_id=f"{name}-{click.event_id}") for click in clicks(400)]
        service.send([msgspec.structs.replace(click, user_id=f"{name}-{click.user_id}") for click in mine])
        time.sleep(2)
        return service.log("indexer").count("generation published") > published

    until(published_again, "a generation is published again")
    assert service.roles.restarts == restarts


def test_a_search_process_that_dies_is_replaced(service: Service) -> None:
    """Its death costs time, never an answer."""
    makers = [service.roles.pids[role] for role in ("trainer", "indexer")]
    for maker in makers:
        os.kill(maker, signal.SIGSTOP)  # another generation has other lists
    try:
        newest = read_announcements(service.settings).wanted()[0].name
        until(lambda: service.metric(f"upwell_generation_info{{{newest}}}", "serve") == 1, "the newest serves")
        status, before = service.call("/v1/users/u1/recommendations")
        children = psutil.Process(service.roles.pids["serve"]).children()
        (server,) = (child for child in children if "workers.search" in child.cmdline())
        for one in (*server.children(), server):
            one.kill()
            status, after = service.call("/v1/users/u1/recommendations")
            assert (status, after["items"]) == (200, before["items"])
    finally:
        for maker in makers:
            os.kill(maker, signal.SIGCONT)


def test_the_worker_killed_amid_clicks_loses_and_doubles_nothing(service: Service) -> None:
    """SIGKILL three times while 3,000 clicks flow, more often where that left nothing to apply twice: the states come
    within 0.1 s, the commit of the offsets after half a second or more. To look at the states would take as long.
    """
    mine = [
        msgspec.structs.replace(click, event_id=f"kill-{click.event_id}", user_id=f"kill-{click.user_id}")
        for click in clicks(8000)
    ]
    sent, duplicates = 0, 0.0
    while sent < 3000 or (sent < 8000 and not duplicates):
        sent += 1000
        service.send(mine[sent - 1000 : sent])
        time.sleep(sent / 10_000)
        killed = service.roles.pids["worker"]
        os.kill(killed, signal.SIGKILL)
        until(lambda killed=killed: service.roles.pids["worker"] != killed, "the worker is started again")  # type: ignore[misc]
        until(lambda sent=sent: count_applied(mine[:sent], service.states()) == sent, "every click is in a state once")  # type: ignore[misc]
        ends = sum(end_offsets(service.settings.connection, service.settings.topics.clicks.name).values())
        until(lambda ends=ends: num_committed(service.settings) == ends, "its successor has read the rest")  # type: ignore[misc]
        duplicates += service.metric("upwell_clicks_total{duplicate}")
    states = [decode_state(raw) for user_id, raw in service.states().items() if user_id.startswith("kill-")]
    assert sum(state.applied for state in states) == sent
    assert duplicates > 0


def test_sigterm_ends_the_worker_in_order(service: Service) -> None:
    """Exit code 0; what it has applied is committed, so its successor applies nothing again."""
    sent = clicks(200, first=300_000)
    service.send(sent)
    until(lambda: count_applied(sent, service.states()) == 200, "all clicks are applied")
    ends = sum(end_offsets(service.settings.connection, service.settings.topics.clicks.name).values())
    old = service.roles.pids["worker"]
    os.kill(old, signal.SIGTERM)
    until(lambda: service.roles.pids["worker"] != old, "the worker is started again")
    assert num_committed(service.settings) == ends
    until(lambda: service.metric("upwell_swaps_total{served}") > 0, "the new worker serves")
    more = clicks(50, first=310_000)
    service.send(more)
    until(lambda: count_applied(more, service.states()) == 50, "it goes on")
    assert service.metric("upwell_clicks_total{duplicate}") == 0


def test_too_many_bad_messages_stop_the_worker_for_good(broker: LocalBroker, tmp_path: Path) -> None:
    """With the reason, after the dead letters are sent, under an exit code that no supervisor restarts."""
    environment = {
        "UPWELL_KAFKA__BOOTSTRAP": broker.bootstrap,
        "UPWELL_KAFKA__PREFIX": f"bad{secrets.token_hex(4)}",
        "UPWELL_KAFKA__PARTITIONS": "1",
        "UPWELL_ARTIFACTS": str(tmp_path),
        "UPWELL_WORKER__DEAD_LETTER_RATIO": "0.3",
    }
    settings = Settings(
        kafka=Kafka(bootstrap=broker.bootstrap, prefix=environment["UPWELL_KAFKA__PREFIX"], partitions=1)
    )
    ensure(settings.topics, settings.connection)
    producer = ClickProducer(settings.connection, settings.topics)
    for click in clicks(100):
        producer.send(click)
    for number in range(100):
        producer.send_raw(settings.topics.clicks.name, b"u", b"rubbish %d" % number)
    producer.close()
    command = [sys.executable, "-m", "workers.cli", "worker"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UPWELL_")}
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 65 and done.returncode in HOPELESS
    assert "of the last 200 messages are bad" in done.stderr
    assert "a start with a ratio of 1 passes them over" in done.stderr
    assert len(read(settings)) == 100
    assert num_committed(settings) == 0  # good and bad wait for a worker that reads them


def test_partitions_move_to_a_second_worker_and_back(service: Service) -> None:
    """While clicks flow, a worker joins the group and leaves it: every click is applied once."""
    port, flow, sent = free_port(), iter(clicks(20_000, first=400_000)), list[Click]()
    second = subprocess.Popen(
        [sys.executable, "-m", "workers.cli", "worker"],
        env=os.environ | {"UPWELL_WORKER__METRICS_PORT": str(port)},
        stderr=subprocess.DEVNULL,
    )

    def send(some: int) -> None:
        with ClickProducer(service.settings.connection, service.settings.topics) as producer:
            for click in islice(flow, some):
                producer.send(click)
                sent.append(click)
        time.sleep(0.3)

    def by_second() -> float:
        return scrape(f"http://127.0.0.1:{port}/metrics").get("upwell_clicks_total{applied}", 0)

    deadline = time.monotonic() + 110  # 50 clicks each 0.3 s at most: the flow lasts longer
    try:
        while by_second() < 50:
            send(50)
            assert time.monotonic() < deadline, "the second worker owned no partition in time"
        second.terminate()
        send(300)
        assert second.wait(30) == 0
    finally:
        second.kill()
        second.wait()
    until(lambda: count_applied(sent, service.states()) == len(sent), "every click is in its user's state once")


def test_metrics_and_page(service: Service) -> None:
    service.send([msgspec.structs.replace(clicks(1)[0], event_id="seen", user_id="http-user", item_id="i5")])
    until(lambda: "http-user" in service.states(), "the click is applied")
    until(lambda: service.metric("upwell_scored_clicks_total") > 0, "the click is scored")
    recommended(service, "http-user")
    assert service.call("/livez") == (200, "alive")
    metrics = service.call("/metrics")[1]
    assert 'upwell_requests_total{route="/v1/users/{user_id}/recommendations",status="200"}' in metrics
    assert "http-user" not in metrics
    assert "<title>Upwell</title>" in service.call("/")[1]
    users = service.call("/v1/users")[1]
    assert users[0]["history"]


def test_dead_letters_are_listed_and_replayed(service: Service) -> None:
    """A message that this release can read was refused by the one before."""
    (click,) = clicks(1, first=200_000)
    topic = service.settings.topics.clicks.name
    letter = DeadLetter(
        topic=topic, partition=1, offset=5, cause="version: too new", key=b"u0", payload=encode(click), ts_ms=1
    )
    cut = msgspec.structs.replace(letter, offset=6, truncated=True, cause="size: too big")
    producer = Producer(service.settings.connection)
    for one in (letter, cut):
        producer.send_raw(service.settings.topics.dead_letters.name, one.cause.encode(), encode(one))
    producer.close()
    listed = upwell("dead-letters", "list").stdout.splitlines()
    assert f"{topic}[1]@5  version: too new" in listed[-2]
    number = listed[-2].split()[0]
    replayed = upwell("dead-letters", "replay", "--offset", number).stdout
    assert "1 sent again, 0 cannot be" in replayed
    until(lambda: count_applied([click], service.states()) == 1, "the replayed click is applied")
    assert resend(service.settings, [cut]) == (0, 1)


def test_doctor_finds_what_is_there_and_what_is_not(service: Service) -> None:
    well = upwell("doctor")
    assert well.returncode == 0, well.stdout
    assert "FAIL" not in well.stdout
    ill = upwell("doctor", UPWELL_KAFKA__PARTITIONS="7")
    assert ill.returncode == 1
    assert "FAIL topics:" in ill.stdout
    nowhere = upwell("doctor", UPWELL_KAFKA__BOOTSTRAP=f"127.0.0.1:{free_port()}", UPWELL_ARTIFACTS="/proc/nowhere")
    assert nowhere.returncode == 1
    assert "FAIL broker:" in nowhere.stdout
    assert "FAIL artifacts:" in nowhere.stdout
