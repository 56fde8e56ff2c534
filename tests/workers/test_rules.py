"""Every rule and every combination of them against a plain scan of the catalogue."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from model.config import ModelConfig
from model.generation import build_generation
from model.learner import Learner
from model.manifest import manifest_sha256
from model.model import Model
from model.sampling import Events, History
from model.user_state import Entry, digest
from stream.answers import Guest, Wishes
from stream.events import Artifact, Click, EventType, Item, ItemVector, Ranked, encode
from workers import metrics
from workers.arms import arm_of
from workers.catalogue import Catalogue
from workers.live import NotReady
from workers.recommender import Read
from workers.search import SearchProcess
from workers.service import Service
from workers.settings import Arm, Settings
from workers.snapshot import PLAIN, Query, Rules, Snapshot
from workers.states import Owned, PackedStates
from workers.user_worker import UserWorker

NUM_INDEXED, NUM_FRESH, WIDTH, NOW_MS, K = 1500, 12, 16, 10_000_000, 10
DAY_MS = 86_400_000
SHELVES = ("common", "half", "rare", "single")  # every item, every second, every 200th, one
REMOVED, UNAVAILABLE = {"i3", "i200", f"i{NUM_INDEXED + 1}"}, {"i4", "i400", "i77", f"i{NUM_INDEXED + 2}"}


def item(number: int) -> Item:
    categories = [shelf for shelf, step in zip(SHELVES, (1, 2, 200, 10_000), strict=True) if number % step == 0]
    published_ms = None if number % 7 == 0 else NOW_MS - 1000 * number
    item_id = f"i{number}"
    return Item(item_id=item_id, title=item_id, categories=categories, published_ms=published_ms,
                available=item_id not in UNAVAILABLE)  # fmt: skip


ITEMS = [item(number) for number in range(NUM_INDEXED + NUM_FRESH)]
IDS = [one.item_id for one in ITEMS]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Snapshot]:
    """So many items that a wide filter is answered by over-fetching, a narrow one by a scan."""
    draw, catalogue = np.random.default_rng(0), Catalogue()
    text = draw.normal(size=(len(IDS), WIDTH)).astype("<f2")
    for one, values in zip(ITEMS, text, strict=True):
        catalogue.take_vector(
            one.item_id, ItemVector(item_id=one.item_id, encoder="e", text_hash="", vector=values.tobytes())
        )
        if one.item_id not in REMOVED:
            catalogue.take_item(one.item_id, one)
    learner = Learner(
        ModelConfig(text_dim=WIDTH, tower_dim=8, covisitation_rank=8, projected_text_dim=8, hidden=16, warmup_steps=0)
    )
    learner.add_items(IDS[:NUM_INDEXED], text[:NUM_INDEXED].astype(np.float32))
    items = [IDS[number] for number in draw.integers(0, NUM_INDEXED, 300)]
    learner.learn(Events([f"u{n}" for n in draw.integers(0, 20, 300)], items, np.ones(300, np.float32), np.arange(300)))
    folder = Path(tmp_path_factory.mktemp("generations")) / "g1"
    model = learner.model()
    build_generation(folder, model, version="g1", encoder="e", offsets={})
    announced = Artifact(name="g1", url=str(folder), manifest_sha256=manifest_sha256(folder), created_ms=0, encoder="e")
    with SearchProcess(folder, announced.manifest_sha256) as search:
        yield Snapshot.of(announced, search, model, catalogue)


ids = st.sampled_from([*IDS[:8], *REMOVED, *UNAVAILABLE, *IDS[-9:], "i600", "unknown"])
rules = st.builds(
    Rules,
    categories=st.frozensets(st.sampled_from([*SHELVES, "unheard of"]), max_size=2),
    exclude=st.frozensets(ids, max_size=5),
    exclude_seen=st.booleans(),
    available_only=st.booleans(),
    max_age_ms=st.none() | st.sampled_from([0, 5_000, 300_000, 2_000_000, 10_000_000]),
    diversity=st.sampled_from([0.0, 0.0, 0.4, 1.0]),
    explore=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    seed=st.integers(0, 3),
)
asked_for = st.tuples(st.lists(ids, max_size=5), st.sets(ids, max_size=8), st.booleans(), rules)


def asks(history: list[str], seen: set[str], much_seen: bool, how: Rules) -> Query:
    entries = [Entry(item_id, 1.0, NOW_MS - 1000) for item_id in history]
    return Query(entries, b"".join(map(digest, sorted({*seen, *(IDS[::3] if much_seen else ())}))), NOW_MS, how)


def eligible(query: Query) -> set[str]:
    """By the words of the rules, item by item."""
    how, seen = query.rules, {query.seen[at : at + 8] for at in range(0, len(query.seen), 8)}
    return {
        one.item_id
        for one in ITEMS
        if one.item_id not in REMOVED | how.exclude
        and (one.available or not how.available_only)
        and not (how.exclude_seen and digest(one.item_id) in seen)
        and (not how.categories or how.categories & set(one.categories))
        and (how.max_age_ms is None or (one.published_ms is not None and NOW_MS - one.published_ms <= how.max_age_ms))
    }


@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, phases=[Phase.generate]
)
@given(st.lists(asked_for, min_size=1, max_size=4), st.integers(1, 60) | st.just(len(IDS)))
def test_always_k_of_the_eligible_whatever_the_rules(snapshot: Snapshot, users: list[Any], k: int) -> None:
    asked = [asks(*user) for user in users]
    vectors = snapshot.model.user_vectors([snapshot.history(q.history) for q in asked], [NOW_MS] * len(asked))
    scores = vectors @ snapshot.model.item_vectors().T  # (B, N)
    for query, row, ranked in zip(asked, scores, snapshot.recommend(asked, k), strict=True):
        allowed, offered = eligible(query), [place.item_id for place in ranked]
        assert len(offered) == len(set(offered)) == min(k, len(allowed))
        assert set(offered) <= allowed
        worth = {item_id: row[at] for item_id, at in snapshot.rows.items()}
        own = [worth[item_id] for item_id in offered]
        np.testing.assert_allclose([place.score for place in ranked], own, atol=2e-4)
        how = query.rules
        if not (how.diversity or how.explore):
            best = sorted((worth[item_id] for item_id in allowed), reverse=True)[:k]
            np.testing.assert_allclose(own, best, atol=2e-4)
        if not how.explore:
            assert {place.propensity for place in ranked} <= {1.0}


def test_a_narrow_filter_is_answered_exactly(snapshot: Snapshot) -> None:
    query = Query([Entry("i1", 1.0, 0)], b"", NOW_MS, Rules(categories=frozenset({"rare"})))
    (vector,) = snapshot.model.user_vectors([snapshot.history(query.history)], [NOW_MS])
    scores = dict(zip(snapshot.rows, snapshot.model.item_vectors() @ vector, strict=True))
    (ranked,) = snapshot.recommend([query], K)
    assert [place.item_id for place in ranked] == sorted(eligible(query), key=lambda one: -scores[one])[:K]


def test_k_come_where_what_passes_is_what_the_index_ranks_last(snapshot: Snapshot) -> None:
    """Half of all items pass: enough to over-fetch, and what is over-fetched does not pass."""
    query = Query([Entry("i1", 1.0, 0)], b"", NOW_MS, Rules(categories=frozenset({"worse"})))
    ranked = [place.item_id for place in snapshot.recommend([query._replace(rules=PLAIN)], len(IDS))[0]]
    worse = ranked[len(ranked) // 2 :]
    catalogue = Catalogue()
    for one in ITEMS[:NUM_INDEXED]:
        catalogue.take_item(one.item_id, replace(one, categories=["worse"] if one.item_id in worse else []))
    shelved = Snapshot.of(snapshot.announced, snapshot.search, snapshot.indexed, catalogue)
    (found,) = shelved.recommend([query], 5)
    expected = [item_id for item_id in worse if item_id in shelved.rows][:5]
    assert [place.item_id for place in found] == expected


def test_a_rare_draw_is_logged_with_its_chance(snapshot: Snapshot) -> None:
    """Estimates divide by it: at six decimals it would be none."""
    rare = {"a": Rules(explore=1e-7)}
    (ranked,) = snapshot.recommend([Query([], b"", NOW_MS, Rules(explore=1.0, seed=1), rare)], K)
    assert 0 < min(place.under["a"] for place in ranked) < 1e-6


def test_the_propensities_are_those_of_the_lists(snapshot: Snapshot) -> None:
    """2,000 lists by other seeds: how often the first and the last of the plain order came, and what they said."""
    rounds, how = 2000, Rules(explore=0.4)
    asked = [Query([], b"", NOW_MS, how._replace(seed=seed)) for seed in range(rounds)]
    said: dict[str, set[float]] = {}
    came: dict[str, int] = {}
    for ranked in snapshot.recommend(asked, K):
        for place in ranked:
            said.setdefault(place.item_id, set()).add(place.propensity)
            came[place.item_id] = came.get(place.item_id, 0) + 1
    assert len(said) == 5 * K and all(len(values) == 1 for values in said.values())
    chance = {item_id: min(values) for item_id, values in said.items()}
    assert sum(chance.values()) == pytest.approx(K, abs=1e-3)
    for item_id, count in came.items():
        p = chance[item_id]
        assert abs(count / rounds - p) <= 5 * np.sqrt(p * (1 - p) / rounds)


def test_what_other_arms_would_have_shown_is_said_of_each_place(snapshot: Snapshot) -> None:
    others = {"plain": PLAIN, "wide": Rules(diversity=0.8)}
    shown = {
        name: {p.item_id for p in snapshot.recommend([Query([], b"", NOW_MS, r)], K)[0]} for name, r in others.items()
    }
    asked = [Query([], b"", NOW_MS, Rules(explore=0.5, seed=seed), others) for seed in range(20)]
    assert shown["plain"] != shown["wide"]
    for ranked in snapshot.recommend(asked, K):
        for place in ranked:
            assert place.under == {name: float(place.item_id in found) for name, found in shown.items()}


def test_reasons_name_the_clicks(snapshot: Snapshot) -> None:
    asked = [
        Query([Entry("i1", 1.0, 0), Entry("i9", 2.0, 1), Entry("unknown", 1.0, 2)], b"", NOW_MS),
        Query([], b"", NOW_MS),
    ]
    known, stranger = snapshot.recommend(asked, K, explain=True)
    assert [place.item_id for place in known] == [place.item_id for place in snapshot.recommend(asked, K)[0]]
    assert any(place.because for place in known) and all(0 <= place.explained <= 1 for place in known)
    for place in known:
        assert {reason.item_id for reason in place.because} <= {"i1", "i9"}
        assert not place.because or sum(reason.share for reason in place.because) == pytest.approx(1, abs=2e-3)
    assert not any(place.because or place.explained for place in stranger)
    (first, *rest), _ = snapshot.explain(asked, snapshot.histories(asked), snapshot.recommend(asked, K), 1)
    assert first == known[0] and not any(place.because for place in rest)


def test_similar_items_are_others_and_keep_the_rules(snapshot: Snapshot) -> None:
    ranked = snapshot.similar("i10", K)
    assert len(ranked) == K and "i10" not in {place.item_id for place in ranked}
    narrow = snapshot.similar("i10", K, Rules(categories=frozenset({"rare"}), exclude=frozenset({"i600"})))
    assert {place.item_id for place in narrow} <= {f"i{n}" for n in range(0, NUM_INDEXED, 200)} - {"i600"} - REMOVED
    with pytest.raises(KeyError):
        snapshot.similar("unknown", K)


def test_a_moved_item_is_found_on_its_new_shelf(snapshot: Snapshot) -> None:
    catalogue = Catalogue()
    for one in ITEMS:
        catalogue.take_item(one.item_id, one)
    moved = replace(ITEMS[5], categories=["single"])
    assert catalogue.take_item("i5", moved)
    after = Snapshot.of(snapshot.announced, snapshot.search, snapshot.indexed, catalogue)
    (ranked,) = after.recommend([Query([], b"", NOW_MS, Rules(categories=frozenset({"single"})))], K)
    assert {place.item_id for place in ranked} == {"i0", "i5"}


class Serving:
    """`Live` with one generation."""

    previous: Snapshot | None = None
    catalogue = Catalogue()

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def use(self, ask: Callable[[Snapshot], Any]) -> tuple[Snapshot, Any]:
        return self.snapshot, ask(self.snapshot)

    def recommend(self, queries: Sequence[Query], k: int, explain: bool) -> tuple[Snapshot, Any]:
        return self.use(lambda snapshot: snapshot.recommend(queries, k, explain))


class Clicking:
    """A worker's folds and lists for one partition, without Kafka."""

    def __init__(self, serving: Any) -> None:
        self.worker = UserWorker(Settings(), serving, None, None)  # type: ignore[arg-type]
        self.recommender, self.owned, self._offset = (
            self.worker._recommender,
            Owned(PackedStates(), cast(Any, None), {}),
            0,
        )

    def click(self, *items: str, user: str = "u", ts_ms: int = NOW_MS, kind: EventType = "click") -> list[str]:
        """In one micro-batch; the user's next list."""
        clicks = [Click(event_id=kind + one, user_id=user, item_id=one, ts_ms=ts_ms, event_type=kind) for one in items]
        reads = [Read(one, self._offset + at, ts_ms) for at, one in enumerate(clicks)]
        self._offset += len(reads)
        folded = self.worker._fold(self.owned, reads, {})
        self.owned.states.update(folded.states)
        (recommended,) = self.recommender.recommend([folded])
        self.owned.sent.update(recommended.sent)
        return [place.item_id for place in recommended.lists[user]]


