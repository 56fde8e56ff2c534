import subprocess
import sys

import pytest

from workers.processes import EX_SOFTWARE

SCRIPT = """
import ctypes, threading
from workers.processes import share_heaps
share_heaps()
libc, together = ctypes.CDLL(None), threading.Barrier(12)
def allocate():
    together.wait()
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=allocate) for _ in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.fopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w")))
libc.fflush(None)
"""

RAISES = """
import threading, time
from workers.processes import end_with_threads
end_with_threads()
threading.Thread(target=lambda: 1 / 0, name="follows").start()
time.sleep(60)
"""


def test_a_thread_that_ends_by_an_error_ends_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", RAISES], capture_output=True, text=True, timeout=30)
    assert done.returncode == EX_SOFTWARE and "thread follows" in done.stdout + done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_twelve_threads_share_two_heaps() -> None:
    """Each has its own otherwise."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert 1 <= done.stdout.count("<heap nr=") <= 2
