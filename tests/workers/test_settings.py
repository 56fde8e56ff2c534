"""Bad configuration stops at the start and names its key."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from model.user_state import Entry, UserState, encode_state
from stream.events import MAX_ID, Click
from tests.workers.service import upwell
from workers.cli import app
from workers.command import check_device
from workers.sender import MAX_RECORD_BYTES
from workers.settings import ConfigError, Kafka, Settings, Trainer, Worker, load_settings
from workers.up import ROLES

BAD = {"UPWELL_KAFKA__PREFIX": "no spaces, please"}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("UPWELL_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "upwell.toml").write_text(
        'artifacts = "s3://bucket/x"\n[kafka]\nprefix = "file"\npartitions = 3\n[event_weights]\nview = 0.1\n'
    )
    monkeypatch.setenv("UPWELL_KAFKA__PREFIX", "variable")
    settings = load_settings()
    assert (settings.kafka.prefix, settings.kafka.partitions) == ("variable", 3)
    assert settings.topics.clicks.name == "variable.clicks"
    viewed, bought = (
        settings.weight(Click(event_id="e", user_id="u", item_id="i", event_type=kind, ts_ms=0))
        for kind in ("view", "purchase")
    )
    assert (viewed, bought) == (0.1, 3.0)
    assert settings.artifacts == "s3://bucket/x"


def test_installations_on_one_kafka_are_in_a_group_each() -> None:
    """In one, each start or end of a worker takes all partitions from the other's."""
    assert [Settings(kafka=Kafka(prefix=name)).group for name in ("upwell", "shop")] == ["upwell-worker", "shop-worker"]
    assert Settings(kafka=Kafka(prefix="shop"), worker=Worker(group="mine")).group == "mine"


@pytest.mark.parametrize(
    ("name", "value", "cause"),
    [
        ("UPWELL_KAFKA__BOOTSTRAP", "no port", "kafka.bootstrap"),
        ("UPWELL_KAFKA__BOOTSTRAP", "127.0.0.1:99999", r"kafka\.bootstrap .*127\.0\.0\.1:99999: no such port"),
        ("UPWELL_KAFKA__BOOTSTRAP", "kafka:9092,kafka..example:9092", r"kafka\.bootstrap .*kafka\.\.example:9092: "),
        ("UPWELL_KAFKA__PARTITIONS", "0", "kafka.partitions"),
        ("UPWELL_KAFKA__BOOTSTRP", "127.0.0.1:9092", r"kafka\.bootstrp \(UPWELL_KAFKA__BOOTSTRP\): "),
        ("UPWELL_ARTEFACTS", "x", "UPWELL_ARTEFACTS: no such setting"),
        ("UPWELL_EVENT_WEIGHTS__STARE", "1", r"event_weights\.stare "),
        ("UPWELL_EVENT_WEIGHTS__VIEW", "nan", "event_weights.view"),
        ("UPWELL_WORKER__K", "many", "worker.k"),
        ("UPWELL_LOG_LEVEL", "LOUD", "log_level"),
        ("UPWELL_TRAINER__DEVICE", "gpu", "trainer.device"),
        ("UPWELL_CONFIG", "/nowhere.toml", "UPWELL_CONFIG: no file /nowhere.toml"),
        ("UPWELL_KAFKA__USERNAME", "me", "kafka"),
        ("UPWELL_WORKER__EVENT_IDS", "100000", "worker .*history, seen and event_ids allow 1012300 bytes"),
        ("UPWELL_SERVE__CORS_ORIGINS", "https://shop.example", "UPWELL_SERVE__CORS_ORIGINS: .*JSON"),
        ("UPWELL_ARMS", "{", "UPWELL_ARMS: .*JSON"),
        ("UPWELL_ARMS_KEY", "\u5b9e\u9a8c" * 12, "arms_key .*72 bytes, at most 64"),
        ("UPWELL_SERVE__CERT_FILE", "/nope", r"serve\.cert_file .*No such file"),
        ("UPWELL_SERVE__KEY_FILE", "/nope", r"serve\.key_file .*No such file"),
    ],
)
def test_bad_variables_are_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str, cause: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=cause):
        load_settings()


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("[kafka]\nbroker = 'x'\n", "kafka.broker"),
        ("colour = 'red'\n", "colour"),
        ("[trainer]\nround_s = -1\n", "trainer.round_s"),
        ("not toml", "upwell.toml"),
        ("# caf\xe9\n", "upwell.toml: 'utf-8' codec can't decode"),
        ("[arms.wide]\nshare = 0.6\n[arms.draws]\nshare = 0.5\n", r"^arms: the shares add up to 1\.1"),
        ("[arms.default]\nshare = 0.5\n", "default is the name of the control"),
        ("[arms.wide]\nshare = 0.5\ndiversity = 2\n", "arms.wide.diversity"),
        ("[arms.'no spaces']\nshare = 0.5\n", "arms"),
        ("[worker]\nk = 5\n[arms.draws]\nshare = 0.5\nexplore = 0.1\n", "worker.k has to be at least 10"),
        ("[serve]\nwait_s = 10\n", "must be below timeout_s"),
        ("[trainer]\nwindow_events = 1000\nholdout = 800\n", "trainer .*has to hold min_events and holdout, 1100"),
        ("[serve]\ncert_file = '/dev/null'\n", "belong together"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, cause: str) -> None:
    (tmp_path / "upwell.toml").write_text(text, "latin-1")
    with pytest.raises(ConfigError, match=cause):
        load_settings()