def turning(snapshot: Snapshot) -> Model:
    """Its generation's model, but the lists turn with the time since the last click."""
    model = snapshot.indexed
    mix = torch.from_numpy(np.random.default_rng(3).normal(size=model.arrays["mix"].shape).astype(np.float32))
    return Model(model.config, model.ids, model.arrays | {"mix": mix}, model.tower)


def test_what_is_asked_for_says_its_arm_and_counts_for_it(snapshot: Snapshot) -> None:
    service = Service(Settings(arms={"draws": Arm(share=0.5, explore=0.5)}))
    service.live = cast(Any, Serving(snapshot))
    with pytest.raises(NotReady, match="being read"):  # whom nothing is known of yet may be known
        service.recommend("u0", Wishes(k=K))
    service.users.caught_up.set()

    def count(*labels: str) -> float:
        return float(metrics.answers.labels(*labels)._value.get())

    for arm in ("draws", "default"):
        user = next(user for user in map("u{}".format, range(40)) if arm_of(service.settings, user) == arm)
        before = count("popular", "full", arm)
        answer = service.recommend(user, Wishes(k=K))
        assert (answer.arm, count("popular", "full", arm)) == (arm, before + 1)
        assert (min(place.propensity for place in answer.items) < 1) == (arm == "draws")
        plain = service.recommend(user, Wishes(k=K, explore=0.0))
        assert {place.propensity for place in plain.items} == {1.0}
    before = count("session", "full", "default")
    assert service.recommend_guest(Guest(k=K, items=["i1"])).arm == "default"
    assert count("session", "full", "default") == before + 1


