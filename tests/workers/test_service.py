"""The pipeline on a real Kafka, every role a process: what a click does, and what no crash undoes."""

import http.client
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest
import torch
from msgspec.structs import replace

from model.config import PER_ITEM
from model.generation import build_generation
from model.manifest import MANIFEST, manifest_sha256
from model.model import Model
from model.user_state import UserState, decode_state
from stream.broker import LocalBroker
from stream.consumer import read_window
from stream.events import Artifact, Click, DeadLetter, Item, Recommendations, decode, encode
from stream.ports import free_port
from stream.producer import ClickProducer, Producer
from stream.topics import ensure
from tests.workers.service import ITEMS, Service, clicks, until, upwell, upwell_here
from workers.announcements import read_announcements
from workers.check import count_applied, fold_offline
from workers.dead_letters import place, read, resend
from workers.observe import num_committed
from workers.settings import Kafka, Settings
from workers.up import HOPELESS

SENT = clicks(400, name="walk-")
WALKER = SENT[1].user_id


@pytest.fixture(scope="module")
def clicked(service_once: Service) -> None:
    service_once.await_ready()  # before there is a generation, clicks make no lists
    service_once.send(SENT)
    until(lambda: count_applied(SENT, service_once.states()) == len(SENT), "all clicks are applied")


@pytest.fixture(scope="module")
def trained(service_once: Service, clicked: None) -> None:
    """What was learned serves in the worker and in the server."""

    def serves() -> bool:
        newest = read_announcements(service_once.settings).wanted()[0]
        return newest.parent is not None and service_once.serves(newest)

    until(serves, "a trained generation serves")


def lists(service: Service) -> list[Recommendations]:
    records = read_window(service.settings.connection, service.settings.topics.recommendations.name)
    return [decode(record.value, Recommendations) for record in records if record.value is not None]


def generation(service: Service) -> str:
    return str(service.call(f"/v1/users/{WALKER}/recommendations")[1]["generation"])


def recommended(service: Service, user_id: str, k: int = 20) -> list[str]:
    status, answer = service.call(f"/v1/users/{user_id}/recommendations?k={k}")
    assert status == 200, answer
    return [item["item_id"] for item in answer["items"]]


def test_clicks_become_states_and_lists(service: Service, clicked: None) -> None:
    def told(states: dict[str, bytes]) -> dict[str, UserState]:
        """Of our users; an offset tells what else went through the topic."""
        return {user: replace(decode_state(raw), offset=0) for user, raw in states.items() if user in users}

    users, states = {click.user_id for click in SENT}, service.states()
    assert told(states) == told(fold_offline(SENT, service.settings))
    newest = {answer.user_id: answer for answer in lists(service)}
    for user_id in users:
        answer = newest[user_id]
        seen = {click.item_id for click in SENT if click.user_id == user_id}
        offered = [place.item_id for place in answer.items]
        assert len(offered) == len(set(offered)) == 20
        assert not seen & set(offered)
        assert answer.offset == decode_state(states[user_id]).offset
        assert answer.clicked_ms <= answer.sent_ms
        assert [place.score for place in answer.items] == sorted((p.score for p in answer.items), reverse=True)


def test_the_api_answers_from_the_same_state(service: Service, clicked: None) -> None:
    status, answer = service.call(f"/v1/users/{WALKER}/recommendations?k=7")
    assert status == 200
    assert len(answer["items"]) == 7
    assert answer["source"] == "personal"
    assert answer["as_of"]["offset"] == decode_state(service.states()[WALKER]).offset
    assert all(item["title"] for item in answer["items"])
    status, stranger = service.call("/v1/users/nobody/recommendations")
    assert (status, stranger["source"], len(stranger["items"])) == (200, "popular", 20)
    assert service.call(f"/v1/users/{WALKER}/recommendations?k=0")[0] == 400


def test_training_rounds_are_served_and_learn(service: Service, trained: None) -> None:
    """Users walk through one shelf each; a trained generation knows the next item. Where the machine is slow, not the
    first one, which was made of the first clicks."""
    following = clicks(440, name="walk-")[400:]

    def known() -> int:
        return sum(click.item_id in recommended(service, click.user_id, 3) for click in following)

    until(lambda: known() >= 30, "30 of 40 next items are known; chance is 1")


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


def test_a_message_under_the_key_of_another_user_is_a_dead_letter_and_counted(service: Service) -> None:
    good, topic = clicks(3, users=3, name="behind-"), service.settings.topics.clicks.name
    counted, restarts = service.metric("upwell_clicks_total{bad}"), service.roles.restarts
    raw = encode(replace(good[0], user_id="someone else"))
    with Producer(service.settings.connection) as producer:
        for click in good:
            producer.send_raw(topic, click.user_id.encode(), raw)
    service.send(good)
    until(lambda: count_applied(good, service.states()) == 3, "good clicks behind bad ones are applied")
    until(lambda: service.metric("upwell_clicks_total{bad}") == counted + 3, "each is counted", 10.0)
    letters = [letter for _, letter in read(service.settings) if letter.payload == raw]
    assert len(letters) == 3 and {letter.key for letter in letters} == {click.user_id.encode() for click in good}
    assert all(letter.topic == topic and "key" in letter.cause for letter in letters)
    assert service.roles.restarts == restarts


