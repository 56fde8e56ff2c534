"""Bugs to plant: each scenario has been seen red on one, as `CHAOS_BUG=NAME pytest tests/chaos/...` shows again.

They are patched into the processes under test alone; what judges them is whole.
"""

import asyncio
import itertools
import os
import secrets
import signal
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

from aiokafka.producer.sender import Sender
from faust.transport.drivers.aiokafka import AIOKafkaConsumerThread
from kafka.errors import KafkaError

from model.user_state import Applied, Fold
from stream.connection import Connection
from stream.consumer import end_offsets
from stream.producer import Place, Producer
from stream.subscriber import Subscriber
from workers import dead_letters as dead_letters_module
from workers import faust_batches, worker_process
from workers import states as states_module
from workers.faust_batches import BatchApp, PartitionBatchThread
from workers.handed import Handed
from workers.limits import Gate
from workers.live import Live
from workers.recommender import Folded
from workers.sender import BatchSender
from workers.server import Server
from workers.service import Service
from workers.state_writer import StateWriter
from workers.states import Owned, OwnedStates, PackedStates
from workers.user_worker import UserWorker


def acked_before_the_state_is_committed() -> None:
    """A batch counts as done while its states are still in an open transaction."""
    put = StateWriter.put

    async def hasty(self: StateWriter, states: Any, acknowledge: Any = None) -> None:
        await put(self, states)
        if acknowledge is not None:
            await acknowledge()

    StateWriter.put = hasty  # type: ignore[method-assign]


def no_fencing() -> None:
    """Every writer has a transactional id of its own: a zombie's is as good as its successor's."""
    init = BatchSender.__init__

    def unfenced(self: BatchSender, connection: Any, transactional_id: str | None = None, **rest: Any) -> None:
        init(self, connection, transactional_id and transactional_id + secrets.token_hex(4), **rest)

    BatchSender.__init__ = unfenced  # type: ignore[method-assign, assignment]


def redelivered_applied() -> None:
    """A click read again is folded again."""
    Fold.is_new = lambda self, click, event: True  # type: ignore[method-assign]


def repeated_applied() -> None:
    """An event sent twice is folded twice."""

    def by_offset(self: Fold, click: Applied, event: bytes) -> bool:
        return click.offset > self.offset

    Fold.is_new = by_offset  # type: ignore[method-assign]


def dead_letters_dropped() -> None:
    """Bad messages vanish."""
    decode = UserWorker._decode
    UserWorker._decode = lambda *given: (*decode(*given)[:2], [])  # type: ignore[method-assign]


def states_kept() -> None:
    """A worker keeps the states of a partition that is taken away, and goes on from them when it comes back."""

    async def keep(self: OwnedStates, partitions: Any) -> None: ...

    OwnedStates.forget = keep  # type: ignore[method-assign]


def ends_unfinished() -> None:
    """SIGTERM does not wait for what is in work."""
    module: Any = worker_process
    original = module.batch_app

    def hasty(*arguments: Any) -> BatchApp:
        app = original(*arguments)
        app.conf.stream_wait_empty = False
        return cast(BatchApp, app)

    module.batch_app = hasty


def answers_cut() -> None:
    """SIGTERM ends the server with answers and streams under way."""

    async def hasty(self: Server, sockets: Any = None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)

    Server.shutdown = hasty  # type: ignore[method-assign]


def no_limits() -> None:
    """The server begins with every request that comes."""
    init = Gate.__init__

    def open_(self: Gate, serve: Any, keys: Any) -> None:
        init(self, serve.model_copy(update={"rate": 0.0, "max_requests": 10**9}), keys)

    Gate.__init__ = open_  # type: ignore[method-assign]


