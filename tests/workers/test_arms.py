"""Who is in which arm, which list a click is held against, and what the report makes of it."""

from collections import Counter

import pytest

from stream.events import Click, Erasure, Ranked, Recommendations, encode
from stream.producer import Producer
from stream.topics import Topics
from tests.records import Record
from workers.arm_report import Scored, lines, score, table
from workers.arms import all_arms, arm_of, query_of
from workers.settings import Arm, Settings
from workers.snapshot import PLAIN, Rules

ARMS = {"draws": Arm(share=0.2, explore=0.1), "wide": Arm(share=0.3, diversity=0.4)}
SETTINGS = Settings(arms=ARMS)
USERS = [f"u{number}" for number in range(20_000)]


def test_users_are_dealt_by_the_shares_and_anew_by_another_key() -> None:
    dealt = [arm_of(SETTINGS, user) for user in USERS]
    counts = Counter(dealt)
    for arm, share in (("draws", 0.2), ("wide", 0.3), ("default", 0.5)):
        assert counts[arm] / len(USERS) == pytest.approx(share, abs=0.015)
    turned, anew = Settings(arms=dict(reversed(ARMS.items()))), Settings(arms=ARMS, arms_key="second test")
    assert dealt == [arm_of(turned, user) for user in USERS]
    again = [arm_of(anew, user) for user in USERS]
    alike = sum(a == b for a, b in zip(dealt, again, strict=True)) / len(USERS)
    assert alike == pytest.approx(0.2**2 + 0.3**2 + 0.5**2, abs=0.02)  # as two independent deals


def test_without_room_there_is_no_default_arm() -> None:
    halves = Settings(arms={"a": Arm(share=0.5), "b": Arm(share=0.5)})
    assert set(all_arms(halves)) == {"a", "b"} == {arm_of(halves, user) for user in USERS}
    assert set(all_arms(SETTINGS)) == {"default", "draws", "wide"}


def test_a_list_is_made_by_the_arm_and_only_what_is_sent_and_drawn_is_logged() -> None:
    def asked(arm: str, sent: bool) -> tuple[Rules, dict[str, Rules]]:
        user = next(user for user in USERS if arm_of(SETTINGS, user) == arm)
        query = query_of(SETTINGS, Click(event_id="e", user_id=user, item_id="i", ts_ms=5), (), b"", sent)
        return query.rules._replace(seed=0), dict(query.others)

    assert asked("wide", True) == (Rules(diversity=0.4), {})
    assert asked("default", True) == (PLAIN, {})
    assert asked("draws", False) == (Rules(explore=0.1), {})
    assert asked("draws", True) == (Rules(explore=0.1), {"default": PLAIN, "wide": Rules(diversity=0.4)})


def a_list(user: str, arm: str, items: list[Ranked], offset: int) -> Recommendations:
    return Recommendations(
        user_id=user, items=items, generation="g", source="personal", partition=0, offset=offset, event_id="e",
        clicked_ms=0, sent_ms=0, arm=arm,
    )  # fmt: skip


def a_click(user: str, item: str, kind: str = "click") -> Click:
    return Click(event_id=f"{user}{item}{kind}", user_id=user, item_id=item, event_type=kind, ts_ms=0)  # type: ignore[arg-type]


DRAWN = [Ranked("a", 1.0, 0.8, under={"default": 1.0}), Ranked("b", 0.5, 0.1, under={"default": 0.0})]


def test_a_click_is_held_against_the_list_before_it() -> None:
    clicks: list[tuple[int, int, Click | Erasure]] = [
        (10, 0, a_click("u", "z")),  # no list yet
        (20, 1, a_click("u", "a")),  # in the list of 15
        (25, 2, a_click("u", "a")),  # a repeat
        (30, 3, a_click("u", "b", "hide")),  # says no
        (40, 4, a_click("u", "c")),  # in the list of 40, which came at the same moment: not seen yet
        (50, 5, a_click("v", "a")),  # of another user
        (65, 6, Erasure(event_type="erase", user_id="v", requested_ms=0)),
        (70, 7, a_click("v", "a")),  # a stranger again: the list of 60 is forgotten
    ]
    lists = [(15, a_list("u", "draws", DRAWN, 0)), (40, a_list("u", "default", [Ranked("c", 1.0)], 3)),
             (60, a_list("v", "default", [Ranked("a", 1.0)], 5))]  # fmt: skip
    topics = SETTINGS.topics
    found = score(
        SETTINGS,
        [Record(e.user_id.encode(), encode(e), offset, topics.clicks.name, timestamp=ms) for ms, offset, e in clicks]
        + [Record(None, b"no click", topic=topics.clicks.name, timestamp=80)],
        [Record(None, encode(answer), topic=topics.recommendations.name, timestamp=ms) for ms, answer in lists],
    )
    sizes = {"default": (1 / 0.8 + 0) / 2}
    assert list(found) == [
        Scored("draws", "u", True, {"default": 1 / 0.8}, sizes), Scored("draws", "u", False, {}, sizes),
    ]  # fmt: skip


def test_the_report_names_every_arm_and_estimates_from_drawn_lists() -> None:
    scored = [Scored("draws", f"u{n}", n % 2 == 0, {"default": 1.25} if n % 2 == 0 else {}, {"default": 1.0})
              for n in range(400)]  # fmt: skip
    head, *said = table(scored, all_arms(SETTINGS))
    assert "95 %" in head and [line.split()[0] for line in said] == ["default", "draws", "default,", "wide"]
    assert said[0].split()[1:] == ["0", "0", "-"] and said[1].split()[1:4] == ["400", "400", "0.5000"]
    assert "IPS 0.6250 (" in said[2] and "SNIPS 0.6250 (" in said[2]


def test_the_report_reads_the_topics(settings: Settings, topics: Topics) -> None:
    settings = settings.model_copy(update={"arms": ARMS})
    producer = Producer(settings.connection)
    for user in ("u1", "u2", "u3"):
        producer.send_raw(topics.recommendations.name, user.encode(), encode(a_list(user, "draws", DRAWN, -1)))
    producer.flush()
    for user, item in (("u1", "a"), ("u2", "x"), ("u3", "b")):
        producer.send_raw(topics.clicks.name, user.encode(), encode(a_click(user, item)))
    producer.close()
    said = list(lines(settings, since_ms=0))
    assert [line.split()[1:4] for line in said if line.startswith("draws")] == [["3", "3", "0.6667"]]
    assert "IPS 0.4167" in said[3]  # (1 / 0.8 + 0) / 3
