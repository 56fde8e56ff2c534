"""Wheel and sdist: built from the tree, complete, and running from somewhere else."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def unpacked(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (wheel,) = dist.glob("*.whl")
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(unpacked: Path, home: Path, *arguments: str) -> str:
    """With the wheel's code before any other, and none of the checkout around."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("UPWELL_")}
    environment |= {"PYTHONPATH": str(unpacked), "XDG_CACHE_HOME": str(home / "cache")}
    done = subprocess.run([sys.executable, *arguments], cwd=home, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_runs_without_the_checkout(dist: Path, unpacked: Path, tmp_path: Path) -> None:
    assert "demo" in run(unpacked, tmp_path, "-m", "workers.cli", "--help")
    version = run(unpacked, tmp_path, "-m", "workers.cli", "--version").strip()
    assert f"upwell-{version}-py3-none-any.whl" in os.listdir(dist)
    assert re.match(r"\d+\.\d+", version) and not version.startswith("0.0")
    where = "import stream.jars as j; print(j.CACHE, len(j.locked()), j.__file__)"
    cache, jars, file = run(unpacked, tmp_path, "-c", where).split()
    assert (cache, jars, file) == (str(tmp_path / "cache/upwell/kafka"), "46", str(unpacked / "stream/jars.py"))


def test_the_wheel_has_what_the_demo_needs_and_no_more(unpacked: Path) -> None:
    assert {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"} == {"stream", "model", "workers"}
    for package in ("stream", "model", "workers"):
        there = [path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {str(path.relative_to(ROOT)) for path in there} <= {
            str(path.relative_to(unpacked)) for path in unpacked.rglob("*")
        }
    assert (unpacked / "stream/requirements-data.lock").exists()


def test_the_sdist_is_the_repository(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {name for name in tracked if (ROOT / name).exists()} <= names  # no git here: nothing to compare with


def test_locks_have_hashes_and_no_address() -> None:
    for lock in [*ROOT.glob("deploy/*.lock"), ROOT / "stream/requirements-data.lock"]:
        text = re.sub(r"#.*", "", lock.read_text()).replace("\\\n", "")
        assert "://" not in text and "--index-url" not in text
        assert all("--hash=sha256:" in line for line in text.splitlines() if line.strip()), lock
