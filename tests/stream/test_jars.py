import shutil
from pathlib import Path

import pytest

from stream.broker import LocalBroker
from stream.jars import CACHE, BrokerError, fetch_jars


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    fetch_jars()  # once, from the network, where `make venv` has not
    return Path(shutil.copytree(CACHE, tmp_path / "cache"))


def test_the_locked_jars_in_the_locks_order(cache: Path) -> None:
    jars = fetch_jars(cache)
    assert len(jars) == 46
    assert jars[0].name == "kafka_2.13-4.3.1.jar"
    assert all(jar.parent == cache for jar in jars)


def test_one_changed_bit_is_refused_by_name(cache: Path, tmp_path: Path) -> None:
    jar = cache / "jose4j-0.9.6.jar"
    content = bytearray(jar.read_bytes())
    content[len(content) // 2] ^= 1
    jar.write_bytes(content)
    with pytest.raises(BrokerError, match=r"jose4j-0\.9\.6\.jar: SHA-256 is .* delete .* and start again"):
        LocalBroker(tmp_path / "kafka", cache=cache).start()
    assert not (tmp_path / "kafka" / "broker.log").exists()
