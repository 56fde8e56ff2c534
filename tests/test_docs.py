"""README and docs: links lead somewhere, commands exist, code has the right types, generated pages are the code's."""

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from workers.cli import app
from workers.reference import PAGES
from workers.settings import load_settings

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/examples/*/README.md")]
PAGE = pytest.mark.parametrize("page", FILES, ids=lambda path: str(path.relative_to(ROOT)))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(text: str, *languages: str) -> list[str]:
    """Contents of the fenced blocks in these languages."""
    return [code for language, code in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S) if language in languages]


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub and MkDocs make them."""
    heads = re.findall(r"^#+ (.*)$", prose(text), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def broken_links(page: Path, text: str) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if re.match(r"https?:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            yield link


def commands(text: str) -> Iterator[list[str]]:
    """`upwell …` and `make …` of blocks and of prose, as words."""
    shell = "\n".join(blocks(text, "sh", "bash", "console", "shell")).replace("\\\n", " ").splitlines()
    quoted = re.findall(r"`((?:\S*/)?(?:upwell|make) [^`]+)`", re.sub(r"\s+", " ", prose(text)))
    for line in [*shell, *quoted]:
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.match(r"[A-Z_]+=|export$", words[0]):
            words.pop(0)
        if words and words[0].rpartition("/")[2] in ("upwell", "make"):
            yield [words[0].rpartition("/")[2], *words[1:]]


def wrong(words: list[str]) -> str | None:
    """What such a command would stumble over: a name that does not exist, by the command line's own table."""
    program, *rest = words
    if program == "make":
        return next((word for word in rest if word in set(rest) - TARGETS and "=" not in word and word != "..."), None)
    command = typer.main.get_command(app)
    while rest and hasattr(command, "commands") and not rest[0].startswith("-"):
        if not rest[0].isascii() or rest[0].isupper():
            return None  # `upwell …`: any of them
        if rest[0] not in command.commands:
            return rest[0]
        command = command.commands[rest.pop(0)]
    known = {"--help", *(name for option in command.params for name in (*option.opts, *option.secondary_opts))}
    return next((word for word in rest if word.startswith("--") and word.partition("=")[0] not in known), None)


@PAGE
def test_links_and_commands(page: Path) -> None:
    text = page.read_text()
    assert not list(broken_links(page, text))
    assert not [words for words in commands(text) if wrong(words)]
    indented = re.findall(r"^    (?:[A-Z_]+=\S+ )*(?:\S*/)?(?:upwell|make) .*", prose(text), re.M)
    assert not indented, "commands are looked at in fenced blocks"


def test_what_is_wrong_is_seen() -> None:
    page = ROOT / "README.md"
    text = "[a](docs/gone.md) [b](docs/deploy.md#gone) [c](docs/deploy.md#one-machine-compose) [d](#gone)"
    assert list(broken_links(page, text)) == ["docs/gone.md", "docs/deploy.md#gone", "#gone"]
    bad = "```sh\nX=1 .venv/bin/upwell demo --chek\nmake tset\n```\n`upwell generations roll`, `upwell lag`, `upwell …`"
    assert [wrong(words) for words in commands(bad)] == ["--chek", "tset", "roll", None, None]


@PAGE
def test_toml_blocks_are_settings(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("0f" * 32)
    for code in blocks(page.read_text(), "toml"):
        (tmp_path / "upwell.toml").write_text(re.sub('"/run/secrets/.*?"', f'"{tmp_path}/key"', code))
        monkeypatch.setenv("UPWELL_CONFIG", str(tmp_path / "upwell.toml"))
        load_settings()


def test_python_blocks_have_the_right_types(tmp_path: Path) -> None:
    """One program a page, by mypy: names, arguments and attributes are those of the code."""
    for page in FILES:
        if code := "\n".join(blocks(page.read_text(), "python")):
            ast.parse(code)
            (tmp_path / (re.sub(r"\W", "_", str(page.relative_to(ROOT))) + ".py")).write_text(code)
    files = sorted(str(path) for path in tmp_path.glob("*.py"))
    assert len(files) >= 3  # both READMEs and the tutorial
    mypy = [sys.executable, "-m", "mypy", "--cache-dir", str(ROOT / ".mypy_cache"), *files]
    done = subprocess.run(mypy, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", PAGES)
def test_reference_is_the_code_s(name: str) -> None:
    assert (ROOT / "docs/reference" / name).read_text() == PAGES[name](), "run `make reference`"


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        build, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= len(list(ROOT.glob("docs/**/*.md")))
    for page in pages:  # the pages work without a network
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="?https?://', page.read_text()), page


def test_the_chinese_readme_follows_the_english() -> None:
    """Section by section the same code (comments are translated), links and names: nothing is left out."""

    def skeleton(text: str) -> list[tuple[list[str], list[str], list[str]]]:
        code = [re.sub(r"\s*# .*", "", block) for block in blocks(text, "sh", "python")]
        parts = [prose(part) for part in text.split("\n## ")]
        names = [sorted(name for name in re.findall(r"`([^`]+)`", part) if " " not in name) for part in parts]
        links = [sorted(set(re.findall(r"\]\(([^)]+)\)", part)) - {"README.md", "README.zh.md"}) for part in parts]
        return list(zip(names, links, [code] * len(parts), strict=True))

    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh.md"))
    assert "](README.zh.md)" in english and "](README.md)" in chinese
    assert skeleton(english) == skeleton(chinese)
