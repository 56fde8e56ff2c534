"""Queries a second at equal recall: ours against in-process hnswlib, faiss, usearch and the exact scan.

Vectors are a trained tower's item vectors, grown to any number; queries are the vectors of its users. Ours is what the
product builds, in the shape and searched as its build chose, by graph or scan. Each peer takes the least ef, to 2 %,
that finds as much as ours or 0.99, less 0.002; "over 4096" where none does, and it is timed at 4,096. All on one
thread, the peers with M = 16 and ef_construction = 200 over the vectors lifted by one dimension, where L2 order is
inner product order.
And: what the search process costs beside the same index in this process, by batch; what a scan costs beside a graph, by
number of items, ef and batch.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import faiss
import hnswlib
import numpy as np
from usearch.index import Index as UsearchIndex

from model.index import ExactIndex, HnswIndex, recall
from model.manifest import load_index, verify
from model.model import Model
from model.probes import EF_SEARCH
from model.queries import Rows, Vectors
from workers.bench import data
from workers.bench.harness import Options, Runs, alternate, cpu_s, medians, ratio, seconds
from workers.search import SearchProcess

K, M, EF_CONSTRUCTION = 20, 16, 200
BATCHES = (1, 16, 64, 256)
QUERIES, TRUTHS = 512, 2_048  # timed, and asked for recall: a graph misses few queries, but all 20 of them
ENOUGH = 0.99  # recall@20: no peer must find more, though ours does
MARGIN = 0.002  # of recall@20, that a peer may find less than ours
EF_STEP = 1.02  # a peer's ef is at most so many times one that finds too little
SIZES = (1_000, 3_000, 10_000, 30_000)  # of the crossover
Ask = Callable[[Vectors], Rows]  # lifted queries (B, D + 1) -> rows (B, K)
Cpu = dict[str, float]


def lifted(vectors: Vectors) -> Vectors:
    """(N, D) -> (N, D + 1) of equal length."""
    squares = np.einsum("nd,nd->n", vectors, vectors)
    return np.column_stack([vectors, np.sqrt(squares.max() - squares)]).astype(np.float32)


def peers(points: Vectors) -> dict[str, tuple[Callable[[int], None], Ask]]:
    """Name -> how to set ef, and how to ask."""
    dim = points.shape[1]
    graph = hnswlib.Index(space="l2", dim=dim)
    graph.init_index(len(points), M=M, ef_construction=EF_CONSTRUCTION, random_seed=0)
    graph.add_items(points, num_threads=1)
    faiss.omp_set_num_threads(1)
    flat = faiss.IndexHNSWFlat(dim, M)
    flat.hnsw.efConstruction = EF_CONSTRUCTION
    flat.add(points)
    usearch = UsearchIndex(ndim=dim, metric="l2sq", dtype="f32", connectivity=M, expansion_add=EF_CONSTRUCTION)
    usearch.add(np.arange(len(points)), points, threads=1)

    def usearch_rows(some: Vectors) -> Rows:
        return np.atleast_2d(usearch.search(some, K, threads=1).keys).astype(np.int64)

    return {
        "hnswlib": (graph.set_ef, lambda some: graph.knn_query(some, K, num_threads=1)[0].astype(np.int64)),
        "faiss": (partial(setattr, flat.hnsw, "efSearch"), lambda some: flat.search(some, K)[1]),
        "usearch": (partial(setattr, usearch, "expansion_search"), usearch_rows),
    }


def against_peers(
    vectors: Vectors, queries: Vectors, ours: Callable[[Vectors], Rows], rounds: int
) -> tuple[Runs, dict[str, float | str]]:
    """Queries a second of each in one batch of the first QUERIES, and what each finds for all."""
    some = queries[:QUERIES]
    truth = ExactIndex(vectors).search(queries, K)[1]

    def found(rows: Rows) -> float:
        return recall(np.einsum("bkd,bd->bk", vectors[rows], queries), truth)

    share = found(ours(queries))
    wanted = min(share, ENOUGH) - MARGIN
    values: dict[str, float | str] = {"recall@20 ours": share, "recall@20 wanted of peers": wanted}
    contenders = {"ours": per_second(len(some), partial(ours, some))}
    ask = np.pad(queries, ((0, 0), (0, 1)))  # (B, D + 1)
    for name, (set_ef, rows_of) in peers(lifted(vectors)).items():

        def share_at(ef: int, set_ef: Callable[[int], None] = set_ef, rows_of: Ask = rows_of) -> float:
            set_ef(ef)
            return found(rows_of(ask))

        ef = least_ef(lambda ef: share_at(ef) >= wanted)
        share = share_at(ef or EF_SEARCH[-1])
        values |= {f"recall@20 {name}": share, f"ef {name}": float(ef) if ef else f"over {EF_SEARCH[-1]}"}
        contenders[name] = per_second(len(some), partial(rows_of, ask[:QUERIES]))
    contenders["exact"] = per_second(len(some), lambda: ExactIndex(vectors).search(some, K))
    return alternate(contenders, rounds), values


def least_ef(enough: Callable[[int], bool]) -> int | None:
    """Within EF_STEP of the least that is enough; none if EF_SEARCH's last is not. A search is K wide at least."""
    low = K - 1
    for high in (K, *EF_SEARCH):
        if enough(high):
            break
        low = high
    else:
        return None
    while high > max(low + 1, EF_STEP * low):
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def per_second(count: int, work: Callable[[], object]) -> Callable[[], float]:
    return lambda: count / seconds(work)


