"""deploy/examples: every configuration is taken, every line is of the form, and the weights do something."""

from pathlib import Path

import pytest

from stream.datasets import load_dataset
from stream.events import decode, decode_click, encode
from workers.settings import Settings, load_settings

EXAMPLES = sorted(path.parent for path in (Path(__file__).parents[1] / "deploy" / "examples").glob("*/upwell.toml"))


def test_the_five_domains_are_there() -> None:
    assert [path.name for path in EXAMPLES] == ["courses", "music", "shop", "social", "video"]


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_an_example_holds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = Settings()
    monkeypatch.setenv("UPWELL_CONFIG", str(folder / "upwell.toml"))
    settings, dataset = load_settings(), load_dataset(folder)
    assert settings.kafka.prefix == folder.name
    for item in dataset.items:
        assert decode(encode(item), type(item)) == item
    known = {item.item_id for item in dataset.items}
    for click in dataset.events:
        assert decode_click(encode(click), click.ts_ms) == click
        assert click.item_id in known
        assert not click.context  # a type that the service does not know is a click that keeps its name there
    assert any(settings.weight(click) != defaults.weight(click) for click in dataset.events)
    assert any(settings.weight(click) < 0 for click in dataset.events)  # says no, too
    read_me = (folder / "README.md").read_text()
    asked = read_me.split("upwell watch ")[1].split()[0]
    assert f"deploy/examples/{folder.name}/upwell.toml" in read_me
    assert asked in {click.user_id for click in dataset.events}
