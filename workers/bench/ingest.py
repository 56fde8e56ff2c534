"""Clicks a CPU second through a worker, against what reading alone and recommending alone cost.

Floors: (a) a bare Faust agent, (b) aiokafka `getmany` with decode, (c) embedding and search for the same users in
the same micro-batches, no Kafka. The worker twice: without a generation (the fold path: read, decode, dedup, fold,
changelog, commit) and with one (the whole job: a list for every touched user, sent and committed, too).
"""

from collections.abc import Callable, Sequence
from functools import partial

from model.config import ModelConfig
from model.model import Model
from model.user_state import EMPTY, Applied, Fold, UserState
from stream.events import Artifact, Item, decode_click
from stream.producer import partition_of
from workers.bench import data
from workers.bench.harness import Options, alternate, cpu_s, cpu_seconds, medians, ratio
from workers.bench.stage import Keyed, Stage, clicks_per_cpu_s, said, stage, write_clicks
from workers.catalogue import Catalogue
from workers.partitions import ROOM
from workers.search import SearchProcess
from workers.settings import Settings
from workers.snapshot import Query, Snapshot
from workers.states import limits_of


def floor(stage: Stage, kind: str, clicks: Keyed) -> float:
    """Clicks a CPU second of workers/bench/floors.py."""
    settings = stage.fresh()
    with stage.running(settings, "workers.bench.floors", kind, str(len(clicks))) as process:
        said(process, "ready")
        write_clicks(settings, clicks)
        return float(said(process, "rate"))


def micro_batches(clicks: Keyed, settings: Settings) -> list[list[Query]]:
    """What the worker asks of its snapshot for these clicks where all of them wait: one query a touched user of as many
    as it holds of a partition."""
    limits, partitions = limits_of(settings), dict[int, list[bytes]]()
    held, most = ROOM // settings.kafka.partitions, settings.worker.batch_clicks
    for user_id, raw in clicks:
        partitions.setdefault(partition_of(user_id, settings.kafka.partitions), []).append(raw)
    states, batches = dict[str, UserState](), list[list[Query]]()
    for raws in partitions.values():
        for start in range(0, len(raws), held):
            folds: dict[str, Fold] = {}
            for offset, raw in enumerate(raws[start : start + held], start):
                click = decode_click(raw)
                fold = folds.setdefault(click.user_id, Fold(states.get(click.user_id, EMPTY), limits))
                fold.apply(Applied(click, 1.0, offset))
            after = {user_id: fold.state() for user_id, fold in folds.items()}
            states.update(after)
            queries = [Query(s.history, s.seen, s.history[-1].ts_ms) for s in after.values()]
            batches += [queries[at : at + most] for at in range(0, len(queries), most)]
    return batches


def recommending(
    search: SearchProcess, artifact: Artifact, model: Model, items: Sequence[Item], clicks: Keyed, settings: Settings
) -> Callable[[], float]:
    """Clicks a CPU second of embedding and search alone, the search process counted."""
    catalogue = Catalogue()
    catalogue.items = {item.item_id: item for item in items}
    snapshot, batches = Snapshot.of(artifact, search, model, catalogue), micro_batches(clicks, settings)

    def run() -> float:
        before = cpu_s(search.pid)
        own = cpu_seconds(lambda: [snapshot.recommend(batch, settings.worker.k) for batch in batches])
        return len(clicks) / (own + cpu_s(search.pid) - before)

    return run


def work(options: Options) -> tuple[dict[str, float], dict[str, float | str]]:
    folding = data.clicks(options.scaled(200_000, 4_000), users=100_000, items=50_000)
    whole = folding[: options.scaled(40_000, 1_500)]
    num_items = 1_000 if options.quick else 50_000
    items = data.items(num_items)
    config = data.SMALL if options.quick else ModelConfig()
    model = data.made_up_model(num_items, config, 200 if options.quick else 2_000)
    with stage() as set_up:
        artifact = data.generation(set_up.folder / "g1", model)
        with SearchProcess(set_up.folder / "g1", artifact.manifest_sha256) as search:
            contenders: dict[str, Callable[[], float]] = {
                "a_faust_agent": partial(floor, set_up, "faust", folding[: len(folding) // 4]),
                "b_aiokafka": partial(floor, set_up, "aiokafka", folding),
                "c_recommend_alone": recommending(search, artifact, model, items, whole, set_up.fresh()),
                "fold_path": partial(clicks_per_cpu_s, set_up, folding),
                "whole_job": partial(clicks_per_cpu_s, set_up, whole, artifact, items),
            }
            runs = alternate(contenders, options.rounds)
    ratios = {
        "fold_path / a": ratio(runs, "fold_path", "a_faust_agent"),
        "fold_path / b": ratio(runs, "fold_path", "b_aiokafka"),
        "whole_job / c": ratio(runs, "whole_job", "c_recommend_alone"),
    }
    values = {f"{name}_clicks_per_cpu_s": figure for name, figure in medians(runs).items()}
    return ratios, values | {
        "clicks": float(len(folding)),
        "click_bytes": float(len(folding[0][1])),
        "items": float(num_items),
    }
