"""Build, load and swap of a generation: how long, how much memory, and what traffic notices.

Queries go on in this process while the next generation is taken in as the worker does it: verified, its model and
its search process loaded beside, its snapshot made with the catalogue, one reference moved, the old process closed.
Memory: of the search processes, and what this process takes beyond what it had before the first generation.
"""

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from model.manifest import verify
from model.model import Model
from model.queries import Vectors
from workers.bench import data
from workers.bench.harness import Options, alternate, medians, ratio, rss_mib, seconds
from workers.catalogue import Catalogue
from workers.search import SearchProcess, SearchProcessDied
from workers.snapshot import Snapshot

BATCH = 16


class Traffic:
    """Searches without pause in a thread; the longest wait for an answer, in milliseconds."""

    def __init__(self, search: SearchProcess, queries: Vectors) -> None:
        self.search, self._queries = search, queries
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.waits_ms: list[float] = []
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.perf_counter()
            while True:
                try:
                    self.search.search(self._queries, 20)
                    break
                except SearchProcessDied:  # closed between our look and our call, as in workers/live.py
                    continue
            self.waits_ms.append(1000 * (time.perf_counter() - began))

    def during(self, work: Callable[[], object], at_least_s: float = 1.0) -> float:
        """The longest wait while the work is done, and until so long has passed."""
        self.waits_ms = []
        ends = time.monotonic() + at_least_s
        work()
        while time.monotonic() < ends or not self.waits_ms:
            time.sleep(0.01)
        return max(self.waits_ms)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def begin_peak() -> float:
    """This process's memory now, from which its peak is taken anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib(os.getpid())


def peak_mib(pid: int) -> float:
    """Most memory that a process has ever had resident, this one since `begin_peak`."""
    status = Path(f"/proc/{pid}/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0]) / 1024


def work(options: Options) -> tuple[dict[str, float], dict[str, float | str]]:
    count = options.scaled(100_000, 2_000)
    model, dataset = data.trained(500 if options.quick else 5_000)
    grown, queries = data.Grown(model, count), data.users_of(model, dataset, BATCH)
    with tempfile.TemporaryDirectory(prefix="upwell-bench-") as name:
        folder = Path(name) / "g"
        began = time.perf_counter()
        artifact = data.generation(folder, grown)
        build_s = time.perf_counter() - began
        manifest = verify(folder)
        files_mib = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
        catalogue = Catalogue()
        catalogue.items = {item.item_id: item for item in data.items(count)}
        without_mib = begin_peak()

        def taken_in() -> Snapshot:
            search = SearchProcess(folder, artifact.manifest_sha256)
            return Snapshot.of(artifact, search, Model.load(folder / "model"), catalogue)

        served = [taken_in()]
        traffic = Traffic(served[0].search, queries)
        traffic.during(lambda: None)
        search_mib, snapshot_mib = rss_mib(served[0].search.pid), begin_peak() - without_mib
        peaks_mib, loads_s = list[float](), list[float]()

        def load() -> None:
            begin_peak()
            served.append(taken_in())
            searches_mib = peak_mib(served[1].search.pid) + rss_mib(served[0].search.pid)
            peaks_mib.append(searches_mib + peak_mib(os.getpid()) - without_mib)
            traffic.search = served[1].search
            served.pop(0).search.close()

        contenders = {
            "swap": lambda: traffic.during(lambda: loads_s.append(seconds(load))),
            "steady": lambda: traffic.during(lambda: None, loads_s[-1]),  # more waits have a longer longest one
        }
        runs = alternate(contenders, options.rounds)
        traffic.close()
        traffic.search.close()
    ratios = {
        "memory peak / one generation": statistics.median(peaks_mib) / (search_mib + snapshot_mib),
        "longest wait in a swap / without": ratio(runs, "swap", "steady"),
        "load / build": statistics.median(loads_s) / build_s,
    }
    values = {f"longest_wait_ms {name}": figure for name, figure in medians(runs).items()}
    values |= {"build_s": build_s, "load_s": statistics.median(loads_s), "search_process_mib": search_mib}
    values |= {"recall@20": manifest.metrics["recall@20"], "ef": float(manifest.ef_search), "dim": float(manifest.dim)}
    values |= {"snapshot_mib": snapshot_mib, "files_mib": files_mib}
    return ratios, values | {"items": float(count), "swaps": float(len(loads_s))}
