import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from model.arms.catalogue import Setting, make_arm
from model.arms.counts import PopularityArm
from model.arms.variants import Delayed
from model.evaluate import Arm, Mode
from model.outcome import Outcome
from model.sampling import Events, History
from stream.csv_events import load_csv, parse_columns
from workers import evaluate
from workers.cli import app
from workers.evaluate import Options
from workers.figures import Figures, mode_figures
from workers.settings import Settings

SHARED = Path("../shared/data")
COLUMNS = "user=who,item=what,ts=when,type=kind,value=stars"


def write_csv(path: Path, events: int = 60) -> Path:
    """Three users walk round five items, two events a minute."""
    lines = [f"{number % 3},item {number % 5},{1_700_000_000 + number // 2 * 60},order,2" for number in range(events)]
    path.write_text("who,what,when,kind,stars\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def upwell(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["evaluate", *arguments])
    return result.exit_code, result.output


def test_csv_is_read_by_its_column_map(tmp_path: Path) -> None:
    path = tmp_path / "shop.csv"
    lines = "who,what,when,kind\na,x,2024-01-01T00:00:01Z,order\nb,y,1704067200000,hum\n"
    path.write_text(lines, encoding="utf-8-sig")  # as Excel does
    dataset = load_csv(path, parse_columns("user=who,item=what,ts=when,type=kind"))
    assert [(click.user_id, click.item_id, click.event_type, click.ts_ms) for click in dataset.events] == [
        ("b", "y", "click", 1_704_067_200_000),
        ("a", "x", "purchase", 1_704_067_201_000),
    ]
    assert [item.item_id for item in dataset.items] == ["x", "y"]


def test_an_item_of_a_csv_has_the_first_title_that_a_row_gives_it(tmp_path: Path) -> None:
    path = tmp_path / "shop.csv"
    path.write_text("who,what,when,name\na,x,1,\na,y,2,Rivers\nb,x,3,Tides\nc,x,4,Waves\n", encoding="utf-8")
    dataset = load_csv(path, parse_columns("user=who,item=what,ts=when,title=name"))
    assert [(item.item_id, item.title) for item in dataset.items] == [("x", "Tides"), ("y", "Rivers")]


@pytest.mark.parametrize(
    ("columns", "line", "said"),
    [
        ("user=who,item=what", "a,x,1,order,2", "missing \\['ts'\\]"),
        ("user=who,item=what,ts=when,color=kind", "a,x,1,order,2", "unknown \\['color'\\]"),
        ("user=who,item=what,ts=day", "a,x,1,order,2", "no column day"),
        ("user=who,item=what,ts=when", "a,x,yesterday,order,2", "line 2: .*yesterday"),
        ("user=who,item=what,ts=when", "a,x,nan,order,2", "line 2: .*nan"),
        ("user=who,item=what,ts=when", " ,x,1,order,2", "line 2: user is empty"),  # all of them would be one user
        ("user=who,item=what,ts=when", 'a,x,1,"two\nlines",2\na,,1,order,2', "line 4: item is empty"),
        ("user=who,item=what,ts=when", f"a,x,1,order,2\na,x,1,{'y' * 140_000},2", r"shop\.csv, line 3: field larger"),
        ("user=who,item=what,ts=when", "a,x,1,order,2\na,caf\xe9,1,order,2", r"shop\.csv, line 3: not UTF-8"),
    ],
)
def test_a_bad_csv_is_refused_by_what_is_wrong(tmp_path: Path, columns: str, line: str, said: str) -> None:
    path = tmp_path / "shop.csv"
    path.write_text(f"who,what,when,kind,stars\n{line}\n", encoding="latin-1")
    with pytest.raises(ValueError, match=said):
        load_csv(path, parse_columns(columns))


def test_the_command_writes_results_report_and_plots(tmp_path: Path) -> None:
    path, out = write_csv(tmp_path / "shop.csv"), tmp_path / "out"
    code, said = upwell(str(path), "--columns", COLUMNS, "--arms", "upwell,popularity,markov", "--out", str(out))
    assert code == 0, said
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["stream"] == "shop" and results["modes"].keys() == {"strict", "line"}
    for mode in ("strict", "line"):
        arms = results["modes"][mode]["arms"]
        assert arms.keys() == {"upwell", "popularity", "markov"}
        for name, arm in arms.items():
            assert arm["repeats"]["events"] == 48 and arm["repeats"]["repeated"] == 48 - arm["events"]
            assert {"hr@10", "hr@20", "ndcg@10", "mrr", "coverage", "gini", "novelty", "us_per_event"} <= arm.keys()
            assert {"intervals", "by_history", "by_item_age", "cold_auc"} <= arm.keys() and f"{mode:6} {name}" in said
        assert results["modes"][mode]["upwell_minus"].keys() == {"popularity", "markov"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(list(out.glob("*.png"))) == 8
    assert "strict: events of one stamp" in page and "line by line" in page and 'src="http' not in page


def test_unseen_items_are_told_apart_by_the_length_of_the_history() -> None:
    lengths, auc = np.array([0, 1, 4, 5, 60, 3]), np.array([0.5, 0.6, 0.8, 0.9, 0.3, 0.0])
    earlier, ranks = np.array([0, 0, 0, 0, 0, 2]), np.ones(6)  # the last one is on an item seen twice
    rows, new = np.arange(6), np.zeros(6, np.bool_)
    outcome = Outcome(ranks, rows, rows, lengths, ranks, new, earlier, auc, rows[:, None])
    cold = mode_figures({"a": (outcome, np.ones((1, 2)))}, 0, np.ones(6, np.int64))["arms"]["a"]["cold_auc"]
    found = {name: (part["events"], round(part["auc"], 6)) for name, part in cold.items()}
    histories = {"0": (1, 0.5), "1-4": (2, 0.7), "5-19": (1, 0.9), "20+": (1, 0.3)}
    assert found == {"0": (5, 0.62), "1-4": (1, 0.0)} | {f"0, history {k}": v for k, v in histories.items()}


def test_a_test_part_of_repeats_alone_has_figures_of_0() -> None:
    rows, ranks = np.arange(4), np.full(4, np.inf)
    repeats = Outcome(ranks, rows, rows, rows, ranks, np.ones(4, np.bool_), rows, ranks, np.full((4, 10), -1))
    found = mode_figures(dict.fromkeys(("upwell", "a"), (repeats, np.ones((1, 2)))), 0, np.ones(4, np.int64))
    assert found["arms"]["a"]["events"] == found["arms"]["a"]["ndcg@10"] == 0
    assert found["upwell_minus"]["a"] == {"hr@10": [0.0, 0.0, 0.0], "ndcg@10": [0.0, 0.0, 0.0]}


def test_an_arm_that_diverges_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Diverges(PopularityArm):
        def learn(self, events: Events, rows: NDArray[np.int64]) -> None:
            raise FloatingPointError("at event 3")

    monkeypatch.setattr(evaluate, "make_arm", lambda name, setting: Diverges(len(setting.items)))
    code, said = upwell(
        str(write_csv(tmp_path / "shop.csv")), "--columns", COLUMNS, "--arms", "bpr", "--out", str(tmp_path)
    )
    assert code == 2 and "strict bpr: at event 3" in said and "Traceback" not in said


def test_what_is_finished_is_kept_and_what_was_asked_otherwise_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, made = write_csv(tmp_path / "shop.csv"), list[str]()

    def counted(name: str, setting: Setting) -> Arm:
        made.append(name)
        return make_arm(name, setting)

    monkeypatch.setattr(evaluate, "make_arm", counted)

    def run(*arms: str, limit: int | None = None, seed: int = 0) -> Figures:
        return evaluate.evaluate(
            Options(Settings(), str(path), arms, ("line",), limit, seed, tmp_path / "out", COLUMNS)
        )

    first = run("popularity", "bpr")
    whole = run("popularity", "bpr", "markov")["modes"]["line"]["arms"]
    assert whole["bpr"] == first["modes"]["line"]["arms"]["bpr"] and made == ["popularity", "bpr", "markov"]
    run("bpr", seed=1)
    assert run("bpr", limit=40)["modes"]["line"]["arms"].keys() == {"bpr"}  # the others are of another run
    assert made == ["popularity", "bpr", "markov", "bpr", "bpr"]
    assert run("popularity")["modes"]["line"]["arms"] == whole and len(made) == 5  # nor has it replaced any
    for column, other in enumerate(("9", "another item", "1700000001", "view")):
        lines = write_csv(path).read_text(encoding="utf-8").splitlines()
        cells = lines[1].split(",")  # of one event
        cells[column] = other
        path.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n", encoding="utf-8")
        run("popularity")
    assert made[5:] == ["popularity"] * 4


def test_the_settings_say_what_an_event_counts_and_who_reads_the_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned, read = set[float](), list[tuple[str, str, Path]]()

    class Spy(PopularityArm):
        def learn(self, events: Events, rows: NDArray[np.int64]) -> None:
            learned.update(events.weights.tolist())
            super().learn(events, rows)

    class Reader:
        def __init__(self, name: str, pooling: str, cache: Path) -> None:
            read.append((name, pooling, cache))
            self.name = f"{name}:{pooling}"

        def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
            return np.ones((len(texts), 4), np.float32)

    def run() -> set[float]:
        """The weights learned; none where a result is kept."""
        learned.clear()
        columns = "user=who,item=what,ts=when,value=stars,type=kind,title=what"
        code, said = upwell(str(path), "--columns", columns, "--arms", "popularity", "--mode", "line", "--out", out)
        assert code == 0, said
        return set(learned)

    monkeypatch.setattr(evaluate, "make_arm", lambda name, setting: Spy(len(setting.items)))
    monkeypatch.setattr(evaluate, "Encoder", Reader)
    monkeypatch.setenv("UPWELL_CACHE", str(tmp_path))
    path, out = write_csv(tmp_path / "shop.csv"), str(tmp_path / "out")
    stars = path.read_text(encoding="utf-8").replace("order,2", "rate,1", 1).replace("order,2", "rate,5")
    path.write_text(stars, encoding="utf-8")
    assert (run(), run()) == ({1.0}, set())
    monkeypatch.setenv("UPWELL_EVENT_VALUES", '{"rate": [3, 5]}')
    assert (run(), run()) == ({-1.0, 1.0}, set())
    for key, value in (("ENCODER", "other"), ("POOLING", "cls")):
        monkeypatch.setenv(f"UPWELL_INDEXER__{key}", value)
        assert (run(), run()) == ({-1.0, 1.0}, set())
    cache = tmp_path / "vectors.sqlite"
    assert read[::2] == [("minilm", "mean", cache)] * 2 + [("other", "mean", cache), ("other", "cls", cache)]


def test_a_bad_setting_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPWELL_EVENT_VALUES", '{"rate": [3, 3]}')
    code, said = upwell(str(write_csv(tmp_path / "shop.csv")), "--columns", COLUMNS, "--out", str(tmp_path / "out"))
    assert code == 2 and "event_values" in said and not (tmp_path / "out").exists()


def test_state_of_yesterday_is_whole_whatever_today_has_brought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One user, 30 events yesterday and 55 today: more than the 50 that other arms are given."""
    path, shown = tmp_path / "shop.csv", list[int]()
    times = [*range(1_700_000_000, 1_700_000_030), *range(1_700_010_000, 1_700_010_055)]
    path.write_text("who,what,when\n" + "".join(f"a,item {at},{at}\n" for at in times), encoding="utf-8")

    class Spy(PopularityArm):
        def score(
            self, users: NDArray[np.int64], histories: Sequence[History], now_ms: Sequence[int]
        ) -> NDArray[np.float64]:
            shown.extend(len(history.rows) for history in histories)
            return super().score(users, histories, now_ms)

    monkeypatch.setattr(evaluate, "make_arm", lambda name, setting: Delayed(Spy(85), 86_400_000, 0, 0))
    columns = "user=who,item=what,ts=when"
    evaluate.evaluate(
        Options(Settings(), str(path), ("upwell-state-day",), ("line",), None, 0, tmp_path / "out", columns)
    )
    assert shown == [0] * 30 + [30] * 55


def test_a_broken_off_run_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_csv(tmp_path / "shop.csv")
    options = Options(Settings(), str(path), ("markov",), ("line",), None, 0, tmp_path / "out", COLUMNS)

    def broken(file: object, **columns: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez_compressed", broken)
        evaluate.evaluate(options)
    assert not list((tmp_path / "out").rglob("*.npz"))
    assert evaluate.evaluate(options)["modes"]["line"]["arms"]["markov"]["repeats"]["events"] == 48


@pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[: len(raw) // 2], lambda raw: bytes(len(raw))])
def test_a_damaged_result_is_passed_over_and_run_again_when_asked(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    arguments = (str(write_csv(tmp_path / "shop.csv")), "--columns", COLUMNS, "--mode", "line", "--out", str(tmp_path))
    assert upwell(*arguments, "--arms", "markov")[0] == 0
    (kept,) = (tmp_path / "line").glob("*.npz")
    kept.write_bytes(damage(kept.read_bytes()))
    for arms in ("popularity", "markov"):
        code, said = upwell(*arguments, "--arms", arms)
        assert code == 0 and ("line   markov" in said) == (arms == "markov"), said


@pytest.mark.parametrize(
    "arguments", [["nowhere"], ["x.csv"], ["ml-100k", "--arms", "nobody"], ["ml-100k", "--mode", "loose"]]
)
def test_what_does_not_exist_is_refused(arguments: list[str], tmp_path: Path) -> None:
    code, said = upwell(*arguments, "--out", str(tmp_path))
    assert code == 2 and "Traceback" not in said


@pytest.mark.skipif(not (SHARED / "online-retail").exists(), reason="../shared/data/online-retail is absent")
def test_a_folder_of_events_strictly(tmp_path: Path) -> None:
    folder = tmp_path / "part"
    folder.mkdir()
    with gzip.open(SHARED / "online-retail" / "events.jsonl.gz", "rb") as file:
        (folder / "events.jsonl.gz").write_bytes(gzip.compress(b"".join(file.readlines()[:2000])))
    (folder / "items.jsonl.gz").write_bytes(gzip.compress(b""))
    found, modes = {}, tuple[Mode, ...](("line", "strict"))
    for mode in modes:
        options = Options(Settings(), str(folder), ("markov",), (mode,), None, 0, tmp_path / mode)
        found[mode] = evaluate.evaluate(options)["modes"][mode]["arms"]["markov"]["hr@10"]
    assert found["line"] > found["strict"]
