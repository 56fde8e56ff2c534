"""The two towers: an item is its text and, as it gathers events, its id; a user is a pooling of items.

Legend: W windows, T history, P predictions a window, S = T + 1 keys (start token first), H heads, d width,
N items, E text width.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from model.config import ModelConfig
from model.losses import softmax_loss
from model.sampling import Padded
from model.team import ALONE, Team

GAPS = 20  # buckets of log2 seconds: under a second ... over three days
_BETAS = (0.9, 0.98)


def gap_bucket(milliseconds: Tensor) -> Tensor:
    """Bucket of a time span: 0 below one second, then one a doubling; int64, same shape."""
    seconds = milliseconds.clamp_min(0).float() / 1000
    return (seconds + 1).log2().long().clamp_max(GAPS - 1)


def dropped(x: Tensor, share: float, generator: torch.Generator, part: slice, lines: int) -> Tensor:
    """Inverted dropout, x being the `part` of so many lines; drawn for all, so that a seed fixes a team's run, too."""
    if share == 0:
        return x
    drawn = torch.rand((lines, *x.shape[1:]), generator=generator, device=x.device)[part]
    return x * (drawn >= share) / (1 - share)


class UserTower(nn.Module):
    """Causal pooling over item vectors by heads that attend by content, recency and elapsed time.

    Recency is a learned linear bias on the distance (ALiBi, arXiv 2108.12409). Item vectors themselves are
    pooled, so a new click costs one pass over T of them.
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.start = nn.Parameter(torch.randn(dim) / math.sqrt(dim))
        self.query = nn.Linear(dim, heads * dim)
        self.log_slope = nn.Parameter(torch.linspace(0.0, -4.0, heads))
        self.start_bias = nn.Parameter(torch.full((heads,), -1.0))
        self.elapsed = nn.Parameter(torch.zeros(GAPS, heads))
        self.pause = nn.Parameter(torch.randn(GAPS, dim) * 0.05)
        self.skip = nn.Parameter(torch.full((heads,), 1.0 / heads))
        self.mlp = nn.Sequential(
            nn.Linear((heads + 1) * dim, hidden), nn.GELU(), nn.LayerNorm(hidden), nn.Linear(hidden, dim)
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(
        self,
        items: Tensor,
        weights: Tensor,
        valid: Tensor,
        ts_ms: Tensor,
        prefix: Tensor,
        at_ms: Tensor,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """User vectors (W, P, d) of unit length, or (C, d) of the C predictions `chosen` (W, P) alone.

        items (W, T, d), weights (W, T), valid (W, T) bool, ts_ms (W, T); prediction p sees the columns below
        prefix (W, P) and is asked at at_ms (W, P). Events without a positive weight are passed over: turned around
        they were keys that streams with few of them never teach, and the newest is what the user is taken to look for.
        """
        valid = valid & (weights > 0)
        keys = items * weights.unsqueeze(2)  # (W, T, d)
        keys = torch.cat([self.start.expand(len(items), 1, -1), keys], dim=1)  # (W, S, d)
        present = F.pad(valid, (1, 0), value=True)  # (W, S)
        places = torch.arange(present.shape[1], device=keys.device) * present
        newest = places.cummax(dim=1).values.gather(1, prefix)  # (W, P) key index, start (0) when none
        last = keys.gather(1, newest.unsqueeze(2).expand(-1, -1, keys.shape[2]))  # (W, P, d)
        since = at_ms - F.pad(ts_ms, (1, 0)).gather(1, newest)  # (W, P)
        last = last + self.pause[gap_bucket(torch.where(newest > 0, since, 0))]
        if chosen is None:
            query = self.query(last)
        else:  # of a large catalogue's users few have a long history: one place in twenty of beauty's windows
            some = last[chosen]  # (C, d)
            query = last.new_zeros(*chosen.shape, self.query.out_features)
            query[chosen], last = self.query(some), some
        query = query.unflatten(2, (self.heads, -1))  # (W, P, H, d)
        attention = self._attention(keys, query, present, ts_ms, prefix, at_ms)  # (W, P, H, S)
        pooled = torch.einsum("wphs,wsd->wphd", attention, keys)
        if chosen is not None:
            pooled = pooled[chosen]  # (C, H, d)
        mixed = torch.einsum("...hd,h->...d", pooled, self.skip)
        return F.normalize(mixed + self.mlp(torch.cat([pooled.flatten(-2), last], dim=-1)), dim=-1)

    def _attention(
        self, keys: Tensor, query: Tensor, present: Tensor, ts_ms: Tensor, prefix: Tensor, at_ms: Tensor
    ) -> Tensor:
        logits = torch.einsum("wphd,wsd->wphs", query, keys) / math.sqrt(keys.shape[2])
        columns = torch.arange(ts_ms.shape[1], device=keys.device)  # (T,)
        distance = prefix.unsqueeze(2) - 1 - columns  # (W, P, T)
        elapsed = self.elapsed[gap_bucket(at_ms.unsqueeze(2) - ts_ms.unsqueeze(1))]  # (W, P, T, H)
        bias = elapsed.transpose(2, 3) - self.log_slope.exp()[:, None] * distance.unsqueeze(2)  # (W, P, H, T)
        start = self.start_bias[:, None].expand(*bias.shape[:2], -1, -1)  # (W, P, H, 1)
        visible = F.pad(distance >= 0, (1, 0), value=True) & present.unsqueeze(1)  # (W, P, S)
        logits = logits + torch.cat([start, bias], dim=3)
        return torch.softmax(logits.masked_fill(~visible.unsqueeze(2), float("-inf")), dim=3)


def item_vectors(projected: Tensor, ids: Tensor, counts: Tensor, scale: float, prior: float) -> Tensor:
    """Unit rows (N, d) of scale * projected text (N, d) + n / (n + prior) * id (N, d), n = counts (N,).

    An item nobody touched is its text; one without text is its id.
    """
    gate = counts / (counts + prior)
    return F.normalize(scale * projected + gate.unsqueeze(1) * ids, dim=1)


class IdTable:
    """Per-item id embedding and bias, (N, d + 1), with lazy Adam: only the rows of a step are touched.

    So a step costs what its candidates cost, however large the catalogue is.
    """

    def __init__(self, dim: int, generator: torch.Generator, device: str) -> None:
        self._dim, self._generator, self._device, self._steps = dim, generator, device, 0
        self.values = torch.zeros(0, dim + 1, device=device)
        self._mean, self._square = self.values.clone(), self.values.clone()

    def grow(self, added: int) -> None:
        fresh = torch.randn(added, self._dim + 1, generator=self._generator) * 0.05
        fresh[:, -1] = 0.0
        self.values = torch.cat([self.values, fresh.to(self._device)])
        empty = torch.zeros_like(fresh, device=self._device)
        self._mean, self._square = torch.cat([self._mean, empty]), torch.cat([self._square, empty])

    def step(self, rows: Tensor, gradient: Tensor, rate: float) -> None:
        """One Adam step (arXiv 1412.6980) on `rows` (C,) with `gradient` (C, d + 1)."""
        self._steps += 1
        mean_decay, square_decay = _BETAS
        mean = mean_decay * self._mean[rows] + (1 - mean_decay) * gradient
        square = square_decay * self._square[rows] + (1 - square_decay) * gradient.square()
        self._mean[rows], self._square[rows] = mean, square
        mean = mean / (1 - mean_decay**self._steps)
        square = square / (1 - square_decay**self._steps)
        self.values[rows] -= rate * mean / (square.sqrt() + 1e-8)


class TowerTrainer:
    """Both towers and their optimisers. One step costs what its windows and candidates cost.

    Legend: L window length (T + 1: the last event is only predicted), C candidates, P events to predict.
    """

    def __init__(self, config: ModelConfig, seed: int, device: str, team: Team = ALONE) -> None:
        self._config, self._team, self.steps = config, team, 0
        self._generator = torch.Generator(device=device).manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.user = UserTower(config.tower_dim, config.heads, config.hidden).to(device)
            self.text = nn.Linear(config.text_dim, config.tower_dim, bias=False).to(device)
            nn.init.normal_(self.text.weight, std=config.tower_dim**-0.5)  # a unit text becomes about unit long
        self._parameters = [*self.user.parameters(), *self.text.parameters()]
        self._adam = torch.optim.AdamW(self._parameters, betas=_BETAS, foreach=True)
        self.table = IdTable(config.tower_dim, torch.Generator().manual_seed(seed), device)

    def items(self, rows: Tensor, unit_text: Tensor, counts: Tensor) -> Tensor:
        """Item vectors (C, d) of rows (C,) from their text (C, E) and event counts (C,)."""
        ids, config = self.table.values[rows, :-1], self._config
        with torch.no_grad():
            return item_vectors(self.text(unit_text), ids, counts, config.text_scale, config.id_prior)

    def step(
        self,
        windows: Padded,
        columns: NDArray[np.int64],
        candidates: tuple[Tensor, Tensor, Tensor],
        excluded: NDArray[np.bool_],
        expansion: Tensor,
        rate: float,
    ) -> tuple[float, Tensor]:
        """One AdamW step, with the rest of the team; the loss before it and the candidates' vectors (C, d) after it.

        windows (W, L); columns (W, L) the candidate of each event; candidates: rows (C,), unit text (C, E)
        and counts (C,); excluded (W, C) as in softmax_loss, and expansion (C,), which it wants added to the scores.
        Raises FloatingPointError on a loss or gradient that is not finite, before any weight has moved.
        """
        self.steps += 1
        rows, unit_text, counts = candidates
        leaf = self.table.values[rows].requires_grad_()  # (C, d + 1)
        projected = self.text(unit_text)  # (C, d)
        vectors, bias = self._drawn_items(leaf, projected, counts)
        lines, whole, part = len(columns), float(windows.goals[:, 1:].sum()), self._team.share
        windows = windows.part(part)
        held = torch.from_numpy(columns[part]).to(rows.device)
        goals = torch.from_numpy(windows.goals[:, 1:]).to(rows.device)  # (W, L - 1)
        chosen = goals > 0
        user = self._drawn_users(windows, vectors[held[:, :-1]], lines, chosen)  # (P, d)
        user = self.user.log_scale.exp() * user
        scores = torch.addmm(bias + expansion, user, vectors.T)  # (P, C), the step's largest tensor
        barred = torch.from_numpy(excluded[part]).to(rows.device)[chosen.nonzero()[:, 0]]
        loss = softmax_loss(scores, held[:, 1:][chosen], barred, goals[chosen])
        if self._team.size > 1:
            loss = loss * goals[chosen].sum() / whole
        self._descend(loss, rows, leaf, rate)
        ids, config = self.table.values[rows, :-1], self._config
        return loss.item(), item_vectors(projected.detach(), ids, counts, config.text_scale, config.id_prior)

    def _drawn_items(self, leaf: Tensor, projected: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        config = self._config
        draw = torch.rand(len(leaf), generator=self._generator, device=leaf.device)
        counts = counts * (draw >= config.id_dropout)  # the others are their text in this step
        vectors = item_vectors(projected, leaf[:, :-1], counts, config.text_scale, config.id_prior)
        return vectors, leaf[:, -1] * counts / (counts + config.id_prior)

    def _drawn_users(self, windows: Padded, items: Tensor, lines: int, chosen: Tensor) -> Tensor:
        """(P, d): what the tower says before the events chosen (W, L - 1), never the first; items (W, L - 1, d), W of
        `lines`."""
        weights, ts = (torch.from_numpy(c).to(items.device) for c in (windows.weights, windows.ts_ms))
        valid = torch.from_numpy(windows.rows[:, :-1] >= 0).to(items.device)
        past, at = ts[:, :-1], ts[:, 1:]
        if self._config.same_stamp_history:
            prefix = torch.arange(1, past.shape[1] + 1, device=items.device).expand(len(past), -1)
        else:
            prefix = ((past.unsqueeze(1) < at.unsqueeze(2)) | ~valid.unsqueeze(1)).sum(dim=2)  # (W, L - 1)
        items = dropped(items, self._config.dropout, self._generator, self._team.share, lines)
        users: Tensor = self.user(items, weights[:, :-1], valid, past, prefix, at, chosen)
        return users

    def _descend(self, loss: Tensor, rows: Tensor, leaf: Tensor, rate: float) -> None:
        self._adam.zero_grad()
        torch.autograd.backward(loss)
        self._team.add(
            [loss.detach(), *(tensor.grad for tensor in (*self._parameters, leaf) if tensor.grad is not None)]
        )
        norm = nn.utils.clip_grad_norm_([*self._parameters, leaf], 1.0)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise FloatingPointError(f"tower step {self.steps}: loss {loss.item()}, gradient norm {norm.item()}")
        for group in self._adam.param_groups:
            group["lr"] = rate
        self._adam.step()
        assert leaf.grad is not None
        self.table.step(rows, leaf.grad, rate)
