"""Numerics on one core."""

import torch
from threadpoolctl import threadpool_limits


def compute_in_one_thread() -> None:
    """torch and BLAS, whatever thread asks: two threads of a busy machine spin for one another.

    threadpoolctl sets OpenMP's number for the thread that calls it; in all others torch took a thread a core.
    """
    threadpool_limits(1)
    torch.set_num_threads(1)
