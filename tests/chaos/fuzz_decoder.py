"""What any bytes may do to the decoders, and atheris on it: python -m tests.chaos.fuzz_decoder SECONDS CORPUS."""

import importlib
import json
import math
import sys
from typing import Any

import msgspec

from model.user_state import decode_state, encode_state
from stream.events import WIRE_TYPES, BadEvent, decode, decode_click, encode

NOW_MS = 1_800_000_000_000


def check(raw: bytes) -> int:
    """How many decoders took the bytes. Raises AssertionError, or whatever a decoder lets out beside its own error."""
    taken = 0
    for kind in WIRE_TYPES:
        try:
            event = decode(raw, kind)
        except BadEvent as error:
            assert str(error), "a dead letter needs a cause"
            continue
        taken += 1
        assert decode(encode(event), kind) == event, "what was read is not what is sent on"
    try:
        click = decode_click(raw, NOW_MS)
        assert click.value is None or math.isfinite(click.value)
        for identifier in (click.event_id, click.user_id, click.item_id):
            assert 0 < len(identifier.encode()) <= 4 * 256
    except BadEvent:
        pass
    try:
        state = decode_state(raw)
    except msgspec.DecodeError:
        return taken
    again = encode_state(state)
    assert encode_state(decode_state(again)) == again
    return taken + 1


def main(seconds: str, corpus: str) -> None:
    """Prints one JSON line at the end; a finding ends the process with atheris's own report and another exit code."""
    atheris: Any = importlib.import_module("atheris")  # not among our dependencies: a venv of its own has it
    atheris.instrument_func(decode_click)
    runs = taken = 0

    def one(raw: bytes) -> None:
        nonlocal runs, taken
        runs, taken = runs + 1, taken + check(raw)
        if runs % 10_000 == 0:
            print(json.dumps({"runs": runs, "taken": taken}), flush=True)

    atheris.Setup([sys.argv[0], corpus, f"-max_total_time={seconds}", "-seed=18", "-max_len=4096"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
