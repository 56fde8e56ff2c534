"""`upwell evaluate`: every arm over a recorded stream, test-then-learn, into one folder.

DIR/MODE/ARM-KEY.npz    what one arm did, event by event; kept, so that a run that was stopped goes on
DIR/results.json        the figures          DIR/report.html, DIR/*.png    the same for the eye
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model.arms.catalogue import PRODUCT, Setting, check_names, make_arm
from model.arms.variants import Delayed
from model.config import ModelConfig
from model.encoder import Encoder
from model.evaluate import HISTORY, Arm, Mode, replayed
from model.outcome import Outcome
from model.sampling import Events, History
from stream.csv_events import load_csv, parse_columns
from stream.datasets import Dataset, load_dataset
from stream.text import item_text
from workers.figures import Figures, mode_figures
from workers.processes import compute_in_one_thread
from workers.report import write_report
from workers.settings import Settings
from workers.training_input import events_of

WARMUP = 0.2  # share of the events that is learned from and not counted


@dataclass(frozen=True)
class Options:
    settings: Settings
    stream: str
    arms: tuple[str, ...]
    modes: tuple[Mode, ...]
    limit: int | None
    seed: int
    out: Path
    columns: str | None = None


class _Watched:
    """An arm with its seconds counted; moves the progress bar."""

    def __init__(self, arm: Arm, progress: Progress, total: int, label: str) -> None:
        self.batch, self._arm, self._progress = arm.batch, arm, progress
        self._task = progress.add_task(label, total=total)
        # Events told, CPU seconds of scoring and learning them: a busy machine does not count.
        self.seconds: list[tuple[int, float]] = []
        self._spent = 0.0

    def score(
        self, users: NDArray[np.int64], histories: Sequence[History], now_ms: Sequence[int]
    ) -> NDArray[np.floating]:
        began = time.process_time()
        scores = self._arm.score(users, histories, now_ms)
        self._spent += time.process_time() - began
        return scores

    def learn(self, events: Events, rows: NDArray[np.int64]) -> None:
        began = time.process_time()
        self._arm.learn(events, rows)
        self.seconds.append((len(events), self._spent + time.process_time() - began))
        self._spent = 0.0
        self._progress.advance(self._task, len(events))


def load(options: Options) -> Dataset:
    """The stream, cut to `limit` events. Raises ValueError for a stream that cannot be read."""
    if options.stream.endswith(".csv"):
        if options.columns is None:
            raise ValueError(f"{options.stream}: a CSV needs --columns user=…,item=…,ts=…[,type=…,value=…,title=…]")
        dataset = load_csv(Path(options.stream), parse_columns(options.columns))
    else:
        dataset = load_dataset(options.stream)
    return Dataset(dataset.name, dataset.items, dataset.events[: options.limit])


def evaluate(options: Options) -> Figures:
    """Runs what DIR does not hold yet; results.json's content, which is written too."""
    compute_in_one_thread()
    dataset = load(options)
    titles = {item.item_id: item_text(item) for item in dataset.items}
    items = list(titles | dict.fromkeys((click.item_id for click in dataset.events), ""))
    text, encoder = _texts([titles.get(item, "") for item in items], options.settings)
    events = events_of(dataset.events, options.settings.weight)
    digest = _digest(events, titles, encoder)
    warmup = int(WARMUP * len(events))
    bits: Figures = {
        "stream": dataset.name, "events": len(events), "users": len(set(events.users)), "items": len(items),
        "test_part": f"the last {1 - WARMUP:.0%} of the events, from event {warmup} on", "seed": options.seed,
        "candidates": "items seen so far that the user has not consumed; `repeats`: consumed ones too",
        "us_per_event": "CPU time on one thread, scoring all items and learning",
        "modes": {},
    }  # fmt: skip
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        for mode in options.modes:
            setting = Setting(items, text, mode, len(events), warmup, options.seed)
            for name in options.arms:
                _run(options, setting, events, digest, name, bar)
    clicked = Counter(events.items)
    touched = np.array([clicked[item] for item in items])
    for mode in ("strict", "line"):
        kept = sorted({path.stem.rpartition("-")[0] for path in (options.out / mode).glob("*.npz")})
        found = {name: _read(*_place(options, digest, mode, name)) for name in kept}
        current = {name: pair for name, pair in found.items() if pair is not None}
        if current:
            bits["modes"][mode] = mode_figures(current, warmup, touched)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(bits, indent=1, ensure_ascii=False), encoding="utf-8")
    return bits


