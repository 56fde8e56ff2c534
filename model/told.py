"""A query from words: nothing is added to the catalogue for it."""

import numpy as np
import torch

from model.model import Model, centred
from model.sampling import Floats


def text_query(model: Model, text: Floats) -> Floats:
    """(1, D) query for what is nearest to this text (E,) by its own text: the other parts of the vector are zero.

    The learned mix has no say: it weighs text by what it tells of the next click, and who asks in words means words.
    """
    arrays, config = model.arrays, model.config
    unit = centred(torch.as_tensor(text, dtype=torch.float32, device=model.device)[None], arrays["text.mean"])
    first = config.tower_dim + 1 + config.covisitation_rank
    query = np.zeros((1, config.dim), np.float32)
    query[:, first : first + config.text_part] = (unit @ arrays["text.projection"]).cpu().numpy()
    return query
