from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import model.index
from model.index import ExactIndex, HnswIndex, recall
from model.probes import column_scale
from model.queries import Rows, Vectors

N, D = 3000, 16


def clustered(n: int, seed: int = 0) -> Vectors:
    """(n, D) vectors in clusters, of norms that vary as a trained model's do."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(30, D))
    vectors = centres[generator.integers(0, 30, n)] + 0.5 * generator.normal(size=(n, D))
    return (vectors * generator.lognormal(0, 0.4, (n, 1))).astype(np.float32)


def brute(vectors: Vectors, query: Vectors, k: int, banned: set[int]) -> list[float]:
    """The slow twin: one query at a time, one score at a time."""
    scores = [float(vector @ query) for row, vector in enumerate(vectors) if row not in banned]
    return sorted(scores, reverse=True)[:k]


VECTORS = clustered(N)
QUERIES = clustered(40, seed=1)
INDEX = HnswIndex.build(VECTORS, ef=400)
Index = ExactIndex | HnswIndex
BOTH = pytest.mark.parametrize("index", [ExactIndex(VECTORS), INDEX], ids=["exact", "hnsw"])


@pytest.fixture(scope="module", autouse=True)
def graph() -> Iterator[None]:
    """So few items are scanned for whatever width: let the graph answer up to 750 of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.index, "EXACT_SHARE", 4)
        yield


@BOTH
def test_top_k_of_every_query(index: Index) -> None:
    rows, scores = index.search(QUERIES, 20)
    assert rows.dtype == np.int64 and scores.dtype == np.float32
    assert np.allclose(scores, np.einsum("bkd,bd->bk", VECTORS[rows], QUERIES), atol=1e-3)
    assert (np.diff(scores, axis=1) <= 0).all()
    truth = np.array([brute(VECTORS, query, 20, set()) for query in QUERIES], np.float32)
    assert recall(scores, truth) >= (0.99 if index is INDEX else 1.0)


@BOTH
def test_a_batch_answers_as_single_queries_do(index: Index) -> None:
    excluded = [np.arange(at, 60 + at) for at in range(len(QUERIES))]
    rows, _ = index.search(QUERIES, 10, excluded)
    single = [index.search(QUERIES[i : i + 1], 10, excluded[i : i + 1])[0][0] for i in range(len(QUERIES))]
    assert (rows == np.stack(single)).all()


sizes = st.sampled_from([0, 1, 5, 40, 90, 400, N - 21, N - 3, N])


