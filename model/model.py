"""The frozen model that serving needs: one vector an item, one a user, scored by inner product.

Legend: N items, B users, T history, D vector, E text, d tower, R co-visitation rank, P projected text.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model import serving
from model.config import PARTS, PER_ITEM, PERSONAL, RECENCY, ModelConfig, array_shapes
from model.mix import situation
from model.sampling import Events as Events
from model.sampling import Floats, Padded, pad
from model.sampling import History as History
from model.tower import UserTower, item_vectors

COLUMNS = ("tower.items", "tower.bias", "covisitation.right", "text.items", "popularity")  # of an item vector
TEXT_GAIN = 5.0  # brings cosines of text to the spread of the other parts, for the mix's start and trust
_PCA_ITEMS = 64  # below it the text projection is random: too few texts to find directions in
_MEAN_GROWTH = 1.1  # the mean text moves when the catalogue has grown by this much: it re-centres every item


def centred(text: Tensor, mean: Tensor) -> Tensor:
    """Unit rows of text (M, E) minus the catalogue's mean (E,); a missing text (zero row) stays zero."""
    present = text.abs().sum(dim=1, keepdim=True) > 0
    return F.normalize((text - mean) * present, dim=1)


class Catalogue:
    """Ids and texts: as given, centred to unit length, and the directions they are projected on."""

    def __init__(self, config: ModelConfig, seed: int, device: str) -> None:
        self._config, self._seed, self._device = config, seed, device
        self.ids: list[str] = []
        self.rows: dict[str, int] = {}
        self.text = torch.zeros(0, config.text_dim, device=device)  # (capacity, E)
        self.unit, self.mean = self.text.clone(), torch.zeros(config.text_dim, device=device)
        self._centred_at = self._projected_at = 0  # texts known when mean and projection were last made
        self._num_texts = 0
        self.projection = self._random_directions()  # (E, P) orthonormal columns
        self.projected = self._project(self.unit)  # (capacity, P)

    def add(self, ids: Sequence[str], text: Floats) -> Tensor:
        """Rows (M,) of the ids, known or new, with their new text (M, E)."""
        if text.shape != (len(ids), self._config.text_dim):
            raise ValueError(f"text has shape {text.shape}, expected {(len(ids), self._config.text_dim)}")
        if not np.isfinite(text).all():
            raise ValueError("a text vector is not finite")
        for item in ids:
            if self.rows.setdefault(item, len(self.ids)) == len(self.ids):
                self.ids.append(item)
        self._reserve(len(self.ids))
        rows = torch.tensor([self.rows[item] for item in ids], dtype=torch.int64, device=self._device)
        self.text[rows] = torch.as_tensor(text, dtype=torch.float32, device=self._device)
        self.unit[rows] = centred(self.text[rows], self.mean)
        self._num_texts += int((np.abs(text).sum(axis=1) > 0).sum())
        self.projected[rows] = self._project(self.unit[rows])
        if self._num_texts > _MEAN_GROWTH * self._centred_at:
            self._centre()
        return rows

    def _centre(self) -> None:
        present = self.text[self.text.abs().sum(dim=1) > 0]
        self.mean, self._centred_at = present.mean(dim=0), self._num_texts
        self.unit = centred(self.text, self.mean)
        if len(present) >= max(_PCA_ITEMS, 2 * self._projected_at):
            self._projected_at = len(present)
            spread = torch.linalg.eigh(self.unit.T @ self.unit)[1].flip(1)  # principal directions first
            self.projection = spread[:, : self._config.text_part].contiguous()
        self.projected = self._project(self.unit)

    def _project(self, unit: Tensor) -> Tensor:
        return TEXT_GAIN * (unit @ self.projection)

    def _random_directions(self) -> Tensor:
        width = self._config.text_dim
        random = torch.randn(width, width, generator=torch.Generator().manual_seed(self._seed))
        directions: Tensor = torch.linalg.qr(random)[0][:, : self._config.text_part].contiguous()
        return directions.to(self._device)

    def _reserve(self, size: int) -> None:
        if size > len(self.text):
            added = max(size, 2 * len(self.text)) - len(self.text)
            self.text, self.unit, self.projected = (
                F.pad(rows, (0, 0, 0, added)) for rows in (self.text, self.unit, self.projected)
            )


