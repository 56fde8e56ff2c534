"""A user's query by numpy, for models in main memory: what `Model` says by torch, at a third of the cost.

Torch takes 5 us an operation, some 150 for one user, and gives the interpreter's lock away in each: beside a busy event
loop a query of 0.8 ms took 3.5. tests/model/test_serving.py holds the two together.

Legend: B users, T history (padded on the left), S = T + 1 keys (start token first), H heads, d width, K of a part.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

from model.config import PARTS, PERSONAL, RECENCY
from model.mix import situation
from model.queries import unit
from model.sampling import Floats, Padded
from model.tower import GAPS

Whole = NDArray[np.int64]
Arrays = Mapping[str, Floats]
_LAYER_NORM = np.float32(1e-5)  # torch's epsilon


@np.errstate(over="ignore", invalid="ignore")  # as torch: the gate refuses a model whose scores are not finite
def user_vectors(arrays: Arrays, heads: int, history: Padded, now_ms: Whole) -> Floats:
    """`Model.user_vectors` (B, D) of padded histories; the arrays of `Model.served`."""
    rows, faded = np.maximum(history.rows, 0), recency(history.weights * (history.rows >= 0))
    mix = arrays["mix"][situation(history, now_ms)]  # (B, F)
    user = tower_vectors(arrays, heads, taken(arrays["tower.items"], rows), history, now_ms)
    scaled = {"tower": np.pad(user * np.exp(arrays["user.log_scale"]), ((0, 0), (0, 1)), constant_values=1.0)}
    for part, table in (("covisitation", "covisitation.left"), ("text", "text.items")):
        scaled[part] = unit(steps(taken(arrays[table], rows), faded, history.disliked).sum(axis=1))
    columns = [scaled[name] * mix[:, column : column + 1] for column, name in enumerate(PARTS[:PERSONAL])]
    return np.concatenate([*columns, mix[:, PERSONAL:]], axis=1)


def taken(table: Floats, rows: Whole) -> Floats:
    """The rows (..., K) of a table (N, K); those of an empty one are zero."""
    return table[rows] if len(table) else np.zeros((*rows.shape, table.shape[1]), np.float32)


def recency(weights: Floats) -> Floats:
    """What clicks of weights (B, T), newest last, count in the co-visitation and text parts."""
    age = np.arange(weights.shape[1] - 1, -1, -1, dtype=np.float32)
    return weights * np.exp(-age / np.float32(RECENCY))


def steps(clicked: Floats, faded: Floats, disliked: bool) -> Floats:
    """(B, T, K) what each event adds to a user's direction, as `model.steps`: clicked (B, T, K) rows of the table."""
    whole: Floats = faded[:, :, None] * clicked
    if not disliked:
        return whole
    taste = unit((whole * (faded > 0)[:, :, None]).sum(axis=1))  # (B, K)
    shared = np.minimum(np.einsum("btk,bk->bt", whole, taste), 0) * (faded < 0)  # (B, T)
    return np.asarray(whole - shared[:, :, None] * taste[:, None], np.float32)


def tower_vectors(arrays: Arrays, heads: int, items: Floats, history: Padded, now_ms: Whole) -> Floats:
    """`UserTower.forward` (B, d) of users asked once, at now_ms (B,), after their whole history; items (B, T, d)."""
    batch = np.arange(len(items))
    present = np.ones((len(items), items.shape[1] + 1), np.bool_)  # (B, S)
    present[:, 1:] = (history.rows >= 0) & (history.weights > 0)
    keys = np.empty((*present.shape, items.shape[2]), np.float32)  # (B, S, d)
    keys[:, 0] = arrays["user.start"]
    np.multiply(items, history.weights[:, :, None], out=keys[:, 1:])
    newest = (np.arange(present.shape[1]) * present).max(axis=1)  # (B,) key index, start (0) when none
    gaps = _gap_bucket(now_ms[:, None] - history.ts_ms)  # (B, T)
    pause = np.where(newest > 0, gaps[batch, newest - 1], 0)
    last = keys[batch, newest] + arrays["user.pause"][pause]  # (B, d)
    query = last @ arrays["user.query.weight"].T + arrays["user.query.bias"]
    query = query.reshape(len(items), heads, -1)  # (B, H, d)
    logits = query @ keys.transpose(0, 2, 1) / np.float32(math.sqrt(keys.shape[2]))  # (B, H, S)
    distance = np.arange(items.shape[1] - 1, -1, -1, dtype=np.float32)  # (T,)
    logits[:, :, 0] += arrays["user.start_bias"]
    logits[:, :, 1:] += arrays["user.elapsed"][gaps].transpose(0, 2, 1)
    logits[:, :, 1:] -= np.exp(arrays["user.log_slope"])[:, None] * distance
    logits = np.where(present[:, None], logits, -np.inf)
    odds = np.exp(logits - logits.max(axis=2, keepdims=True))
    pooled = (odds / odds.sum(axis=2, keepdims=True)) @ keys  # (B, H, d)
    wide = np.concatenate([pooled.reshape(len(items), -1), last], axis=1)  # (B, (H + 1) d)
    return unit(arrays["user.skip"] @ pooled + _mlp(arrays, wide))


def _mlp(arrays: Arrays, x: Floats) -> Floats:
    x = x @ arrays["user.mlp.0.weight"].T + arrays["user.mlp.0.bias"]
    x = x * (1 + erf(x * np.float32(math.sqrt(0.5)))) * np.float32(0.5)  # GELU
    x = x - x.mean(axis=1, keepdims=True)
    x = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + _LAYER_NORM)
    x = x * arrays["user.mlp.2.weight"] + arrays["user.mlp.2.bias"]
    return x @ arrays["user.mlp.3.weight"].T + arrays["user.mlp.3.bias"]


def _gap_bucket(milliseconds: Whole) -> Any:
    seconds = np.maximum(milliseconds, 0).astype(np.float32) / np.float32(1000)
    return np.minimum(np.log2(seconds + 1).astype(np.int64), GAPS - 1)
