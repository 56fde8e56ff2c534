"""Learns from the stream, one micro-batch at a time, and hands out frozen models.

Legend: n events, N items, W windows, L window length, C candidates, d tower, E text width.
"""

import math
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig
from model.covisitation import Covisitation, Factors
from model.mix import Mix, situation
from model.model import Catalogue, Model
from model.popularity import Popularity
from model.sampling import EventLog, Events, Floats, Padded, Rows, shuffle_ties
from model.team import ALONE, Team
from model.tower import TowerTrainer


@dataclass(frozen=True)
class LearnReport:
    """What one call of learn did; the loss is a mean, NaN where nothing was learned from."""

    steps: int
    tower_loss: float


class Learner:
    """Deterministic on a CPU: the same seed, config and events give the same model, bit for bit.

    On a GPU the gradient of `Tensor.gather` adds up in no fixed order.
    """

    def __init__(self, config: ModelConfig, seed: int = 0, device: str = "cpu", team: Team = ALONE) -> None:
        self.config, self.device, self._seed = config, device, seed
        self.log = EventLog(config.window_events, config.exclude_seen)
        popular = (config.popular_now_half_life, config.popular_lately_half_life, config.popular_half_life)
        self._popularity = Popularity((*popular, config.covisitation_half_life))
        self._covisitation = Covisitation(config.covisitation_half_life, config.covisitation_pairs)
        self._mix = Mix(config.mix_candidates, config.mix_half_life)
        self._mix_first: float = config.mix_half_life  # events of which the mix is given every one
        self._tower = TowerTrainer(config, seed, device, team)
        self._catalogue = Catalogue(config, seed, device)
        self._random = np.random.default_rng(seed)
        self._counts = np.zeros(0, np.float32)  # (N,) positive events, undecayed
        self._born = np.zeros(0)  # (N,) number of the first positive event, infinite before it
        self._items = torch.zeros(0, config.tower_dim, device=device)  # (N, d) as of each item's last step
        self._factors = Factors(*(np.zeros((0, config.covisitation_rank), np.float32) for _ in range(2)))
        self._warmup_left, self._next_refresh = config.warmup_steps, 0

    def resume(self, model: Model, text: Floats) -> None:
        """A new learner goes on from a saved model; text (N, E) of its items. Give it its window with `absorb`."""
        self.add_items(model.ids, text)
        self._tower.user.load_state_dict(model.tower.state_dict())
        with torch.no_grad():
            self._tower.text.weight.copy_(model.arrays["tower.text"])
        self._tower.table.values = model.arrays["tower.ids"].to(self.device).clone()
        self._mix.restore(model.arrays["mix"].cpu().numpy())
        self._mix_first = 0
        self._counts = _counts_of(model)
        warmed = self.config.warmup_steps_a_batch * int(self._counts.sum()) // self.config.micro_batch
        self._warmup_left = max(0, self.config.warmup_steps - warmed)
        self._born = np.where(self._counts > 0, -np.inf, np.inf)
        self._renew_items()

    @property
    def ids(self) -> list[str]:
        return self._catalogue.ids

    @property
    def rows(self) -> dict[str, int]:
        """Item -> its place in `ids`."""
        return self._catalogue.rows

    def text(self) -> Floats:
        """(N, E) texts of `ids` as given: what the gate scores unknown items by."""
        return np.asarray(self._catalogue.text[: len(self.ids)].cpu().numpy())

    def add_items(self, ids: Sequence[str], text: Floats) -> None:
        """Grows the catalogue; text (M, E), a zero row where it is missing. A known id gets the new text.

        Raises ValueError on another shape or a value that is not finite.
        """
        rows = self._catalogue.add(ids, text)
        added = len(self.ids) - len(self._counts)
        self._tower.table.grow(added)
        self._popularity.grow(len(self.ids))
        self._covisitation.grow(len(self.ids))
        self._counts = np.pad(self._counts, (0, added))
        self._born = np.pad(self._born, (0, added), constant_values=np.inf)
        self._items = torch.cat([self._items, self._items.new_zeros(added, self.config.tower_dim)])
        self._items[rows] = self._vectors(rows)
        missing = ((0, added), (0, 0))
        self._factors = Factors(np.pad(self._factors.left, missing), np.pad(self._factors.right, missing))

    def _vectors(self, rows: Tensor) -> Tensor:
        counts = torch.from_numpy(self._counts).to(self.device)[rows]
        return self._tower.items(rows, self._catalogue.unit[rows], counts)

    def learn(self, events: Events) -> LearnReport:
        """Predicts, then learns, by micro-batches. FloatingPointError names the step that diverged."""
        steps, losses = self._tower.steps, list[float]()
        for start in range(0, len(events), self.config.micro_batch):
            losses += self.learn_observed(self.observe(events.slice(start, start + self.config.micro_batch)))
        return LearnReport(self._tower.steps - steps, float(np.mean(losses)) if losses else float("nan"))

    def observe(self, part: Events) -> Rows:
        """The cheap half of `learn`: at most a micro-batch into mix, histories and counts.

        Its event numbers (n,), for `learn_observed` once they make a micro-batch.
        """
        rows, numbers = self._append(part)
        history = self.log.before(numbers, self.config.history)  # walked once for both, some 20 us an event
        self._learn_mix(numbers, rows, part.ts_ms, history)
        self._count(numbers, rows, part.weights, history)
        return numbers

    def learn_observed(self, numbers: Rows) -> list[float]:
        """The costly half: steps of the towers on observed events, oldest first, and the factors; the steps' losses."""
        losses = self._learn_tower(numbers)
        self._refresh(self.log.count >= self._next_refresh)
        return losses

    def absorb(self, events: Events) -> None:
        """Takes a window read back into histories and counts without a step of the weights.

        What `resume` has counted holds these events already. An item of which it has counted more is older than they.
        """
        counted = self._counts
        self._counts, self._born = np.zeros_like(counted), np.full(len(counted), np.inf)
        for start in range(0, len(events), self.config.micro_batch):
            part = events.slice(start, start + self.config.micro_batch)
            rows, numbers = self._append(part)
            self._count(numbers, rows, part.weights, self.log.before(numbers, self.config.history))
        counted = np.pad(counted, (0, len(self._counts) - len(counted)))
        self._born[counted > self._counts] = -np.inf
        self._counts = np.maximum(counted, self._counts)
        self._refresh(len(events) > 0)
        self._renew_items()

    def forget(self, users: Collection[Hashable]) -> None:
        """Takes these users' events out of the window. Counts of items and weights stay: they name nobody."""
        self.log.forget(users)

    def _append(self, events: Events) -> tuple[Rows, Rows]:
        known = self._catalogue.rows
        unknown = list(dict.fromkeys(item for item in events.items if item not in known))
        if unknown:
            self.add_items(unknown, np.zeros((len(unknown), self.config.text_dim), np.float32))
        rows = np.array([known[item] for item in events.items], np.int64)
        return rows, self.log.append(events.users, rows, events.weights, events.ts_ms)

    def _count(self, numbers: Rows, rows: Rows, weights: Floats, history: Padded) -> None:
        self._popularity.add(rows, weights)
        self._covisitation.add(rows, weights, history)
        np.add.at(self._counts, rows, (weights > 0).astype(np.float32))
        np.minimum.at(self._born, rows[weights > 0], numbers[weights > 0])

    def _refresh(self, due: bool) -> None:
        if due:
            touched = self._popularity.values()[:, -1]
            self._factors = self._covisitation.factorise(touched, self.config.covisitation_rank, self._seed)
            longest = max(self.config.refresh_events, len(self.ids) // 8)
            pause = min(max(self.log.count // 8, self.config.micro_batch), longest)
            self._next_refresh = self.log.count + pause

    def _learn_mix(self, numbers: Rows, rows: Rows, ts_ms: Rows, history: Padded) -> None:
        """Against all items seen, not a sample, whose best are not the best: of a large catalogue with fewer events.

        One item in twelve cost 9 % of NDCG@10 by the mix, nothing by the towers (docs/quality.md). The first events
        are all given: a stream that young has seen no more items than events.
        """
        window, config = self.log.ending_at(numbers, 1), self.config
        chosen = (window.goals[:, 0] > 0) & (self._counts[rows] > 0)
        seen, every = int((self._counts > 0).sum()), 1
        if seen > config.full_softmax_items and self.log.count > self._mix_first:
            every = math.ceil(seen / config.sampled_items)  # cells scored a batch: as with the sample
            chosen &= numbers % every == 0
        if not chosen.any():
            return
        numbers, targets = numbers[chosen], rows[chosen]
        candidates = np.concatenate(self._competing(targets))
        columns = self._columns(candidates)
        history = history.part(chosen) if config.same_stamp_history else self.log.before(numbers, config.history, False)
        parts = self._scores(self._view(), history, ts_ms[chosen], candidates)
        excluded = self.log.consumed_mask(self.log.users(numbers), columns, len(candidates))
        self._mix.learn(parts, columns[targets], excluded, situation(history, ts_ms[chosen]), every)
        if not np.isfinite(self._mix.weights()).all():
            raise FloatingPointError(f"mix weights diverged at event {self.log.count}")

    def _scores(self, view: Model, history: Padded, ts_ms: Rows, candidates: Rows) -> Floats:
        """(F, B, C) every part's score of every candidate."""
        queries, chosen = view.user_parts(history, ts_ms), torch.from_numpy(candidates).to(self.device)
        arrays = view.arrays
        tower = torch.cat([arrays["tower.items"][chosen], arrays["tower.bias"][chosen].unsqueeze(1)], dim=1)
        learned = [
            queries["tower"] @ tower.T,
            queries["covisitation"] @ arrays["covisitation.right"][chosen].T,
            queries["text"] @ arrays["text.items"][chosen].T,
        ]
        popular = arrays["popularity"][chosen].T.unsqueeze(1).expand(-1, len(learned[0]), -1)  # (F - 3, B, C)
        return np.asarray(torch.cat([torch.stack(learned), popular]).detach().cpu().numpy())

    def _learn_tower(self, numbers: Rows) -> list[float]:
        """Replay steps while the stream is young, then one step on the new events and a replay."""
        config, losses = self.config, []
        for _ in range(min(self._warmup_left, config.warmup_steps_a_batch)):
            losses += self._step(self._replayed(), config.warmup_rate)
            self._warmup_left -= 1
        joined = [np.concatenate(pair) for pair in zip(self._newest(numbers), self._replayed(), strict=True)]
        return losses + self._step(joined, config.warmup_rate if self._warmup_left else config.learning_rate)

    def _replayed(self) -> list[NDArray[Any]]:
        numbers = self._random.integers(self.log.start, self.log.count, self.config.replay)
        numbers = numbers[self.log.users(numbers) >= 0]
        window = self.log.ending_at(numbers, self.config.history + 1)
        return [self.log.users(numbers), *window.columns()]

    def _newest(self, numbers: Rows) -> list[NDArray[Any]]:
        """The window of every user in the micro-batch, with only its new events to predict."""
        users, last, new = np.unique(self.log.users(numbers)[::-1], return_index=True, return_counts=True)
        window = self.log.ending_at(numbers[::-1][last], self.config.history + 1)
        age = np.arange(self.config.history, -1, -1)  # (L,)
        return [users, window.rows, window.weights, window.ts_ms, window.goals * (age < new[:, None])]

    def _step(self, drawn: list[NDArray[Any]], rate: float) -> list[float]:
        users, windows = drawn[0], shuffle_ties(Padded(*drawn[1:]), self._random)
        if not (windows.goals[:, 1:] > 0).any():
            return []
        candidates, expansion = self._candidates(np.unique(windows.rows[windows.rows >= 0]))
        columns = self._columns(candidates)
        rows = torch.from_numpy(candidates).to(self.device)
        loss, vectors = self._tower.step(
            windows,
            columns[np.maximum(windows.rows, 0)],
            (rows, self._catalogue.unit[rows], torch.from_numpy(self._counts[candidates]).to(self.device)),
            self.log.consumed_mask(users, columns, len(candidates)),
            expansion,
            rate,
        )
        self._items[rows] = vectors
        return [loss]

    def _candidates(self, needed: Rows) -> tuple[Rows, Tensor]:
        """Items that compete (C,) and their log(1 / chance of being drawn): those seen so far, or a sample."""
        needed, others = self._competing(needed)
        config, odds = self.config, 1.0
        if len(needed) + len(others) > config.full_softmax_items and len(others) > config.sampled_items:
            odds = len(others) / config.sampled_items
            others = self._random.choice(others, config.sampled_items, replace=False)
        expansion = torch.zeros(len(needed) + len(others), device=self.device)
        expansion[len(needed) :] = math.log(odds)
        return np.concatenate([needed, others]), expansion

    def _competing(self, needed: Rows) -> tuple[Rows, Rows]:
        """`needed` (n,), once each, and the other items seen so far (m,).

        Items never seen do not compete: the loss would teach the model that they are unwanted.
        """
        needed, free = np.unique(needed), self._counts > 0
        free[needed] = False
        return needed, np.flatnonzero(free)

    def _columns(self, candidates: Rows) -> Rows:
        """(N,) each item's place among the candidates (C,), -1 for the others."""
        columns = np.full(len(self._counts), -1, np.int64)
        columns[candidates] = np.arange(len(candidates))
        return columns

    def model(self) -> Model:
        """A frozen model with everything learned so far; copies, so later learning leaves it alone."""
        self._renew_items()
        view = self._view()
        unclicked = torch.from_numpy(self._counts == 0).to(self.device)
        unseen = view.unclicked_bias(self._items, view.arrays["text.items"])
        view.arrays["tower.bias"] = torch.where(unclicked, unseen, view.arrays["tower.bias"])
        return view.frozen()

    def _renew_items(self) -> None:
        self._items = self._vectors(torch.arange(len(self._counts), device=self.device))

    def recounted(self, model: Model) -> Model:
        """A model of this learner, its popularity, newness and mix brought up to now."""
        now = self._counted()
        now["popularity"] = now["popularity"][: len(model.ids)]
        return Model(model.config, model.ids, model.arrays | now, model.tower)

    def _common(self) -> Floats:
        """(N, F - 3) what every user's score of an item holds: log popularities, and newness from 1 down to 0."""
        age = np.abs(self.log.count - self._born)[:, None]  # infinite before the first event: not new
        newness = np.exp2(-age / (self.config.new_half_life, self.config.young_half_life))
        return np.concatenate([self._popularity.log()[:, :-1], newness], axis=1).astype(np.float32)

    def _view(self) -> Model:
        counts, catalogue = torch.from_numpy(self._counts).to(self.device), self._catalogue
        arrays = {
            "tower.items": self._items,
            "tower.ids": self._tower.table.values,
            "tower.text": self._tower.text.weight,
            "tower.bias": self._tower.table.values[:, -1] * counts / (counts + self.config.id_prior),
            "covisitation.left": torch.from_numpy(self._factors.left).to(self.device),
            "covisitation.right": torch.from_numpy(self._factors.right).to(self.device),
            "text.items": catalogue.projected[: len(counts)],
            "text.mean": catalogue.mean,
            "text.projection": catalogue.projection,
        }
        return Model(self.config, catalogue.ids, arrays | self._counted(), self._tower.user)

    def _counted(self) -> dict[str, Tensor]:
        """The arrays that move with every event."""
        counted = {"popularity": self._common(), "mix": self._mix.weights()}
        return {name: torch.from_numpy(array).to(self.device) for name, array in counted.items()}


def _counts_of(model: Model) -> Floats:
    """(N,) positive events on each item, read off its gate n / (n + prior), the saved share of the learned bias.

    Exact up to some 3,000; float32 loses digits of more, which the gate would not show. 0 where no bias is learned:
    there it is `Model.unclicked_bias`.
    """
    learned, gated = model.arrays["tower.ids"][:, -1].double(), model.arrays["tower.bias"].double()  # (N,) each
    gate = torch.where(learned == 0, 0.0, gated / learned).clamp(0, 1 - 2**-24)
    return np.asarray((model.config.id_prior * gate / (1 - gate)).round().float().cpu().numpy())