def test_what_is_sent_says_arm_chances_reasons_and_source(snapshot: Snapshot) -> None:
    arms = {"draws": Arm(share=0.5, explore=0.5)}
    settings = Settings(arms=arms)
    worker = UserWorker(settings, Serving(snapshot), None, None)  # type: ignore[arg-type]
    users = {
        name: [u for u in map("u{}".format, range(40)) if arm_of(settings, u) == name] for name in ("draws", "default")
    }
    (drawn, stranger), (plain, *_) = users["draws"][:2], users["default"]
    before = metrics.arm_clicks.labels("draws", "miss")._value.get()
    clicks = [(drawn, "i8"), (plain, "i8"), (stranger, "unheard of"), (drawn, "i10")]
    reads = [Read(Click(event_id=f"e{at}", user_id=user, item_id=one, ts_ms=NOW_MS), at, NOW_MS)
             for at, (user, one) in enumerate(clicks)]  # fmt: skip
    folded = worker._fold(Owned(PackedStates(), cast(Any, None), {}), reads, {})
    (recommended,) = worker._recommender.recommend([folded])
    answers = {user: worker._answer(user, folded, 0, recommended, 5) for user in (drawn, plain, stranger)}
    assert [answers[user].arm for user in (drawn, plain, stranger)] == ["draws", "default", "draws"]
    assert [answers[user].source for user in (drawn, plain, stranger)] == ["personal", "personal", "popular"]
    assert all(place.propensity < 1 and set(place.under) == {"default"} for place in answers[drawn].items)
    assert all(place.propensity == 1 and not place.under for place in answers[plain].items)
    assert {one.item_id for place in answers[drawn].items for one in place.because} <= {"i8", "i10"}
    for user in (drawn, plain):
        assert any(place.because for place in answers[user].items[:3])
        assert not any(place.because for place in answers[user].items[3:])
    (again,) = worker._recommender.recommend([folded])
    assert all(answer.items == again.lists[user] for user, answer in answers.items())
    assert metrics.arm_clicks.labels("draws", "miss")._value.get() > before
    assert len(encode(answers[plain])) < 1.6 * len(encode(replace(answers[plain], items=[
        Ranked(place.item_id, place.score) for place in answers[plain].items])))  # fmt: skip


