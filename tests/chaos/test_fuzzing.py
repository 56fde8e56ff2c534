"""Scenario 18: the fold against its definition, whatever is late or comes again; the decoder on any bytes."""

import random
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from model.user_state import EMPTY, apply_clicks, decode_state, encode_state
from tests.chaos.decoder_checks import check, corpus
from tests.model.test_user_state import LIMITS, C, clicks, numbered, slow_twin

SEED, FUZZ_S = 18, 600
FUZZER = """
import sys, atheris
with atheris.instrument_imports(include=["stream", "model", "tests", "workers"]):
    from tests.chaos.decoder_checks import check
atheris.Setup(sys.argv, check)
atheris.Fuzz()
"""  # no dependency of ours: `uv pip install atheris` before the long form


@pytest.mark.timeout(1800)
def test_the_fold_is_its_definition(long: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Micro-batches of any length; after each, perhaps a crash that repeats a tail of what was applied, by a worker
    that reads the state from the topic; each event perhaps sent twice at once."""
    tried = {"examples": 0, "events": 0, "late": 0, "sent again": 0, "delivered again": 0}

    @seed(SEED)
    @settings(max_examples=10_000 if long else 200, deadline=None, database=None)
    @given(clicks, st.randoms(use_true_random=False))
    def holds(events: list[C], draw: random.Random) -> None:
        sent = [event for event in events for _ in range(draw.choice((1, 1, 2)))]
        state, at = EMPTY, 0
        while at < len(sent):
            upto, back = draw.randint(at + 1, len(sent)), draw.choice((at, draw.randint(0, at)))
            state = decode_state(encode_state(apply_clicks(state, numbered(sent[back:upto], back), LIMITS)))
            tried["delivered again"] += at - back
            at = upto
        assert encode_state(state) == encode_state(slow_twin(sent))
        once = slow_twin(events)
        assert (state.history, state.seen, state.applied) == (once.history, once.seen, once.applied)
        assert list(state.history) == sorted(state.history, key=lambda entry: entry.ts_ms)
        tried["examples"] += 1
        tried["events"] += len(events)
        tried["late"] += sum(b.ts_ms < a.ts_ms for a, b in pairwise(events))
        tried["sent again"] += len(sent) - len(events)

    holds()
    with capsys.disabled():
        print(f"\nfold, seed {SEED}: {tried}")


def mutated(raw: bytes, draw: random.Random) -> bytes:
    """Up to four bytes or spans of a message changed, cut out, doubled or taken from another one."""
    data = bytearray(raw)
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(data) + 1), draw.choice((1, 1, 4, 30))
        other = draw.choice(corpus())
        start = draw.randrange(len(other))
        piece = (draw.randbytes(length), b"", bytes(data[at : at + length]) * 2, other[start : start + length])
        data[at : at + length] = draw.choice([*piece, b"1e999", b'"', b"\xff", b"\\ud800", b"-1", b"null"])
    return bytes(data)


@pytest.mark.timeout(1800)
def test_mutated_messages_are_refused_by_name_or_whole(long: bool) -> None:
    draw = random.Random(SEED)
    for raw in corpus():
        check(raw)
        for _ in range(100_000 if long else 1000):
            check(mutated(raw, draw))


@pytest.mark.timeout(FUZZ_S + 300)
def test_the_fuzzer_finds_nothing(long: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not (long and find_spec("atheris")):
        pytest.skip("ten minutes of atheris: the long form, where it is installed")
    for number, raw in enumerate(corpus()):
        (tmp_path / f"good-{number}").write_bytes(raw)
    command = [sys.executable, "-c", FUZZER, f"-seed={SEED}", f"-max_total_time={FUZZ_S}"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=FUZZ_S + 200)
    assert done.returncode == 0, done.stderr[-3000:]
    with capsys.disabled():
        print(f"\natheris, seed {SEED}: {re.findall(r'Done .*', done.stderr)}")
