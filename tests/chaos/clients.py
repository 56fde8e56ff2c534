"""Requests for lists at a fixed rate, whatever the answers take (open loop), from a process of their own.

    python -m tests.chaos.clients PORT RATE QUERY    one JSON line an answer, until the end of standard input

In the process of the test they would wait for its interpreter lock, and that would count as the server's time.
"""

import http.client
import json
import subprocess
import sys
import threading
import time
from typing import NamedTuple

CLIENTS = 4


class Answer(NamedTuple):
    at: float  # monotonic, when it was due
    ms: float  # since then
    status: int
    generation: str
    items: list[str]
    asked: float  # monotonic: later than due where the answer before took longer than the pause


def ask(port: int, rate: float, query: str, number: int, stop: threading.Event) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    due = time.monotonic() + number / rate
    while not stop.is_set():
        time.sleep(max(0.0, due - time.monotonic()))
        asked = time.monotonic()
        try:
            connection.request("GET", f"/v1/users/u{number}/recommendations?{query}")
            response = connection.getresponse()
            status, body = response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            status, body = 0, {}
            connection.close()
        items = [item["item_id"] for item in body.get("items", [])]
        answer = Answer(due, (time.monotonic() - due) * 1000, status, body.get("generation", ""), items, asked)
        sys.stdout.write(f"{json.dumps(answer)}\n")  # in one piece: print writes the end by itself
        due += CLIENTS / rate


class Clients:
    """The process, as a context manager; `answers` are there when it has ended, in the order of asking."""

    def __init__(self, port: int, rate: float, query: str) -> None:
        command = [sys.executable, "-m", "tests.chaos.clients", str(port), str(rate), query]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self.answers: list[Answer] = []

    def _read(self) -> None:
        assert self._process.stdout
        self._lines.extend(self._process.stdout)

    def __enter__(self) -> "Clients":
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._reader.join()
        self._process.stdout.close()
        self._process.wait()
        self.answers = sorted(Answer(*json.loads(line)) for line in self._lines)


def main() -> None:
    port, rate, query, stop = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], threading.Event()
    threads = [threading.Thread(target=ask, args=(port, rate, query, number, stop)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()


if __name__ == "__main__":
    main()
