"""User embedding by micro-batches of 1 to 4,096 users, on the GPU where there is one and on the CPU in any case."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from model.model import Model
from model.sampling import History
from workers.bench import data
from workers.bench.encode import device_name
from workers.bench.harness import Options, alternate, medians, ratio, seconds

SIZES = (1, 16, 64, 256, 1024, 4096)


def made_up_histories(count: int, num_items: int, length: int) -> list[History]:
    draw = np.random.default_rng(0)
    stamps = 1_700_000_000_000 + 60_000 * np.arange(length)
    return [History(draw.integers(num_items, size=length), np.ones(length, np.float32), stamps) for _ in range(count)]


def on(device: str, model: Model) -> Model:
    arrays = {name: array.to(device) for name, array in model.arrays.items()}
    return Model(model.config, model.ids, arrays, model.frozen().tower.to(device))


def embed_s(model: Model, histories: Sequence[History]) -> float:
    """The vectors come back as numpy arrays: nothing is still under way."""
    return seconds(lambda: model.user_vectors(histories, [1_700_100_000_000] * len(histories)))


def one_by_one_s(model: Model, histories: Sequence[History]) -> float:
    """Of all, taken from the first 64."""
    some = histories[:64]
    return sum(embed_s(model, [past]) for past in some) * len(histories) / len(some)


def work(options: Options) -> tuple[dict[str, float], dict[str, float | str]]:
    model, _ = data.trained(200 if options.quick else 2_000)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    models = {device: on(device, model) for device in devices}
    histories = made_up_histories(64 if options.quick else max(SIZES), len(model.ids), model.config.history)
    ratios: dict[str, float] = {}
    values: dict[str, float | str] = {"device": device_name(torch.device(devices[-1]))}
    for size in (size for size in SIZES if size <= len(histories)):
        some = histories[:size]
        contenders = {name: partial(embed_s, own, some) for name, own in models.items()}
        runs = alternate(contenders | {"one by one": partial(one_by_one_s, models["cpu"], some)}, options.rounds)
        values |= {f"users_per_s {name}, {size} users": size / float(s) for name, s in medians(runs).items()}
        ratios |= {f"one by one / {name}, {size} users": ratio(runs, "one by one", name) for name in devices}
    return ratios, values