class Model:
    """Immutable. Build one with Learner.model() or Model.load()."""

    def __init__(self, config: ModelConfig, ids: list[str], arrays: dict[str, Tensor], tower: UserTower) -> None:
        self.config, self.ids, self.arrays, self.tower = config, ids, arrays, tower
        self.dim = config.dim
        self.device = arrays["mix"].device

    def item_vectors(self, rows: NDArray[np.int64] | None = None) -> Floats:
        """(N, D), or of these rows alone: tower, its bias, co-visitation, text, popularity and newness."""
        some = slice(None) if rows is None else torch.from_numpy(rows).to(self.device)
        columns = [self.arrays[name][some] for name in COLUMNS]
        columns[1] = columns[1].unsqueeze(1)
        return _numpy(torch.cat(columns, dim=1))

    def extended(self, ids: Sequence[str], text: Floats) -> Model:
        """The same model with items behind its own that it has never seen; text (M, E), a zero row has none.

        They are known by their text alone: no id vector, no co-visitation, no popularity.
        """
        arrays, config = self.arrays, self.config
        if text.shape != (len(ids), config.text_dim):
            raise ValueError(f"text has shape {text.shape}, expected {(len(ids), config.text_dim)}")
        unit = centred(torch.as_tensor(text, dtype=torch.float32, device=self.device), arrays["text.mean"])  # (M, E)
        projected = unit @ arrays["tower.text"].T  # (M, d)
        none = torch.zeros(len(text), device=self.device)
        new = {
            "tower.items": item_vectors(
                projected, torch.zeros_like(projected), none, config.text_scale, config.id_prior
            ),
            "text.items": TEXT_GAIN * (unit @ arrays["text.projection"]),  # (M, P)
        }
        new["tower.bias"] = self.unclicked_bias(new["tower.items"], new["text.items"])
        grown = {
            name: torch.cat([arrays[name], new.get(name, arrays[name].new_zeros(len(ids), *shape[1:]))])
            for name, shape in array_shapes(config, len(self.ids)).items()
            if name in PER_ITEM
        }
        return Model(config, [*self.ids, *ids], arrays | grown, self.tower)

    def only(self, ids: Collection[str]) -> Model:
        """The same model without its other items, in the order of its rows."""
        rows = [row for row, item in enumerate(self.ids) if item in ids]
        kept = {name: self.arrays[name][rows] for name in PER_ITEM}
        return Model(self.config, [self.ids[row] for row in rows], self.arrays | kept, self.tower)

    @torch.no_grad()
    def unclicked_bias(self, items: Tensor, text: Tensor) -> Tensor:
        """(M,) tower biases of items (M, d) with text (M, P) that nobody has clicked: to a stranger each is like the
        mean item, and a little better the more its text is like what is new and clicked (a cosine).

        What a stranger would click among the items of before says nothing of a new one. Without it unseen items were
        ranked by that for everybody, on online-retail worse than by chance (docs/quality.md).
        """
        arrays = self.arrays
        nobody, at = pad([History.of()], 1), np.zeros(1, np.int64)
        stranger = self.user_parts(nobody, at)["tower"][0, :-1]  # (d,)
        known = arrays["tower.items"] @ stranger  # (N,)
        taste = F.normalize(arrays["popularity"][:, -1] @ arrays["text.items"], dim=0)  # (P,) by the slower newness
        turned = arrays["mix"][situation(nobody, at), PARTS.index("tower")].sign()  # (1,) the mix may weigh it below 0
        return known.sum() / max(1, len(known)) - items @ stranger + turned * (text @ taste) / TEXT_GAIN

    def tastes(self, rows: NDArray[np.int64]) -> Floats:
        """(M, d) tower vectors of rows (M,), of length 1: how alike items are by text and behaviour together."""
        return _numpy(self.arrays["tower.items"][torch.from_numpy(rows).to(self.device)])

    @cached_property
    def served(self) -> dict[str, Floats]:
        """All arrays for numpy, those of the user tower as `user.*`: the tensors' own memory, a copy of a GPU's."""
        return {name: _numpy(tensor) for name, tensor in self._tensors().items()}

    @torch.inference_mode()
    def user_vectors(self, histories: Sequence[History], now_ms: Sequence[int]) -> Floats:
        """(B, D) queries at the given times. Raises ValueError on a row outside the id table."""
        if not histories:
            return np.zeros((0, self.dim), np.float32)
        history = pad(histories, self.config.history)
        if history.rows.max() >= len(self.ids):
            raise ValueError(f"item row {history.rows.max()} is outside the table of {len(self.ids)} items")
        at = np.asarray(now_ms, np.int64)
        if self.device.type == "cpu":
            return serving.user_vectors(self.served, self.tower.heads, history, at)
        parts = self.user_parts(history, at)
        mix = self.arrays["mix"][torch.from_numpy(situation(history, at)).to(self.device)]  # (B, F)
        scaled = [parts[name] * mix[:, column : column + 1] for column, name in enumerate(PARTS[:PERSONAL])]
        return _numpy(torch.cat([*scaled, mix[:, PERSONAL:]], dim=1))

    def neighbour_vectors(self, rows: NDArray[np.int64]) -> Floats:
        """(B, D) queries for what goes with these items: of users who have just clicked one, without what is the same
        for everyone (bias, popularity, newness)."""
        clicks = [History(rows[at : at + 1], np.ones(1, np.float32), np.zeros(1, np.int64)) for at in range(len(rows))]
        vectors = self.user_vectors(clicks, [0] * len(rows))
        vectors[:, self.config.tower_dim] = vectors[:, PERSONAL - len(PARTS) :] = 0.0
        return vectors

    def text_query(self, text: Floats) -> Floats:
        """(1, D) query for what is nearest to this text (E,) by its own text: the other parts of the vector are zero.

        The learned mix has no say: it weighs text by what it tells of the next click, and who asks in words means
        words.
        """
        arrays, config = self.arrays, self.config
        unit = centred(torch.as_tensor(text, dtype=torch.float32, device=self.device)[None], arrays["text.mean"])
        first = config.tower_dim + 1 + config.covisitation_rank
        query = np.zeros((1, config.dim), np.float32)
        query[:, first : first + config.text_part] = _numpy(unit @ arrays["text.projection"])
        return query

    @torch.no_grad()
    def user_parts(self, history: Padded, now_ms: NDArray[np.int64]) -> dict[str, Tensor]:
        """Unmixed query of each learned part: tower (B, d + 1), covisitation (B, R), text (B, P)."""
        arrays, device = self.arrays, self.device
        rows = torch.from_numpy(history.rows).to(device)
        valid = rows >= 0
        rows = rows.clamp_min(0)
        weights = torch.from_numpy(history.weights).to(device) * valid  # (B, T)
        faded = recency(weights)
        return {
            "tower": self._tower_query(rows, valid, weights, history, now_ms),
            "covisitation": _recent_direction(arrays["covisitation.left"], rows, faded, history.disliked),
            "text": _recent_direction(arrays["text.items"], rows, faded, history.disliked),
        }

    def _tower_query(
        self, rows: Tensor, valid: Tensor, weights: Tensor, history: Padded, now_ms: NDArray[np.int64]
    ) -> Tensor:
        if not len(self.ids):
            items = torch.zeros(*rows.shape, self.config.tower_dim, device=self.device)
        else:
            items = self.arrays["tower.items"][rows]  # (B, T, d)
        prefix = torch.full((len(rows), 1), rows.shape[1], device=self.device)
        ts = torch.from_numpy(history.ts_ms).to(self.device)
        at = torch.from_numpy(now_ms).to(self.device).unsqueeze(1)
        user = self.tower(items, weights, valid, ts, prefix, at)[:, 0] * self.tower.log_scale.exp()  # (B, d)
        return F.pad(user, (0, 1), value=1.0)  # the last entry meets the item's bias

    def frozen(self) -> Model:
        """A copy that later learning cannot reach."""
        arrays = {name: array.detach().clone() for name, array in self.arrays.items()}
        tower = copy.deepcopy(self.tower).requires_grad_(False)
        return Model(self.config, list(self.ids), arrays, tower)

    def finite(self) -> bool:
        """Whether no weight is NaN or infinite."""
        return all(bool(torch.isfinite(array).all()) for array in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        return self.arrays | {f"user.{name}": array for name, array in self.tower.state_dict().items()}

    def save(self, folder: Path) -> None:
        """Writes weights.safetensors, ids.json and config.json; the same model gives the same bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: array.detach().cpu().contiguous() for name, array in self._tensors().items()}
        save_file(tensors, folder / "weights.safetensors")
        (folder / "ids.json").write_text(json.dumps(self.ids, ensure_ascii=False), encoding="utf-8")
        config = json.dumps(asdict(self.config), sort_keys=True, indent=1)
        (folder / "config.json").write_text(config, encoding="utf-8")

    @staticmethod
    def load(folder: Path, device: str = "cpu") -> Model:
        """Raises ValueError on a damaged file or an array of another shape, dtype or a value not finite."""
        try:
            config = ModelConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
            ids = json.loads((folder / "ids.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / "weights.safetensors")  # a GPU without room for it is no damage
        except Exception as error:  # safetensors raises its own type, json and OSError theirs
            raise ValueError(f"{folder}: not a model: {error}") from error
        if not isinstance(ids, list) or not all(isinstance(item, str) for item in ids) or len(set(ids)) != len(ids):
            raise ValueError(f"{folder}/ids.json is not a list of different strings")
        tower = UserTower(config.tower_dim, config.heads, config.hidden).requires_grad_(False)
        shapes = array_shapes(config, len(ids))
        expected = shapes | {f"user.{name}": tuple(p.shape) for name, p in tower.state_dict().items()}
        _check(tensors, expected)
        tower.load_state_dict({name: tensors[f"user.{name}"] for name in tower.state_dict()})
        return Model(config, ids, {name: tensors[name].to(device) for name in shapes}, tower.to(device))


def _check(tensors: dict[str, Tensor], expected: dict[str, Any]) -> None:
    if tensors.keys() != expected.keys():
        raise ValueError(f"arrays differ: {sorted(tensors.keys() ^ expected.keys())}")
    for name, array in tensors.items():
        if array.dtype != torch.float32 or tuple(array.shape) != expected[name]:
            raise ValueError(f"{name} is {array.dtype} {tuple(array.shape)}, expected float32 {expected[name]}")
        if not torch.isfinite(array).all():
            raise ValueError(f"{name} has a value that is not finite")


def recency(weights: Tensor) -> Tensor:
    """What clicks of weights (B, T), newest last, count in the co-visitation and text parts."""
    age = torch.arange(weights.shape[1] - 1, -1, -1, device=weights.device)
    return weights * torch.exp(-age / RECENCY)


def steps(table: Tensor, rows: Tensor, faded: Tensor, disliked: bool) -> Tensor:
    """(B, T, K) what each event adds to a user's direction: its row of table (N, K), times its faded weight (B, T).

    Of an event with a negative weight only what it does not share with the positive ones: one dislike says little
    about everything that the user ever chose (docs/quality.md). disliked: whether any weight is negative; where none
    is, that part is left out.
    """
    whole = faded.unsqueeze(2) * table[rows]
    if not disliked:
        return whole
    taste = F.normalize((whole * (faded > 0).unsqueeze(2)).sum(dim=1), dim=1)  # (B, K)
    shared = torch.einsum("btk,bk->bt", whole, taste).clamp_max(0) * (faded < 0)  # (B, T)
    return whole - shared.unsqueeze(2) * taste.unsqueeze(1)


def _recent_direction(table: Tensor, rows: Tensor, faded: Tensor, disliked: bool) -> Tensor:
    """Unit rows (B, K) of the summed steps; zero without history."""
    if not len(table):
        return torch.zeros(len(rows), table.shape[1], device=table.device)
    return F.normalize(steps(table, rows, faded, disliked).sum(dim=1), dim=1)


def _numpy(tensor: Tensor) -> Floats:
    return np.asarray(tensor.detach().cpu().numpy(), dtype=np.float32)
