"""Published sequence models on ids, retrained from where they stood at fixed points of the stream.

Legend: W windows, L tokens (start token first, padded on the left), d width, N items.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from model.losses import softmax_loss
from model.sampling import EventLog, Events, Floats, History, Padded, Rows, pad, shuffle_ties


class Gru4Rec(nn.Module):
    """One GRU layer over item embeddings (Hidasi et al. 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(width, width, batch_first=True)

    def forward(self, tokens: Tensor, held: Tensor) -> Tensor:
        """(W, L, d) outputs; tokens (W, L, d), held (W, L) bool. Read as if they alone stood there: even a zero in
        between would move the state."""
        order = torch.argsort((~held).byte(), dim=1, stable=True)  # (W, L) those held first
        newest = (held.cumsum(1) - 1).clamp_min(0)  # (W, L) the place in `order` of the last one held
        states = self.gru(tokens.gather(1, order.unsqueeze(2).expand_as(tokens)))[0]
        out: Tensor = states.gather(1, newest.unsqueeze(2).expand_as(states))
        return out


class SasRec(nn.Module):
    """Two causal transformer layers with learned positions (Kang & McAuley 2018)."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(length, width) * 0.05)  # counted from the newest
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.2, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, tokens: Tensor, held: Tensor) -> Tensor:
        """(W, L, d) outputs; tokens (W, L, d), held (W, L) bool."""
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        seen = causal & (held[:, None, :] | torch.eye(length, dtype=torch.bool))  # a pad sees itself: no NaN
        out: Tensor = self.layers(tokens + self.positions[-length:], mask=~seen.repeat_interleave(2, dim=0))
        return out


class RetrainedArm:
    """A sequence model with tied embeddings and a full softmax over seen items; `steps` AdamW steps every
    `every` events on windows drawn uniformly from all events so far. User state is exact in between.
    With `exclude_seen` what the user has consumed is no negative, as in Upwell's own loss, for it is no candidate when
    ranked, either: without that SASRec's HR@10 was .1800 in place of .1956 on MovieLens-100k, line by line.

    `same_stamp`: whether an event is predicted from those of its own stamp, as in line-by-line evaluation.
    """

    batch = 64

    def __init__(
        self,
        kind: str,
        num_items: int,
        every: int,
        same_stamp: bool = True,
        steps: int = 150,
        seed: int = 0,
        width: int = 64,
        length: int = 50,
        exclude_seen: bool = True,
    ) -> None:
        self._every, self._steps, self._same_stamp, self._length = every, steps, same_stamp, length
        self._random = np.random.default_rng(seed)
        with torch.random.fork_rng(devices=[]):  # modules and dropout draw from the global generator
            torch.manual_seed(seed)
            self._net: nn.Module = Gru4Rec(width) if kind == "gru4rec" else SasRec(width, length + 1)
            self._table = nn.Embedding(num_items + 1, width)  # the last row is the start token
            nn.init.normal_(self._table.weight, std=0.05)
            self._state = torch.get_rng_state()
        self._bias = nn.Parameter(torch.zeros(num_items))
        self._adam = torch.optim.AdamW([*self._net.parameters(), *self._table.parameters(), self._bias], 1e-3)
        self._log, self._left = EventLog(1_000_000, exclude_seen), every
        self._seen = np.zeros(num_items, np.bool_)

    @torch.no_grad()
    def score(self, users: Rows, histories: Sequence[History], now_ms: Sequence[int]) -> Floats:
        self._net.eval()
        out = self._outputs(pad(histories, self._length))[:, -1]  # (B, d)
        return np.asarray((out @ self._table.weight[:-1].T + self._bias).numpy(), np.float32)

    def learn(self, events: Events, rows: Rows) -> None:
        self._log.append(events.users, rows, events.weights, events.ts_ms)
        self._seen[rows[events.weights > 0]] = True
        self._left -= len(events)
        if self._left <= 0:
            self._left += self._every
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self._state)
                for _ in range(self._steps):
                    self._step()
                self._state = torch.get_rng_state()

    def _outputs(self, window: Padded) -> Tensor:
        """(W, L + 1, d): what is said before each event of the window, and after the last."""
        held = torch.from_numpy((window.rows >= 0) & (window.weights > 0))
        rows = torch.from_numpy(window.rows).where(held, torch.tensor(0))
        tokens = self._table(rows) * held.unsqueeze(2)  # (W, L, d)
        begins = (window.rows >= 0).argmax(axis=1)  # the start token stands just before the first event
        begins = np.where((window.rows >= 0).any(axis=1), begins, window.rows.shape[1])
        tokens, held = F.pad(tokens, (0, 0, 1, 0)), F.pad(held, (1, 0))
        lines = torch.arange(len(rows))
        tokens[lines, torch.from_numpy(begins)] = self._table.weight[-1]
        held[lines, torch.from_numpy(begins)] = True
        out: Tensor = self._net(tokens, held)
        return out

    def _step(self) -> None:
        self._net.train()
        numbers = self._random.integers(0, self._log.count, 32)
        # One longer than what is read: what is said last, as to a list's user, is trained, too.
        window = shuffle_ties(self._log.ending_at(numbers, self._length + 1), self._random)
        goals = torch.from_numpy(window.goals) > 0  # (W, L)
        if not goals.any():
            return
        columns: list[NDArray[Any]] = [column[:, :-1] for column in window.columns()]
        out = self._outputs(Padded(*columns))  # (W, L, d)
        source = np.broadcast_to(np.arange(window.rows.shape[1]), window.rows.shape)
        if not self._same_stamp:  # the place before the first event of the same stamp
            empty = window.rows[:, :, None] < 0
            earlier = empty | (window.ts_ms[:, :, None] < window.ts_ms[:, None, :])  # (W, L, L)
            source = earlier.sum(axis=1)
        place = torch.from_numpy(np.ascontiguousarray(source)).unsqueeze(2).expand(-1, -1, out.shape[2])
        said = out.gather(1, place)[goals]  # (P, d)
        scores = said @ self._table.weight[:-1].T + self._bias  # (P, N)
        items = np.arange(len(self._seen))
        consumed = self._log.consumed_mask(self._log.users(numbers), items, len(items))  # (W, N)
        barred = torch.from_numpy(consumed | ~self._seen)[goals.nonzero()[:, 0]]  # (P, N)
        loss = softmax_loss(scores, torch.from_numpy(window.rows)[goals], barred, torch.ones(len(scores)))
        self._adam.zero_grad()
        torch.autograd.backward(loss)
        self._adam.step()
