"""Processes forked from one Python that has imported what they need.

A search process of 2,000 items is ready in 35 ms, where it took 310 to start one (by hand).

    parent -> server   arguments as a line of JSON, and two descriptors: the child's socket, and where to tell its end
    server -> parent   pid, int64; into the second descriptor, when the child has ended, its code as subprocess has it

One thread, so that its fork is safe; it leaves with its parent, and the children with it. Why: docs/decisions.md.
"""

import atexit
import contextlib
import ctypes
import gc
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

_NUMBER = struct.Struct("<q")
_ANSWER_S = 60.0  # a first fork waits for the server's imports
_PR_SET_PDEATHSIG = 1


class Forked:
    """A child of the server. Thread-safe."""

    def __init__(self, pid: int, told: int) -> None:
        self.pid = pid
        self._told, self._code, self._lock = told, 0, threading.Lock()

    def kill(self) -> None:
        with self._lock:
            if self._told >= 0:
                os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout_s: float) -> int:
        """Its code, the signal's number below zero. Raises TimeoutError."""
        with self._lock:
            if self._told >= 0:
                poll = select.poll()
                poll.register(self._told, select.POLLIN)
                if not poll.poll(1000 * timeout_s):
                    raise TimeoutError(f"{self.pid} has not ended in {timeout_s} s")
                code = os.read(self._told, _NUMBER.size)
                os.close(self._told)
                self._told = -1
                self._code = _NUMBER.unpack(code)[0] if code else -signal.SIGTERM  # as the server's end told it
        return self._code


class ForkServer:
    """`python -P -m MODULE HANDLE PARENT`, which is to call `serve`; started when needed, and again when it has died.

    Thread-safe.
    """

    def __init__(self, module: str) -> None:
        self._module, self._lock = module, threading.Lock()
        self._control: socket.socket | None = None
        self._server: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def fork(self, connection: socket.socket, *arguments: str) -> Forked:
        """A child that works on a copy of `connection`. Raises OSError where none can be forked."""
        line = json.dumps(arguments).encode() + b"\n"
        told, theirs = os.pipe()
        try:
            with self._lock:
                try:
                    pid = self._ask(line, handles := [connection.fileno(), theirs])
                except OSError:  # it has died since the last one: another
                    pid = self._ask(line, handles)
            if pid < 0:
                raise BlockingIOError("no process can be forked: no memory, or too many processes")
        except BaseException:
            os.close(told)
            raise
        finally:
            os.close(theirs)
        return Forked(pid, told)

    def close(self) -> None:
        """Ends it and its children."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._control is not None and self._server is not None:
            self._control.close()
            self._server.kill()
            self._server.wait()
            self._control = None

    def _start(self) -> socket.socket:
        control, theirs = socket.socketpair()
        control.settimeout(_ANSWER_S)
        root = str(Path(__file__).resolve().parents[1])
        paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with theirs:
            self._server = subprocess.Popen(
                # -P: nothing from the working directory, which may hold a model.py.
                [sys.executable, "-P", "-m", self._module, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            )
        self._control = control
        return control

    def _ask(self, line: bytes, handles: list[int]) -> int:
        """The pid of the new child. Raises OSError, then the server is no more."""
        try:
            control = self._control or self._start()
            control.sendall(line[socket.send_fds(control, [line], handles) :])
            if not (pid := control.recv(_NUMBER.size, socket.MSG_WAITALL)):
                raise ConnectionResetError("the fork server has ended")
        except OSError:
            self._end()
            raise
        return int(_NUMBER.unpack(pid)[0])  # -1: it could not fork


def serve(handle: int, parent: int, work: Callable[..., None]) -> None:
    """The server's side: `work(connection, *arguments)` in a child for each call, until the parent is gone."""
    _leave_with(parent)
    ended, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    gc.freeze()  # a child's garbage collector leaves these pages shared
    children = dict[int, int]()  # pid -> where to tell its end
    with socket.socket(fileno=handle) as control:
        poll = select.poll()  # the handle is the parent's number, which may be beyond select's 1,024
        poll.register(control, select.POLLIN)
        poll.register(ended, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if ended.fileno() in ready:
                ended.recv(4096)
                _reap(children)
            if control.fileno() in ready:
                line, handles, _, _ = socket.recv_fds(control, 1 << 16, 2)
                while line and not line.endswith(b"\n"):
                    more = control.recv(1 << 16)
                    line = line + more if more else b""  # cut by the parent's end
                if not line:
                    return
                server = os.getpid()
                try:
                    pid = os.fork()
                except OSError:  # no room for one more: those that are there go on
                    traceback.print_exc()
                    for descriptor in handles:
                        os.close(descriptor)
                    control.sendall(_NUMBER.pack(-1))
                    continue
                if not pid:
                    signal.set_wakeup_fd(-1)
                    for descriptor in (control.detach(), ended.detach(), wake.detach(), handles[1], *children.values()):
                        os.close(descriptor)
                    _run(work, handles[0], line, server)
                os.close(handles[0])  # its end is to be seen when the child alone has gone
                children[pid] = handles[1]
                control.sendall(_NUMBER.pack(pid))


def _reap(children: dict[int, int]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        told = children.pop(pid)
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it
            os.write(told, _NUMBER.pack(os.waitstatus_to_exitcode(status)))
        os.close(told)


def _run(work: Callable[..., None], handle: int, line: bytes, server: int) -> None:
    """Does not return."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _leave_with(server)
        with socket.socket(fileno=handle) as connection:
            work(connection, *json.loads(line))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _leave_with(parent: int) -> None:
    """SIGTERM, which also comes when the parent dies, ends an orphan and nothing else.

    The kernel sends PDEATHSIG when the *thread* that started us ends: by itself no reason to leave. The end
    of the socket says the same where there is no prctl; SIGINT goes to a terminal's whole process group.
    """

    def leave(*_: object) -> None:
        if os.getppid() != parent:
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    leave()  # the parent may have died before prctl
