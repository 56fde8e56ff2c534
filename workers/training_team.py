"""The trainer as several processes, started by torchrun: rank 0 trains, the others do what its learner does.

    torchrun --no-python --nproc-per-node 2 upwell trainer

Each rank makes the same calls of a learner of its own, in the same order; the steps of the towers are shared
(model/team.py). Only rank 0 reads Kafka, judges and publishes.
"""

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any

import torch.distributed as dist

from model.config import ModelConfig
from model.learner import Learner
from model.team import Team

SILENCE = timedelta(days=7)  # without clicks rank 0 has nothing to say; a rank that dies closes its connections
CALLS = ("resume", "add_items", "absorb", "learn", "forget", "model")  # what changes a learner


def _team() -> Team:
    return Team(dist.get_rank(), dist.get_world_size(), dist.all_reduce)


def _tell(*call: Any) -> None:
    dist.broadcast_object_list([call])


def _told() -> Any:
    call = [None]
    dist.broadcast_object_list(call)
    return call[0]


class LedLearner(Learner):
    """Rank 0's: what is asked of it, every rank's learner does."""

    def __init__(self, config: ModelConfig, seed: int = 0, device: str = "cpu") -> None:
        _tell("new", config, seed, device)
        super().__init__(config, seed, device, _team())
        self._inside = False  # a call that it makes of itself is part of one that was told


def _led(name: str) -> Any:
    call = getattr(Learner, name)

    @wraps(call)
    def led(self: LedLearner, *arguments: Any) -> Any:
        if self._inside:
            return call(self, *arguments)
        _tell(name, *arguments)
        self._inside = True
        try:
            return call(self, *arguments)
        finally:
            self._inside = False

    return led


for _name in CALLS:
    setattr(LedLearner, _name, _led(_name))


def follow() -> None:
    """A rank beside the first: until there is nothing more to do. Raises what the first one's learner raises."""
    learner: Learner | None = None
    while call := _told():
        name, *arguments = call
        if name == "new":
            config, seed, device = arguments
            learner = Learner(config, seed, device, _team())
        else:
            getattr(learner, name)(*arguments)


@contextmanager
def training_team() -> Iterator[type[Learner] | None]:
    """What makes the trainer's learner: Learner, or under torchrun LedLearner; None where this rank has followed."""
    if not dist.is_torchelastic_launched():
        yield Learner
        return
    dist.init_process_group("gloo", timeout=SILENCE)
    if dist.get_rank():
        for number in (signal.SIGINT, signal.SIGTERM):  # torchrun passes them to all; rank 0 says when it has ended
            signal.signal(number, signal.SIG_IGN)
        follow()
        yield None
    else:
        yield LedLearner
        _tell()
    dist.destroy_process_group()
    atexit.register(_leave)


def _leave() -> None:
    """Without the interpreter's own end, which gloo's threads may outlive: on busy cores two of 13 ranks were aborted
    there, and torchrun took that for a failure.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