def states_read_short() -> None:
    """A restoring worker takes the first half of a partition for all of it."""
    module: Any = states_module
    original = module.read_states

    def half(*arguments: Any) -> PackedStates:
        found: PackedStates = original(*arguments)
        for user_id in list(found)[len(found) // 2 :]:
            del found[user_id]
        return found

    module.read_states = half


def known_users_dropped() -> None:
    """Clicks of users who have a state are acknowledged and not folded."""
    decode = UserWorker._decode

    def deaf(self: UserWorker, records: Any, states: Any) -> Any:
        reads, *rest = decode(self, records, states)
        return [read for read in reads if read.click.user_id not in states], *rest

    UserWorker._decode = deaf  # type: ignore[method-assign]


def events_not_awaited() -> None:
    """The API says 202 before Kafka has the event."""
    send = Producer.send_raw

    def hasty(self: Producer, *arguments: Any) -> Future[Place]:
        send(self, *arguments)
        done: Future[Place] = Future()
        done.set_result(Place(0, 0))
        return done

    Producer.send_raw = hasty  # type: ignore[assignment, method-assign]


def events_lost() -> None:
    """Every fifth event is answered 202 and goes nowhere."""
    send, count = Producer.send_raw, itertools.count()

    def forgetful(self: Producer, *arguments: Any) -> Future[Place]:
        if next(count) % 5:
            return send(self, *arguments)
        done: Future[Place] = Future()
        done.set_result(Place(0, 0))
        return done

    Producer.send_raw = forgetful  # type: ignore[method-assign, assignment]


def acks_of_the_leader() -> None:
    """An event counts as soon as one broker has it."""
    init = Producer.__init__

    def hasty(self: Producer, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        self._abandon()
        self._options |= {"acks": 1, "enable_idempotence": False}

    Producer.__init__ = hasty  # type: ignore[method-assign]


def coordinator_kept() -> None:
    """A writer of states waits for the transaction coordinator it knows, and looks for no other."""
    Sender._coordinator_dead = lambda self, kind: None


def mixes() -> None:
    """A list is sent under the name of the generation that serves by then, not of the one that made it."""
    use = Live.use

    def late(self: Live, ask: Any) -> Any:
        _, found = use(self, ask)
        time.sleep(0.01)
        return self.snapshot, found

    Live.use = late  # type: ignore[method-assign]


def texts_in_the_way() -> None:
    """Guests' words are encoded by the threads that make lists, however many come."""
    init = Service.__init__

    def shared(self: Service, settings: Any) -> None:
        init(self, settings)
        self.texts, self.encoding = asyncio.Semaphore(1000), cast(Any, None)

    Service.__init__ = shared  # type: ignore[method-assign]


def id_logged() -> None:
    """A user's id in a log line."""
    decode = UserWorker._decode

    def chatty(self: UserWorker, records: Any, states: Any) -> Any:
        found = decode(self, records, states)
        for user_id in found[1]:
            print("erased", user_id, flush=True)
        return found

    UserWorker._decode = chatty  # type: ignore[method-assign]


def state_not_tombstoned() -> None:
    """An erased user's state is emptied, and its record stays."""
    Owned.record = lambda self, user_id, state: self.states.packed(user_id)  # type: ignore[method-assign]


def dead_letters_kept() -> None:
    """Nothing looks for the dead letters of who is erased."""
    module: Any = dead_letters_module
    module.names_one = lambda letter, user_ids: False


def lists_not_tombstoned() -> None:
    """Who keeps lists is not told."""
    tell = UserWorker._tell

    async def untold(self: UserWorker, partition: int, dead: Any, erased: Any) -> None:
        await tell(self, partition, dead, {})

    UserWorker._tell = untold  # type: ignore[method-assign]


def erasure_passed_over() -> None:
    """A wish is read and nothing comes of it."""
    decode = UserWorker._decode

    def deaf(self: UserWorker, records: Any, states: Any) -> Any:
        reads, _, dead = decode(self, records, states)
        return reads, {}, dead

    UserWorker._decode = deaf  # type: ignore[method-assign]


def erased_once() -> None:
    """A wish that is read again, its worker having died, counts as carried out."""
    decode = UserWorker._decode

    def hasty(self: UserWorker, records: Any, states: Any) -> Any:
        reads, erased, dead = decode(self, records, states)
        return reads, {user: offset for user, offset in erased.items() if states.get(user).offset < offset}, dead

    UserWorker._decode = hasty  # type: ignore[method-assign]


def hoards() -> None:
    """Every message read stays in memory, with what was made of it: 256 KiB each."""
    decode = UserWorker._decode
    hoard: list[bytes] = []

    def keep(self: UserWorker, records: Any, states: Any) -> Any:
        hoard.extend(b"x" * (1 << 18) for _ in records)
        return decode(self, records, states)

    UserWorker._decode = keep  # type: ignore[method-assign]


def leaks() -> None:
    """32 KiB of each click stay, and of each batch an open file."""
    decode = UserWorker._decode
    kept: list[Any] = []

    def keep(self: UserWorker, records: Any, states: Any) -> Any:
        kept.extend(b"x" * (1 << 15) for _ in records)
        kept.append(os.open(os.devnull, os.O_RDONLY))
        return decode(self, records, states)

    UserWorker._decode = keep  # type: ignore[method-assign]


def lists_forgotten() -> None:
    """Of several micro-batches that waited together only the last one's users get a list."""
    Folded.and_then = lambda self, later, erased, states: later  # type: ignore[method-assign]


def errors_passed_over() -> None:
    """A batch that raises is logged, and the worker goes on with the next."""
    process = UserWorker.process

    async def calm(self: UserWorker, *arguments: Any) -> None:
        try:
            await process(self, *arguments)
        except Exception as error:
            print("passed over", repr(error), flush=True)

    UserWorker.process = calm  # type: ignore[method-assign, assignment]


def lists_emptied() -> None:
    """Each list is sent without an item."""
    send = UserWorker._send

    async def empty(self: UserWorker, partition: int, owed: Any, recommended: Any, traced: Any) -> None:
        nothing: dict[str, list[Any]] = {user_id: [] for user_id in recommended.lists}
        await send(self, partition, owed, recommended._replace(lists=nothing), traced)

    UserWorker._send = empty  # type: ignore[method-assign]


def lists_wait() -> None:
    """A list is made when Kafka has answered."""
    recommend = Service.recommend

    def waits(self: Service, *arguments: Any) -> Any:
        while True:
            try:
                end_offsets(self.settings.connection, self.settings.topics.clicks.name)
                return recommend(self, *arguments)
            except KafkaError:
                time.sleep(0.1)

    Service.recommend = waits  # type: ignore[method-assign, assignment]


def falls() -> None:
    """A worker ends by an error at its third batch, once, and comes back."""
    process, passed = UserWorker.process, itertools.count(1)

    async def clumsy(self: UserWorker, *arguments: Any) -> None:
        if next(passed) == 3 and "planted" not in Path("/proc/self/fd/1").read_text():  # its log
            raise RuntimeError("planted")
        await process(self, *arguments)

    UserWorker.process = clumsy  # type: ignore[method-assign, assignment]


def joins_at_once() -> None:
    """A worker folds before it has a generation to make lists of."""
    module: Any = worker_process
    module.FIRST_LOOK_S = 0.0


def clicks_wait_for_restore() -> None:
    """Clicks of a partition that is being restored are taken from Kafka."""
    OwnedStates.restored = lambda self, partition: True  # type: ignore[method-assign]


def no_second_look() -> None:
    """A dropped batch that nothing follows is not looked for."""

    async def nothing(self: Handed, ends: Any) -> dict[int, int]:
        return {}

    Handed.behind = nothing  # type: ignore[method-assign]


def patient() -> None:
    """A request is waited for as long as the libraries do by themselves: a connection may be dead for 90 s."""
    connection: Any = Connection
    options = connection.kafka_python
    connection.kafka_python = lambda self: {k: v for k, v in options(self).items() if k != "request_timeout_ms"}
    module: Any = faust_batches
    module.REQUEST_S = 90.0


def open_is_connected() -> None:
    """A server whose connection carries nothing takes itself for connected."""

    def connected(self: Subscriber) -> bool:
        return bool(self._consumer.metrics()["consumer-metrics"]["connection-count"])

    Subscriber.connected = property(connected)  # type: ignore[method-assign, assignment]


def aborted_read() -> None:
    """What a producer has taken back is read as well: Faust's own way."""
    PartitionBatchThread._create_worker_consumer = AIOKafkaConsumerThread._create_worker_consumer  # type: ignore[method-assign]


def markers_unpassed() -> None:
    """A batch ends with its last click: where a transaction's marker comes after it, that is still to be read."""
    faust_batches._positions = lambda consumer: {}


def plant(names: str) -> None:
    """The functions above of these names, with commas between them; none in an empty text."""
    for name in filter(None, names.split(",")):
        globals()[name]()