def searched_s(search: Callable[[Vectors, int], object], queries: Vectors, batch: int) -> float:
    """Of at most 64 calls."""
    parts = [queries[at : at + batch] for at in range(0, min(len(queries), 64 * batch), batch)]
    return seconds(lambda: [search(part, K) for part in parts])


def process_cost(process: SearchProcess, index: HnswIndex, queries: Vectors, rounds: int) -> dict[str, float]:
    """Time through the process / time in this one, by batch; and CPU time of both processes / of this one."""
    costs = {}
    for batch in BATCHES:
        cpu = {"process": 0.0, "in_process": 0.0}

        def timed(name: str, search: Callable[[Vectors, int], object], batch: int = batch, cpu: Cpu = cpu) -> float:
            before = cpu_s(process.pid) + time.process_time()
            took = searched_s(search, queries, batch)
            cpu[name] += cpu_s(process.pid) + time.process_time() - before
            return took

        contenders = {
            "process": partial(timed, "process", process.search),
            "in_process": partial(timed, "in_process", index.search),
        }
        runs = alternate(contenders, 4 * rounds)
        costs[f"search process / in process, batches of {batch}"] = ratio(runs, "process", "in_process")
        costs[f"the same in CPU time, batches of {batch}"] = cpu["process"] / cpu["in_process"]
    return costs


def crossover(model: Model, queries: Vectors, sizes: Sequence[int], rounds: int) -> dict[str, float]:
    """Time of a scan / of a graph (M = 16), by items, ef and batch. Under 1 the scan is the faster one."""
    costs = {}
    for size in sizes:
        index = HnswIndex.build(data.Grown(model, size).item_vectors())
        for ef, batch in product((64, 256), BATCHES):
            index.ef = ef
            contenders = {
                name: partial(searched_s, search, queries, batch)
                for name, search in (("scan", index.exact.search), ("graph", index.search_graph))
            }
            costs[f"scan / graph, {size} items, ef {ef}, batches of {batch}"] = ratio(
                alternate(contenders, rounds), "scan", "graph"
            )
    return costs


def work(options: Options) -> tuple[dict[str, float], dict[str, float | str]]:
    count = options.scaled(100_000, 1_000)
    model, dataset = data.trained(500 if options.quick else 5_000)
    grown, queries = data.Grown(model, count), data.users_of(model, dataset, TRUTHS)
    with tempfile.TemporaryDirectory(prefix="upwell-bench-") as name:
        folder = Path(name) / "g"
        artifact = data.generation(folder, grown)
        index = load_index(folder, verify(folder))
        runs, values = against_peers(
            index.exact.vectors, queries, lambda some: index.search(some, K)[0], options.rounds
        )
        with SearchProcess(folder, artifact.manifest_sha256) as process:
            ratios = process_cost(process, index, queries[:QUERIES], options.rounds)
    ratios |= crossover(model, queries[:QUERIES], [size for size in SIZES if size <= count], options.rounds)
    ratios |= {f"ours / {peer}": ratio(runs, "ours", peer) for peer in runs if peer != "ours"}
    values |= {f"queries_per_s {name}": figure for name, figure in medians(runs).items()}
    values |= {"ef ours": float(index.ef), "M ours": float(index._graph.M)}
    return ratios, values | {"items": float(count), "dim": float(index.dim)}
