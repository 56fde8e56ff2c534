"""A query from words: nothing is added to the catalogue for it."""

import numpy as np
import torch

from model.config import PER_ITEM
from model.model import Floats, History, Model


def text_query(model: Model, history: History, text: Floats, now_ms: int) -> Floats:
    """(1, D) query of a user who, after this history, has just clicked an item known by this text (E,) alone.

    A model of the T items of the history and that one is made for it: copying the catalogue's arrays would cost
    1.3 kB an item and request.
    """
    rows = torch.from_numpy(history.rows).to(model.device)
    arrays = model.arrays | {name: model.arrays[name][rows] for name in PER_ITEM}
    few = Model(model.config, [str(at) for at in range(len(rows))], arrays, model.tower).extended(["text"], text[None])
    last = len(rows)
    weights, stamps = np.append(history.weights, np.float32(1)), np.append(history.ts_ms, now_ms)
    return few.user_vectors([History(np.arange(last + 1), weights, stamps)], [now_ms])
