"""Runs one command and ends it when the process that wanted it is gone, killed outright included.

    python guard.py PARENT_PID COMMAND...

Prints the command's process id, then waits. SIGTERM, or the parent's death, becomes SIGTERM for the
command and, GRACE_S later, SIGKILL. Run it in a session of its own: Ctrl-C then reaches the parent only,
which stops things in its order.

A process between the two, rather than PR_SET_PDEATHSIG on the command, because that signal fires when
the *thread* that forked ends, and a pipe to the parent stays open in whatever the parent has forked.
Imports nothing of ours: it is run by path.
"""

import contextlib
import ctypes
import io
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping

GRACE_S = 20
PR_SET_PDEATHSIG = 1


def guarded(
    command: list[str],
    stderr: io.BufferedWriter | None,
    env: Mapping[str, str] | None = None,
    pass_fds: Collection[int] = (),
) -> tuple["subprocess.Popen[bytes]", int | None]:
    """The guard, in a session of its own, and the command's process id; None: it could not start it, and ends."""
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env=env,
        pass_fds=pass_fds,
        start_new_session=True,
    )
    assert guard.stdout is not None
    with guard.stdout as first_line:
        return guard, int(first_line.readline() or 0) or None


def wait_for_end(parent: int) -> None:
    """Blocks until the process `parent`, our parent, has ended."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # gone already, or a sandbox without pidfd
            select.select([os.pidfd_open(parent)], [], [])
    while os.getppid() == parent:
        time.sleep(0.5)


def die_with_guard() -> None:
    """In the command's process, before exec: should the guard itself be killed, Linux kills the command."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(parent: int, command: list[str]) -> int:
    # Forked by the main thread, which stays until the command ends (PR_SET_PDEATHSIG, above).
    # Its output joins our stderr: our stdout is a pipe that the parent closes after the first line.
    child = subprocess.Popen(command, stdout=sys.stderr, preexec_fn=die_with_guard)

    def terminate(*_: object) -> None:
        child.terminate()
        signal.alarm(GRACE_S)

    def end_with_parent() -> None:
        wait_for_end(parent)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGALRM, lambda *_: child.kill())
    signal.signal(signal.SIGTERM, terminate)
    threading.Thread(target=end_with_parent, daemon=True).start()
    with contextlib.suppress(BrokenPipeError):
        print(child.pid, flush=True)
    return child.wait()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
