"""Processes that learn the same stream together: each holds all of it, and of a tower step computes its share.

Step and result are those of one process over all windows, as in synchronous data-parallel training (Goyal et al.,
arXiv 1706.02677): the shares of the gradient are added up before clipping and Adam. Everything else is repeated.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Team(NamedTuple):
    """`add_up` replaces a tensor by its sum over all processes; every process calls it in the same order."""

    rank: int = 0
    size: int = 1
    add_up: Callable[[Tensor], object] = lambda tensor: None

    @property
    def share(self) -> slice:
        """This process's windows of a step."""
        return slice(self.rank, None, self.size)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Each in place, all in one call."""
        if self.size > 1:
            flat = torch.cat([tensor.flatten() for tensor in tensors])
            self.add_up(flat)
            for tensor, total in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
                tensor.copy_(total.view_as(tensor))


ALONE = Team()