@BOTH
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(st.lists(sizes, min_size=1, max_size=4), sizes, st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_excluded_rows_never_come_back(index: Index, banned: list[int], hide: int, k: int, seed: int) -> None:
    """Always k results while k eligible rows exist, the scan's the best ones; half a set is a query's own top."""
    generator = np.random.default_rng(seed)
    queries = QUERIES[generator.integers(0, len(QUERIES), len(banned))]
    order = np.argsort(-(queries @ VECTORS.T), axis=1)
    excluded = [_some(generator, top, size) for top, size in zip(order, banned, strict=True)]
    hidden = _some(generator, order[0], hide)
    rows, scores = index.search(queries, k, excluded, hidden)
    for query, out, found, values in zip(queries, excluded, rows, scores, strict=True):
        gone = {*out.tolist(), *hidden.tolist()}
        truth = brute(VECTORS, query, k, gone)
        kept = found[found >= 0]
        assert len(kept) == len(truth) == len(set(kept.tolist())) and not gone & set(kept.tolist())
        assert (found[len(kept) :] == -1).all() and np.isneginf(values[len(kept) :]).all()
        assert np.allclose(values[: len(kept)], VECTORS[kept] @ query, atol=1e-3)
        assert (np.diff(values[: len(kept)]) <= 0).all()
        if index is not INDEX:
            assert np.allclose(values[: len(kept)], truth, atol=1e-3)


def test_recall_with_exclusions() -> None:
    order = np.argsort(-(QUERIES @ VECTORS.T), axis=1)
    exact = ExactIndex(VECTORS)
    for own, hidden in ((5, 0), (60, 0), (60, 10), (500, 0), (10, 200)):
        excluded = [top[:own] for top in order]
        out = excluded, order[0][:hidden]
        assert recall(INDEX.search(QUERIES, 20, *out)[1], exact.search(QUERIES, 20, *out)[1]) > 0.95


def _some(generator: np.random.Generator, top: Rows, size: int) -> Rows:
    return np.unique(np.concatenate([top[: size // 2], generator.permutation(N)[: size - size // 2]]))


@BOTH
def test_refused_before_hnswlib_sees_it(index: Index) -> None:
    nan = QUERIES.copy()
    nan[3, 2] = np.nan
    one = QUERIES[:1]
    with pytest.raises(ValueError, match=r"\(B, 16\)"):
        index.search(QUERIES[:, :15], 5)
    with pytest.raises(ValueError, match=r"\(B, 16\)"):
        index.search(QUERIES[0], 5)
    with pytest.raises(ValueError, match="finite"):
        index.search(nan, 5)
    with pytest.raises(ValueError, match="at least 1"):
        index.search(one, 0)
    for row in (-1, N):
        with pytest.raises(ValueError, match=r"0\.\.2999"):
            index.search(one, 5, [np.array([row])])
        with pytest.raises(ValueError, match=r"0\.\.2999"):
            index.search(one, 5, hidden=np.array([row]))
    with pytest.raises(ValueError, match="2 exclusion sets for 1"):
        index.search(one, 5, [np.arange(2), np.arange(2)])


@BOTH
def test_any_layout_of_the_queries(index: Index) -> None:
    rows, _ = index.search(QUERIES, 7)
    assert (index.search(np.asfortranarray(QUERIES), 7)[0] == rows).all()
    assert (index.search(np.repeat(QUERIES, 2, axis=0)[::2], 7)[0] == rows).all()
    assert index.search(QUERIES[:0], 7)[0].shape == (0, 7)


def test_more_wanted_than_there_is() -> None:
    few = HnswIndex.build(VECTORS[:3])
    rows, scores = few.search(QUERIES[:2], 5)
    assert (np.sort(rows[:, :3]) == [0, 1, 2]).all() and (rows[:, 3:] == -1).all() and np.isneginf(scores[:, 3:]).all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_copies_do_not_hide_the_rest(share: float, tmp_path: Path) -> None:
    """Items without text or clicks share one vector; indexed one by one they would be an island in the graph."""
    vectors = VECTORS.copy()
    shuffled = np.random.default_rng(0).permutation(N)
    vectors[shuffled[: int(N * share)]] = VECTORS[7]
    vectors[shuffled[-200:]] = VECTORS[shuffled[-200:][::-1]]  # pairs
    index, exact = HnswIndex.build(vectors, ef=200), ExactIndex(vectors)
    queries = np.vstack([QUERIES, VECTORS[7:8]])
    excluded = [shuffled[at : at + 10] for at in range(len(queries))]
    for out in (None, excluded):
        rows, scores = index.search(queries, 20, out)
        assert np.allclose(scores, np.einsum("bkd,bd->bk", vectors[rows], queries), atol=1e-3)
        assert all(len(set(found)) == 20 for found in rows.tolist())
        assert recall(scores, exact.search(queries, 20, out)[1]) > 0.97
    index.save(tmp_path / "index")
    loaded = HnswIndex.load(tmp_path / "index", vectors, ef=200)
    assert (loaded.search(queries, 20, excluded)[0] == rows).all()


def test_a_scan_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    excluded = [np.arange(at, 2 * at) for at in range(len(QUERIES))]
    whole = ExactIndex(VECTORS).search(QUERIES, 9, excluded, np.arange(70, 90))
    monkeypatch.setattr(model.index, "_SCORES_AT_ONCE", 7 * N)
    assert (ExactIndex(VECTORS).search(QUERIES, 9, excluded, np.arange(70, 90))[0] == whole[0]).all()


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        HnswIndex.build(VECTORS, seed=3, ef=100).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded, built = HnswIndex.load(tmp_path / "a", VECTORS, ef=100), HnswIndex.build(VECTORS, seed=3, ef=100)
    assert (loaded.search(QUERIES, 20)[0] == built.search(QUERIES, 20)[0]).all()


@pytest.mark.parametrize("lifted", [True, False])
def test_a_file_of_other_vectors_is_refused(lifted: bool, tmp_path: Path) -> None:
    """hnswlib would read beyond its buffers, or answer for another catalogue."""
    HnswIndex.build(VECTORS, lifted=lifted).save(tmp_path / "index")
    HnswIndex.load(tmp_path / "index", VECTORS)
    with pytest.raises(ValueError, match="3000 points of 16" if lifted else "other points"):
        HnswIndex.load(tmp_path / "index", VECTORS[:, :14])
    with pytest.raises(ValueError, match="2999 points"):
        HnswIndex.load(tmp_path / "index", VECTORS[:-1])
    with pytest.raises(ValueError, match="other points"):
        HnswIndex.load(tmp_path / "index", VECTORS[::-1])


def test_a_graph_lifted_on_another_processor_is_taken_for_the_same(tmp_path: Path) -> None:
    """Which adds up squares in another order: of vectors of one length, all that is lifted is rounding."""
    unit = VECTORS / np.linalg.norm(VECTORS, axis=1, keepdims=True)
    HnswIndex.build(unit).save(tmp_path / "index")
    data = bytearray((tmp_path / "index").read_bytes())
    last = np.ndarray(N, "<f4", data, 96 + 132 + 4 * 31, (268,))  # of records of 4 + 128 + 4 * 32 + 8 bytes
    squares = np.cumsum(unit[:, ::-1] ** 2, axis=1, dtype=np.float32)[:, -1]
    elsewhere = np.sqrt(squares.max() - squares)
    assert 3e-4 < np.abs(last - elsewhere).max() < 3e-3
    for shift in (0.0, 0.1, -0.1):
        last[:] = elsewhere + shift
        (tmp_path / "index").write_bytes(data)
        if shift:
            with pytest.raises(ValueError, match="other points"):
                HnswIndex.load(tmp_path / "index", unit)
        else:
            HnswIndex.load(tmp_path / "index", unit)


def loud() -> tuple[Vectors, Vectors, Vectors]:
    """Items (N, D), half of whose columns are eight times the others and hardly weighed by queries (40, D); scale."""
    weight = np.repeat([1.0, 8.0], D // 2).astype(np.float32)
    queries = QUERIES / weight**2
    return VECTORS * weight, queries, column_scale(queries)


def test_scaled_columns_find_what_loud_columns_hide() -> None:
    vectors, queries, scale = loud()
    truth = ExactIndex(vectors).search(queries, 20)[1]
    plain, scaled = (HnswIndex.build(vectors, scale=s).search_graph(queries, 20) for s in (None, scale))
    assert recall(plain[1], truth) < 0.9 < 0.95 < recall(scaled[1], truth)
    assert np.allclose(scaled[1], np.einsum("bkd,bd->bk", vectors[scaled[0]], queries), atol=1e-4)


def test_a_query_that_the_scale_was_not_made_for_is_scanned() -> None:
    """As words are, which ask the text part alone."""
    vectors, queries, scale = loud()
    quiet = queries.copy()
    quiet[:, : D // 2] = 0
    index, both = HnswIndex.build(vectors, scale=scale, ef=20), np.vstack([quiet, queries])
    truth, found = (
        np.concatenate([some.search(one[None], 20)[1] for one in both]) for some in (ExactIndex(vectors), index)
    )
    assert np.array_equal(found[:40], truth[:40]) and not np.array_equal(found[40:], truth[40:])
    assert recall(index.search_graph(quiet, 20)[1], truth[:40]) < 0.9


def test_odd_is_what_words_are_and_users_are_not() -> None:
    """Mean squares of 43 times the usual one and more against 1.9 and less (model.index.ODD)."""
    vectors, _, scale = loud()
    index, usual = HnswIndex.build(vectors[:200], scale=scale), len(scale) / np.square(scale).sum()
    low, high = (1 / end**2 / usual for end in (scale.max(), scale.min()))  # of a query of one column
    for times, odd in ((1.9, False), (43.0, True)):
        query, share = np.zeros((1, len(scale)), np.float32), (times - low) / (high - low)
        query[0, scale.argmin()], query[0, scale.argmax()] = share**0.5, (1 - share) ** 0.5
        assert index._odd(query).tolist() == [odd]


def test_a_scaled_graph_is_loaded_with_its_scale_alone(tmp_path: Path) -> None:
    vectors, queries, scale = loud()
    built = HnswIndex.build(vectors, scale=scale)
    built.save(tmp_path / "index")
    loaded = HnswIndex.load(tmp_path / "index", vectors, scale=scale)
    assert (loaded.search_graph(queries, 20)[0] == built.search_graph(queries, 20)[0]).all()
    for other in (None, np.roll(scale, 3)):
        with pytest.raises(ValueError, match="other points"):
            HnswIndex.load(tmp_path / "index", vectors, scale=other)


def test_points_in_blocks_make_the_same_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    INDEX.save(tmp_path / "whole")
    monkeypatch.setattr(model.index, "_POINTS_AT_ONCE", 700)
    told: list[tuple[int, int]] = []
    HnswIndex.build(VECTORS, ef=400, progress=lambda *far: told.append(far)).save(tmp_path / "blocks")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "blocks").read_bytes()
    assert told == [(done, 3000) for done in (700, 1400, 2100, 2800, 3000)]


@given(st.integers(0, 2**32 - 1), st.sampled_from(["cut", "zeros", "noise", "vector"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_below_the_upper_layers_is_seen(tmp_path: Path, seed: int, kind: str) -> None:
    """Without any checksum, and before hnswlib reads a byte."""
    INDEX.save(tmp_path / "index")
    data, generator = bytearray((tmp_path / "index").read_bytes()), np.random.default_rng(seed)
    start = int(generator.integers(96 + N * 260))  # of a record's 4 + 128 + 4 * 32 + 8 bytes
    if kind == "cut":
        del data[start:]
    elif kind == "vector":
        data[96 + 268 * (seed % N) + 132 + 4 * (seed % D) + 3] ^= 1  # one exponent
    else:
        data[start : start + 4096] = bytes(4096) if kind == "zeros" else generator.bytes(4096)
    (tmp_path / "index").write_bytes(data)
    with pytest.raises(ValueError, match="index"):
        HnswIndex.load(tmp_path / "index", VECTORS)


@pytest.mark.parametrize("bad", [VECTORS[:0], VECTORS[0], np.full((3, 4), np.inf, np.float32)])
def test_nothing_to_index(bad: Vectors) -> None:
    with pytest.raises(ValueError, match="not empty and finite"):
        HnswIndex.build(bad)


def test_a_wide_search_is_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.index, "EXACT_SHARE", 64)
    index = HnswIndex.build(VECTORS, M=4, ef_construction=10, ef=20)
    truth = ExactIndex(VECTORS).search(QUERIES, 60)[1]
    assert recall(index.search(QUERIES, 20)[1], truth[:, :20]) < 0.98
    assert (index.search(QUERIES, 60)[1] == truth).all()
    index.ef = 60
    assert (index.search(QUERIES, 20)[1] == truth[:, :20]).all()


def test_a_batch_is_scanned_sooner_than_a_single_query(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.index, "EXACT_SHARE", 64)
    index = HnswIndex.build(VECTORS, M=4, ef_construction=10, ef=30)
    queries = np.tile(QUERIES, (2, 1))
    truth = ExactIndex(VECTORS).search(queries, 20)[1]
    assert (index.search(queries, 20)[1] == truth).all()
    assert recall(np.concatenate([index.search(one[None], 20)[1] for one in queries]), truth) < 0.98


@pytest.mark.parametrize("n", [4000, 4097, 20_000])
@pytest.mark.parametrize("spread", [5, 10_000])
def test_the_scan_selects_as_a_sort_does(n: int, spread: int) -> None:
    """Item i scores one of `spread` values: few, and most are ties; the last one is the best."""
    scores = np.random.default_rng(n).integers(spread, size=n).astype(np.float32)
    scores[-1] = spread
    rows, found = ExactIndex(scores[:, None]).search(np.ones((3, 1), np.float32), 12)
    assert (found == np.sort(scores)[::-1][:12]).all() and (scores[rows] == found).all()
    assert all(len(set(row.tolist())) == 12 for row in rows)


def test_recall_counts_equal_scores_as_right() -> None:
    exact = np.array([[3.0, 2.0, 2.0], [5.0, 4.0, -np.inf]], np.float32)
    found = np.array([[2.0, 2.0, 2.0], [5.0, 3.0, -np.inf]], np.float32)
    assert recall(found, exact) == 1.0
    assert recall(found - 1, exact) == 0.5


@pytest.mark.parametrize("path", ["/dev/full", "/no/such/folder/index"])
def test_a_file_that_could_not_be_written_whole_is_an_error(path: str) -> None:
    with pytest.raises(OSError, match="whole"):
        INDEX.save(Path(path))
