"""`workers` may import `stream` and `model`; those two import nothing of ours; nothing imports `workers` or `tests`."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALLOWED = {"stream": {"stream"}, "model": {"model"}, "workers": {"workers", "stream", "model"}}
HEAVY = {"stream": {"torch", "faust", "hnswlib"}, "model": {"kafka", "aiokafka", "faust", "litestar"}}


def imported(source: str) -> Iterator[str]:
    """Top-level packages that a module names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def wrong_arrows(package: str, source: str) -> set[str]:
    found = set(imported(source))
    ours = found & {*ALLOWED, "tests"}
    return (ours - ALLOWED[package]) | (found & HEAVY.get(package, set()))


def test_arrows_point_one_way() -> None:
    for package in ALLOWED:
        files = sorted((ROOT / package).rglob("*.py"))
        assert files
        for file in files:
            assert not wrong_arrows(package, file.read_text()), file


def test_a_wrong_arrow_is_seen() -> None:
    assert wrong_arrows("model", "from stream.events import Click") == {"stream"}
    assert wrong_arrows("stream", "def late():\n    import torch") == {"torch"}
    assert wrong_arrows("workers", "import tests.conftest") == {"tests"}
