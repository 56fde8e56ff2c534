"""A network between a role and the broker that can fail: a TCP proxy in a thread of the test."""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from stream.broker import LocalBroker
from stream.ports import free_port

CHUNK = 1 << 16
IN_FLIGHT = 64  # chunks a direction
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset


class Flow:
    """One connection through the proxy. A lost one stays open and carries nothing any more."""

    def __init__(self, *writers: asyncio.StreamWriter) -> None:
        self.writers = list(writers)
        self.lost = False
        self.task: asyncio.Task[None] | None = None


class Proxy:
    """`port` on loopback leads to `target`; a context manager. One fault at a time, ended by `heal`."""

    def __init__(self) -> None:
        self.port, self.target = free_port(), free_port()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._flows = set[Flow]()
        self._passing = asyncio.Event()
        self._passing.set()
        self._delay_s, self._bytes_a_second = 0.0, float("inf")
        self._server: asyncio.Server | None = None

    @property
    def bootstrap(self) -> str:
        return f"127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Every connection is reset, and new ones are refused."""
        self._do(self._cut())

    def black_hole(self) -> None:
        """Connections stay open and carry nothing; new ones are accepted and never answered."""
        self._do(self._set(lambda: self._passing.clear()))

    def slow(self, delay_s: float, bytes_a_second: float = float("inf")) -> None:
        """Each way and each connection."""
        self._do(self._set(lambda: self.__dict__.update(_delay_s=delay_s, _bytes_a_second=bytes_a_second)))

    def forget(self) -> None:
        """The connections that are open stay so and carry nothing any more, new ones do: a firewall starts anew."""
        self._do(self._forget())

    def heal(self, lost: bool = False) -> None:
        """What a black hole held arrives late, as TCP would send it again. `lost`: it is as with `forget`."""
        self._do(self._heal(lost))

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, step: Any) -> None:
        asyncio.run_coroutine_threadsafe(step, self._loop).result(10)

    async def _set(self, change: Callable[[], None]) -> None:
        change()

    async def _listen(self) -> None:
        def connected(*streams: Any) -> None:
            flow = Flow(streams[1])
            self._flows.add(flow)
            flow.task = asyncio.create_task(self._connect(flow, *streams))

        self._server = await asyncio.start_server(connected, "127.0.0.1", self.port, limit=CHUNK)

    async def _cut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for flow in list(self._flows):
            for writer in flow.writers:
                if not writer.is_closing():
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                    writer.transport.abort()

    async def _forget(self) -> None:
        for flow in self._flows:
            flow.lost = True

    async def _end(self) -> None:
        await self._cut()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _heal(self, lost: bool) -> None:
        if lost and not self._passing.is_set():
            await self._forget()
        self._delay_s, self._bytes_a_second = 0.0, float("inf")
        self._passing.set()
        if self._server is None:
            await self._listen()

    async def _connect(self, flow: Flow, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._passing.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target, limit=CHUNK)
            flow.writers.append(far_writer)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._carry(flow, reader, far_writer))
                both.create_task(self._carry(flow, far_reader, writer))
        except* OSError:
            pass  # one end is gone: so is the other
        finally:
            self._flows.discard(flow)
            for one in flow.writers:
                one.close()

    async def _carry(self, flow: Flow, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction: what is read is written a delay later, in order, until its end."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(IN_FLIGHT)
        reading = asyncio.create_task(self._read(reader, waiting))
        try:
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(max(0.0, due - self._loop.time()))
                await self._passing.wait()
                if flow.lost:
                    await asyncio.Event().wait()
                if not data:
                    writer.write_eof()
                    return
                writer.write(data)
                await writer.drain()
                await asyncio.sleep(len(data) / self._bytes_a_second)
        finally:
            reading.cancel()

    async def _read(self, reader: asyncio.StreamReader, waiting: asyncio.Queue[tuple[float, bytes]]) -> None:
        data = b"begun"
        while data:
            try:
                data = await reader.read(CHUNK)
            except OSError:
                data = b""
            await waiting.put((self._loop.time() + self._delay_s, data))


@contextmanager
def broker_behind(folder: Path, names: list[str]) -> Iterator[tuple[LocalBroker, dict[str, Proxy]]]:
    """A broker that can be reached directly, and by each of the names through a proxy of its own.

    A client comes back to the address that the broker advertises: so each proxy leads to a listener that advertises it.
    """
    port, controller = free_port(), free_port()
    with ExitStack() as stack:
        proxies = {name: stack.enter_context(Proxy()) for name in names}
        listeners = {"PLAINTEXT": port, "CONTROLLER": controller} | {n.upper(): p.target for n, p in proxies.items()}
        advertised = {"PLAINTEXT": port} | {n.upper(): p.port for n, p in proxies.items()}
        settings = {
            "controller.quorum.voters": f"1@127.0.0.1:{controller}",
            "listeners": _addresses(listeners),
            "advertised.listeners": _addresses(advertised),
            "listener.security.protocol.map": ",".join(f"{name}:PLAINTEXT" for name in listeners),
        }
        yield stack.enter_context(LocalBroker(folder, port, settings=settings)), proxies


def _addresses(ports: Mapping[str, int]) -> str:
    return ",".join(f"{name}://127.0.0.1:{port}" for name, port in ports.items())