def test_the_largest_state_that_the_settings_allow_fits_into_a_record() -> None:
    """Longest ids, in four bytes a character; over that a worker would fail at the same click for ever."""
    with pytest.raises(ValueError, match="of a user's state"):
        Worker(history=691)
    worker = Worker(history=690)
    full = Entry("𝒌" * MAX_ID, -1 / 3, 2**53 - 1)
    seen, event_ids = (b"x" * 8 * count for count in (worker.seen, worker.event_ids))
    state = UserState((full,) * worker.history, seen, event_ids, 2**63 - 1, 2**63 - 1)
    assert len(encode_state(state)) <= MAX_RECORD_BYTES


def test_settings_are_frozen_and_hide_the_password() -> None:
    settings = Settings()
    with pytest.raises(ValueError, match="frozen"):
        settings.artifacts = "elsewhere"  # type: ignore[misc]
    secret = settings.kafka.model_copy(update={"password": "hush"})
    assert "hush" not in repr(secret)


@pytest.mark.parametrize("role", ["worker", "trainer", "indexer", "serve", "topics", "up"])
def test_every_role_stops_at_once_with_exit_code_2(role: str) -> None:
    done = CliRunner().invoke(app, role, env=BAD)
    assert done.exit_code == 2
    assert "kafka.prefix (UPWELL_KAFKA__PREFIX)" in done.stderr


@pytest.mark.parametrize("role", ["worker", "trainer", "serve"])
def test_a_gpu_that_is_not_there_stops_the_role_that_is_to_have_it(role: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv(f"UPWELL_{role.upper()}__DEVICE", "cuda")
    for started in (role, "up"):
        done = CliRunner().invoke(app, started)
        assert done.exit_code == 2 and f"{role}.device: torch finds no GPU" in done.stderr
    for other in {*ROLES, "doctor"} - {role}:
        check_device(load_settings(), other)


def test_several_processes_that_train_have_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    settings = Settings(trainer=Trainer(device="cuda"))
    check_device(settings, "trainer")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # by which torch knows torchrun
    with pytest.raises(ConfigError, match=r"trainer.device: .*torchrun"):
        check_device(settings, "trainer")


def test_a_process_ends_so_without_a_trace() -> None:
    done = upwell("worker", **BAD)
    assert done.returncode == 2
    assert "kafka.prefix (UPWELL_KAFKA__PREFIX)" in done.stderr
    assert "Traceback" not in done.stderr