def _texts(texts: list[str], settings: Settings) -> tuple[NDArray[np.float32], str]:
    """Vectors (N, E), and the name of their encoder: "" where there is nothing to read."""
    if not any(text.strip() for text in texts):
        return np.zeros((len(texts), 384), np.float32), ""
    name, pooling = settings.indexer.encoder, settings.indexer.pooling
    encoder = Encoder(name, pooling=pooling, cache=settings.cache / "vectors.sqlite")
    return encoder.encode(texts), encoder.name


def _digest(events: Events, titles: dict[str, str], encoder: str) -> str:
    """Of every event, of what the items say and of what has read it."""
    made = hashlib.blake2b(events.weights.tobytes() + events.ts_ms.tobytes(), digest_size=16)
    made.update(json.dumps([list(events.users), list(events.items), titles]).encode() + encoder.encode())
    return made.hexdigest()


def _place(options: Options, digest: str, mode: str, name: str) -> tuple[Path, str]:
    """Of a kept result, with its key: what it must have been made from to count as this run's. The name holds its hash,
    so that another limit or seed replaces nothing; the learner's code is not in it."""
    config = asdict(ModelConfig()) if name.startswith(PRODUCT) else {}
    key = json.dumps([options.stream, digest, mode, name, options.seed, config])
    return options.out / mode / f"{name}-{hashlib.blake2b(key.encode(), digest_size=4).hexdigest()}.npz", key


def _run(options: Options, setting: Setting, events: Events, digest: str, name: str, bar: Progress) -> None:
    path, key = _place(options, digest, setting.mode, name)
    if _read(path, key) is not None:
        return
    made = make_arm(name, setting)
    arm = _Watched(made, bar, len(events), f"{setting.mode:6} {name}")
    length = len(events) if isinstance(made, Delayed) else HISTORY  # who drops the newest events needs older ones
    try:
        outcome = replayed(arm, events, setting.items, setting.mode, length)
    except FloatingPointError as error:
        raise ValueError(f"{setting.mode} {name}: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {field.name: getattr(outcome, field.name) for field in fields(outcome)}
    with (scratch := path.with_suffix(".part")).open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, key=np.array(key), seconds=np.array(arm.seconds), **columns)
        file.flush()
        os.fsync(file.fileno())
    scratch.rename(path)


def _read(path: Path, key: str) -> tuple[Outcome, NDArray[np.float64]] | None:
    """The outcome and seconds (calls, 2) of a finished run; None when there is none, or it is damaged."""
    try:
        with path.open("rb") as file, np.load(file) as kept:
            if str(kept["key"]) != key:
                return None
            return Outcome(**{field.name: kept[field.name] for field in fields(Outcome)}), kept["seconds"]
    except Exception:  # of a file cut short also BadZipFile, zlib.error, EOFError, ValueError or KeyError
        return None


def run(options: Options) -> None:
    """The command: prints one line an arm. Raises ValueError, OSError: no such stream or arm, an arm that diverges."""
    check_names(options.arms)
    results = evaluate(options)
    _say(results)
    print(write_report(results, options.out))


def _say(results: Figures) -> None:
    print(f"{results['stream']}: {results['events']} events; counted: {results['test_part']}")
    for mode, found in results["modes"].items():
        for name, arm in sorted(found["arms"].items(), key=lambda pair: -pair[1]["ndcg@10"]):
            figures = " ".join(f"{key} {arm[key]:.4f}" for key in ("hr@10", "hr@20", "ndcg@10", "mrr"))
            low, high = arm["intervals"]["ndcg@10"]
            cold = " ".join(f"{k}: {v['auc']:.3f}" for k, v in arm["cold_auc"].items() if v["events"])
            print(f"{mode:6} {name:28} {figures} [{low:.4f}, {high:.4f}] {arm['us_per_event']:6.0f} us  auc {cold}")
        for name, pair in found.get("upwell_minus", {}).items():
            mean, low, high = pair["ndcg@10"]
            print(f"{mode:6} upwell - {name:28} ndcg@10 {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