def test_a_click_is_scored_in_the_list_sent_before_it(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the generation that serves made it of the user's state just before: else it is searched for."""
    asked, scored, catalogue = list[Sequence[Query]](), list[tuple[str, ...]](), Catalogue()
    for one in ITEMS:
        catalogue.take_item(one.item_id, one)
    snapshot = Snapshot.of(snapshot.announced, snapshot.search, turning(snapshot), catalogue)
    search, serving = Snapshot.ranked, Serving(snapshot)
    clicking = Clicking(serving)

    def ranked(self: Snapshot, queries: Sequence[Query], histories: Sequence[History], k: int) -> list[list[Ranked]]:
        asked.append(queries)
        return search(self, queries, histories, k)

    monkeypatch.setattr(Snapshot, "ranked", ranked)
    monkeypatch.setattr(clicking.recommender._score, "add", lambda item_id, seen, served, arm: scored.append(served))

    def fresh(*items: str) -> tuple[str, ...]:
        query = Query([Entry(one, 1.0, NOW_MS) for one in items], b"".join(map(digest, items)), NOW_MS)
        return tuple(place.item_id for place in search(snapshot, [query], snapshot.histories([query]), 10)[0])

    clicking.click("i1")
    clicking.click("i2")
    clicking.click("i3", "i4")
    clicking.click("i4")  # delivered again: nothing is scored, and the list stays that of the state
    sent = clicking.owned.sent
    sent["u"] = replace(sent["u"], generation="one before")
    clicking.click("i5", ts_ms=NOW_MS + DAY_MS)  # in what would have been sent, when nobody knew of the pause
    clicking.click("i1", user="another stranger")
    assert list(map(len, asked)) == [1, 1, 1, 2, 1, 2, 1]  # first of all, once, what all strangers get
    assert scored == [
        fresh(), fresh("i1"), fresh("i1", "i2"), fresh("i1", "i2", "i3"), fresh("i1", "i2", "i3", "i4"), fresh()
    ]  # fmt: skip
    asked.clear()
    serving.previous = snapshot  # on trial the same holds, as long as the items are the same
    clicking.click("i6")
    serving.snapshot = snapshot.renewed(catalogue)
    clicking.click("i7")
    clicking.click("i8")
    assert list(map(len, asked)) == [1, 1, 2, 1, 1, 1]  # each time by the one that serves, then by the one before


@pytest.mark.parametrize("kind", ["dislike", "hide", "skip"])
def test_a_dislike_is_no_hit_and_makes_nothing_popular(snapshot: Snapshot, kind: EventType) -> None:
    """Else a generation that stops showing what is hidden would lose hits by it, and its trial."""
    clicking = Clicking(Serving(snapshot))
    counts = [metrics.scored_clicks, metrics.hits.labels("served"), metrics.arm_clicks.labels("default", "hit")]
    first, *_ = clicking.click("i1")
    before, place = [count._value.get() for count in counts], clicking.recommender._score.popularity.place
    clicking.click(first, kind=kind)
    assert (place("i1", b""), place(first, b"")) == (0, None)
    clicking.click(first)  # and as it has been seen, no list holds it now
    assert [count._value.get() for count in counts] == before
    assert clicking.owned.states["u"].applied == 3
    assert place(first, b"") == 0


def test_a_trial_never_tells_twins_apart(snapshot: Snapshot) -> None:
    """However long their users pause, and whatever goes meanwhile from the list that was sent."""
    catalogue, announced = Catalogue(), snapshot.announced
    for one in ITEMS[:NUM_INDEXED]:
        catalogue.take_item(one.item_id, one)
    twins = [Snapshot.of(replace(announced, name=name), snapshot.search, turning(snapshot), catalogue) for name in "ab"]
    serving: Any = Serving(twins[0])
    serving.previous = twins[1]
    clicking, item, days = Clicking(serving), "i1", 15
    for day in range(days):
        shown = clicking.click(item, ts_ms=NOW_MS + day * DAY_MS)
        for gone in shown[:3] if day % 2 else ():
            catalogue.take_item(gone, None)
        serving.snapshot, serving.previous = serving.snapshot.renewed(catalogue), serving.previous.renewed(catalogue)
        item = shown[11] if day % 2 else shown[8]
    trial = clicking.recommender._trial
    assert trial is not None and (trial.clicks, trial.only_serving, trial.only_previous) == (days, 0, 0)
    assert trial._new.hit_rate > 0.5 and ("previous",) in metrics.hit_rate._metrics
    serving.previous = None  # over: its gauges would stand still
    clicking.click("i1", user="another")
    assert ("previous",) not in metrics.hit_rate._metrics


async def test_a_list_carries_the_trace_of_the_click_it_answers(snapshot: Snapshot) -> None:
    """Of several clicks of a user in one micro-batch that is the last one."""
    sent: dict[str, list[Any]] = {}

    class Sender:
        async def send(self, topic: str, partition: int, records: list[Any]) -> None:
            sent[topic] = records

    worker = UserWorker(Settings(), Serving(snapshot), None, Sender())  # type: ignore[arg-type]
    reads = [Read(Click(event_id=f"e{at}", user_id=user, item_id="i1", ts_ms=NOW_MS), at, NOW_MS)
             for at, user in enumerate("uvuw")]  # fmt: skip
    folded = worker._fold(Owned(PackedStates(), cast(Any, None), {}), reads, {})
    (recommended,) = worker._recommender.recommend([folded])
    traced = {at: (("traceparent", b"%d" % at),) for at in (0, 1, 2)}
    await worker._send(0, folded, recommended, traced)
    found = {key: headers for key, _, *headers in sent[Settings().topics.recommendations.name]}
    assert found == {b"u": [("traceparent", b"2")], b"v": [("traceparent", b"1")], b"w": []}