def test_an_item_is_recommended_as_soon_as_it_is_encoded(service: Service, clicked: None) -> None:
    """It is in no generation yet: the fresh segment has it. Once it is taken away, it is gone at once."""
    new = Item(item_id="new-one", title=f"{ITEMS[2].categories[0]}, the newest part", categories=ITEMS[2].categories)
    assert service.call("/v1/items", msgspec.to_builtins(new))[0] == 202
    until(lambda: "new-one" in recommended(service, WALKER, 150), "the new item can be recommended")
    with ClickProducer(service.settings.connection, service.settings.topics) as producer:
        producer.remove_item("new-one")
    until(lambda: "new-one" not in recommended(service, WALKER, 150), "the removed item is recommended no more")
    hidden = replace(ITEMS[8], available=False)
    assert service.call("/v1/items", msgspec.to_builtins(hidden))[0] == 202
    until(lambda: ITEMS[8].item_id not in recommended(service, "nobody", 150), "an unavailable item is hidden")


def test_a_click_on_an_item_not_seen_yet_is_kept(service: Service) -> None:
    early = Click(event_id="early", user_id="early-user", item_id="not-yet", ts_ms=time.time_ns() // 1_000_000)
    service.send([early])
    until(lambda: "early-user" in service.states(), "its user has a state")
    assert decode_state(service.states()["early-user"]).history[0].item_id == "not-yet"
    assert len(recommended(service, "early-user")) == 20


def test_a_bad_generation_is_refused_and_the_old_one_serves(service: Service) -> None:
    topic, refused = service.settings.topics.generations.name, service.metric("upwell_swaps_total{refused}", "serve")
    (service.logs / "damaged").mkdir()
    (service.logs / "damaged" / MANIFEST).write_text("{}")
    bad = Artifact(name="bad", url=str(service.logs / "damaged"), manifest_sha256="0" * 64, created_ms=1, encoder="?")
    with service.makers_stopped() as good, Producer(service.settings.connection) as producer:
        producer.send_raw(topic, b"bad", encode(bad))
        until(lambda: service.metric("upwell_swaps_total{refused}", "serve") > refused, "the generation is refused")
        assert generation(service) == good.name
        assert MANIFEST in service.log("serve")
        killed = service.roles.pids["worker"]
        os.kill(killed, signal.SIGKILL)
        until(lambda: service.roles.pids["worker"] != killed, "the worker is started again")
        until(lambda: service.metric("upwell_swaps_total{served}") == 1, "it serves the one before the bad newest")
        assert service.metric("upwell_swaps_total{refused}") == 1
        assert service.serves(good)
        producer.send_raw(topic, b"bad", None)


def test_the_way_back(service: Service, trained: None) -> None:
    """Rolled back by hand, pinned and unpinned: the server follows each time."""

    def generations(*arguments: str) -> str:
        done = upwell_here(service.settings, "generations", *arguments)
        assert done.exit_code == 0, done.stderr
        return done.stdout

    with service.makers_stopped() as newest:
        earlier = generations("list").split()[0]
        assert newest.name != earlier
        generations("pin", earlier)
        until(lambda: generation(service) == earlier, "the pinned one serves")
        assert f"{earlier}  pinned" in generations("list")
        generations("pin")
        until(lambda: generation(service) == newest.name, "without the pin the newest serves again")
        generations("rollback", earlier)
        until(lambda: generation(service) == earlier, "the one announced again serves")
        assert generations("list").splitlines()[-1].startswith(f"{earlier}  serves")
        assert json.loads(generations("show", earlier))["version"] == earlier
        generations("rollback", newest.name)
        until(lambda: generation(service) == newest.name, "and back again")
    unknown = upwell_here(service.settings, "generations", "rollback", "nothing")
    assert unknown.exit_code == 1
    assert "no generation nothing" in unknown.stderr


def test_a_planted_drop_is_rolled_back_by_itself(service: Service, trained: None, tmp_path: Path) -> None:
    """A generation that is whole and answers its probes, of a model whose items have changed places."""
    with service.makers_stopped() as good:  # the next round would replace the drop, too
        model = Model.load(Path(good.url.removeprefix("file://")) / "model")
        shuffled = torch.from_numpy(np.random.default_rng(0).permutation(len(model.ids)))
        mixed = {name: array[shuffled] if name in PER_ITEM else array for name, array in model.arrays.items()}
        broken = Model(model.config, model.ids, mixed, model.tower)
        build_generation(tmp_path / "drop", broken, version="drop", encoder=good.encoder, offsets={})
        sha = manifest_sha256(tmp_path / "drop")
        drop = replace(good, name="drop", url=str(tmp_path / "drop"), manifest_sha256=sha)
        with Producer(service.settings.connection) as producer:
            producer.send_raw(service.settings.topics.generations.name, b"drop", encode(drop))
        until(lambda: service.serves(drop), "the drop serves")
        service.send(clicks(400, name="again-"))
        until(lambda: service.metric("upwell_rollbacks_total") >= 1, "it is rolled back")
        until(lambda: service.serves(good), "the one before serves again")


def test_a_store_that_cannot_be_written_stops_nothing(service: Service, clicked: None) -> None:
    """A file where its folder was: writes and reads fail (root heeds no permissions). Nothing falls."""
    store, restarts = service.logs / "artifacts", service.roles.restarts
    published = service.log("indexer").count("generation published")
    store.rename(service.logs / "away")
    store.write_text("")
    try:
        service.send(clicks(400, name="full-"))
        until(lambda: "model not stored" in service.log("trainer"), "the trainer says so")
        new = Item(item_id="while-full", title="Encoded all the same")
        assert service.call("/v1/items", msgspec.to_builtins(new))[0] == 202
        until(lambda: "while-full" in recommended(service, WALKER, 150), "new items are still taken in")
        good, models = read_announcements(service.settings).wanted()[0], service.settings.topics.models.name
        there = replace(good, name="there", url=f"{store}/there")
        with Producer(service.settings.connection) as producer:
            producer.send_raw(models, b"there", encode(there))
        until(lambda: "generation not stored" in service.log("indexer"), "the indexer says so, too")
        assert len(recommended(service, WALKER)) == 20
    finally:
        store.unlink()
        (service.logs / "away").rename(store)
    turn = count()

    def published_again() -> bool:
        """New users click until a candidate wins: what the same ones click again is no evidence at the gate."""
        service.send(clicks(400, name=f"space{next(turn)}-"))
        time.sleep(2)
        return service.log("indexer").count("generation published") > published

    until(published_again, "a generation is published again")
    assert service.roles.restarts == restarts


def test_a_search_process_that_dies_is_replaced(service: Service, clicked: None) -> None:
    """Its death costs time, never an answer."""
    with service.makers_stopped():  # another generation has other lists
        status, before = service.call(f"/v1/users/{WALKER}/recommendations")
        assert (status, before["source"]) == (200, "personal")
        children = psutil.Process(service.roles.pids["serve"]).children()
        (server,) = (child for child in children if "workers.search" in child.cmdline())
        for one in (*server.children(), server):
            one.kill()
            status, after = service.call(f"/v1/users/{WALKER}/recommendations")
            assert (status, after["items"]) == (200, before["items"])


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


def test_metrics_and_page(service: Service) -> None:
    (click,) = clicks(1, name="page-")
    service.send([click])
    until(lambda: click.user_id in service.states(), "the click is applied")
    until(lambda: service.metric("upwell_scored_clicks_total") > 0, "the click is scored")
    recommended(service, click.user_id)
    assert service.call("/livez") == (200, "alive")
    metrics = service.call("/metrics")[1]
    assert 'upwell_requests_total{route="/v1/users/{user_id}/recommendations",status="200"}' in metrics
    assert click.user_id not in metrics
    assert "<title>Upwell</title>" in service.call("/")[1]
    assert service.call(f"/v1/users/{click.user_id}")[1]["history"]


def test_dead_letters_are_listed_and_replayed(service: Service) -> None:
    """A message that this release can read was refused by the one before."""
    (click,) = clicks(1, name="replayed-")
    key, settings = click.user_id.encode(), service.settings
    topic = settings.topics.clicks.name
    letter = DeadLetter(
        topic=topic, partition=1, offset=5, cause="version: too new", key=key, payload=encode(click), ts_ms=1
    )
    cut = replace(letter, offset=6, truncated=True, cause="size: too big")
    with Producer(settings.connection) as producer:
        for one in (letter, cut):
            producer.send_raw(settings.topics.dead_letters.name, place(one), encode(one))
    listed = upwell_here(settings, "dead-letters", "list", "--limit", "2").stdout.splitlines()
    assert len(listed) == 2 and f"{topic}[1]@5  version: too new" in listed[0]
    number = listed[0].split()[0]
    assert "1 sent again, 0 cannot be" in upwell_here(settings, "dead-letters", "replay", "--offset", number).stdout
    until(lambda: count_applied([click], service.states()) == 1, "the replayed click is applied")
    assert resend(settings, [cut]) == (0, 1)


def test_doctor_finds_what_is_there_and_what_is_not(service: Service) -> None:
    well = upwell("doctor")
    assert well.returncode == 0, well.stdout
    assert "FAIL" not in well.stdout

    def ill(**other: Any) -> str:
        done = upwell_here(service.settings.model_copy(update=other), "doctor")
        assert done.exit_code == 1
        return done.stdout

    kafka = service.settings.kafka.model_copy
    assert "FAIL topics:" in ill(kafka=kafka(update={"partitions": 7}))
    away = ill(kafka=kafka(update={"bootstrap": f"127.0.0.1:{free_port()}"}))
    assert "FAIL broker:" in away and "FAIL artifacts:" not in away
    assert "FAIL artifacts:" in ill(artifacts="/proc/nowhere")
